"""CUDA graphs: steps that are captured once and replayed, and their sizes. Never run on a GPU by us.

Steps of decodes replay the graph of the next larger number of sequences, mixed steps that of the next larger number of tokens, of
which the device knows how many are decodes. Padding belongs to no slot: it stores nothing, reaches no expert, and its outputs
are not read.

Each rank decides alone whether it replays: the exchanges are the same with and without. A graph is for a number of this rank's
tokens and a bound on any other rank's, which bounds the rows that arrive here: as many, or all that a step can have, for steps in
which others compute long prompts.

T tokens, D model width, P ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from expertwire.engine.runner.micro_batch import MicroBatch, PackedInputs

_MIXED_SIZES = (32, 64, 128, 256, 512)


class Captured(NamedTuple):
    """Captured work: `replay` repeats it with what its inputs hold by then, and writes into `out`."""

    replay: Callable[[], None]
    out: Tensor


class Capture(Protocol):
    """Captures work of the current device that waits for nothing and leaves its inputs where they are."""

    def __call__(self, work: Callable[[], Tensor], /) -> Captured: ...


def cuda(barrier: Callable[[], None]) -> Capture:
    """Return the capture of CUDA graphs that share memory: the `out` of one is valid until another is replayed. The largest
    has to be captured first.

    Args:
        barrier: waits for all ranks. They wait for each other in the work, and one that is late, as it has compiled or loaded for
            longer, must not let the others' kernels run into their time limit (vllm#55319).
    """
    pool = torch.cuda.graph_pool_handle()

    def capture(work: Callable[[], Tensor]) -> Captured:
        barrier()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            work()  # what allocates or compiles on first use does so now
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Only of this thread: the process group's watchdog asks for events meanwhile.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            out = work()
        return Captured(graph.replay, out)

    return capture


class GraphSize(NamedTuple):
    """The steps that a graph is for; the smallest that fits a step is replayed.

    Attributes:
        max_others: most tokens of any other rank.
        num_tokens: tokens of this rank, with padding.
        is_mixed: whether sequences may have several queries.
    """

    max_others: int
    num_tokens: int
    is_mixed: bool

    def tokens_P(self, rank: int, num_ranks: int) -> list[int]:
        """Return `ForwardBatch.num_tokens_P`."""
        return [self.num_tokens if p == rank else self.max_others for p in range(num_ranks)]

    def fits(self, step: MicroBatch, rank: int, num_tokens_P: np.ndarray) -> bool:
        """Return whether a step of this rank, beside the other ranks' tokens, can replay the graph."""
        others = int(np.delete(num_tokens_P, rank).max(initial=0))
        is_of_kind = self.is_mixed or step.num_decodes == len(step.slot_S)
        return self.num_tokens >= step.num_tokens and self.max_others >= others and is_of_kind


@dataclass(frozen=True, kw_only=True)
class StepGraph:
    """A captured step.

    Attributes:
        inputs: of each micro-batch; a replay reads them.
        step: its output are the hidden states of the micro-batches, one after another.
    """

    size: GraphSize
    inputs: list[PackedInputs]
    step: Captured

    def run(self, inputs: Sequence[Tensor], micro_batches: Sequence[MicroBatch]) -> Tensor:
        """Return the hidden states [T, D] of the micro-batches, whose packed and uploaded numbers are `inputs`."""
        for kept, given in zip(self.inputs, inputs, strict=True):
            kept.words.copy_(given)
        self.step.replay()
        parts = self.step.out.split([kept.num_tokens for kept in self.inputs])
        rows = [x_TD[: each.num_tokens] for x_TD, each in zip(parts, micro_batches, strict=True)]
        return rows[0] if len(rows) == 1 else torch.cat(rows)


def graph_sizes(max_num_tokens: int, max_num_seqs: int, num_ranks: int) -> list[GraphSize]:
    """Return the sizes to capture, in the order in which one is looked for.

    Decodes beside as many tokens of each other rank: doubling to 8, by eights to 64, from there on by an eighth. Mixed steps:
    doubling from 32 to 512 tokens. A few of each beside as many tokens of other ranks as there can be.

    Args:
        max_num_tokens: most tokens of a rank in a step; if an exchange takes fewer, as many as that: larger steps take several
            exchanges, as many on every rank as the plan implies and not as a bound would.
    """
    decodes = [num for num in decode_sizes(max_num_seqs) if num <= max_num_tokens]
    mixed = sorted({min(num, max_num_tokens) for num in _MIXED_SIZES})
    sizes = {GraphSize(num, num, False) for num in decodes} | {GraphSize(num, num, True) for num in mixed}
    if num_ranks > 1:
        few = {num for num in decodes if num & (num - 1) == 0} | set(decodes[-1:])
        sizes |= {GraphSize(max_num_tokens, num, False) for num in few}
        sizes |= {GraphSize(max_num_tokens, num, True) for num in mixed}
    return sorted(sizes)


def decode_sizes(max_num_seqs: int) -> list[int]:
    """Return the numbers of decodes to capture."""
    sizes, size = [], 1
    while size < max_num_seqs:
        sizes.append(size)
        size += max(1, size if size < 8 else 8 if size < 64 else size // 8)
    return [*sizes, max_num_seqs]
