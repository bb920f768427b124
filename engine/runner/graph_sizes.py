"""The sizes of the steps that a GPU replays."""

from __future__ import annotations

from typing import NamedTuple

_MIXED_SIZES = (32, 64, 128, 256, 512)


class GraphSize(NamedTuple):
    """What a captured step is for, in the order in which one is looked for.

    Attributes:
        max_others: tokens of any other rank, at most.
        num_tokens: of this rank, with those that fill up.
        is_mixed: whether sequences may have several queries.
    """

    max_others: int
    num_tokens: int
    is_mixed: bool

    def tokens_P(self, rank: int, num_ranks: int) -> list[int]:
        """As `ForwardBatch` takes them."""
        return [self.num_tokens if p == rank else self.max_others for p in range(num_ranks)]


def graph_sizes(max_num_batched_tokens: int, max_num_seqs: int, num_ranks: int) -> list[GraphSize]:
    """Return the sizes to capture, in the order in which one is looked for.

    Decodes beside as many tokens of each other rank: doubling to 8, by eights to 64, from there on by an eighth. Mixed steps:
    doubling from 32 to 512 tokens. A few of each beside as many tokens of other ranks as there can be.

    Args:
        max_num_batched_tokens: of a rank in a step, at most; where an exchange takes fewer tokens, as many: larger steps
            take several exchanges, as many on every rank as the plan says and not as a bound would.
    """
    decodes = [num for num in decode_sizes(max_num_seqs) if num <= max_num_batched_tokens]
    mixed = sorted({min(num, max_num_batched_tokens) for num in _MIXED_SIZES})
    sizes = {GraphSize(num, num, False) for num in decodes} | {GraphSize(num, num, True) for num in mixed}
    if num_ranks > 1:
        few = {num for num in decodes if num & (num - 1) == 0} | set(decodes[-1:])
        sizes |= {GraphSize(max_num_batched_tokens, num, False) for num in few}
        sizes |= {GraphSize(max_num_batched_tokens, num, True) for num in mixed}
    return sorted(sizes)


def decode_sizes(max_num_seqs: int) -> list[int]:
    """Return the numbers of sequences to capture."""
    sizes, size = [], 1
    while size < max_num_seqs:
        sizes.append(size)
        size += max(1, size if size < 8 else 8 if size < 64 else size // 8)
    return [*sizes, max_num_seqs]
