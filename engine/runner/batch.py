"""One rank's share of a step, as the model sees it.

T tokens of this rank, P ranks, C KV cache groups, B blocks of a sequence, K experts a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from expertwire.kernels.ops import attention
from expertwire.kernels.ops.attention import AttentionMetadata


class OnRouted(Protocol):
    """Counts the tokens that a layer routes to each expert."""

    def __call__(self, layer: int, ids_TK: Tensor, /) -> None:
        """Count the logical experts of the tokens, i64 [T, K]."""
        ...


@dataclass(frozen=True, kw_only=True)
class ForwardBatch:
    """Tokens of several sequences, one after another.

    Attributes:
        token_ids_T: i64; `positions_T`: i64.
        attention_metadata: of each KV cache group, in the order of the model's `cache_specs`.
        num_tokens_P: tokens of every rank.
        is_long_T: integers, 1 where the token is of a long request (`SchedulerConfig.original_max_position_embeddings`); None: of
            none.
        num_valid: i32 [1] on the device: this rank's tokens from there on are padding of a captured step, and `num_tokens_P`
            are bounds. None: all tokens are valid.
        on_routed: called by every layer with experts, if some request asked for its experts.
    """

    token_ids_T: Tensor
    positions_T: Tensor
    attention_metadata: tuple[AttentionMetadata, ...]
    num_tokens_P: Sequence[int]
    is_long_T: Tensor | None = None
    num_valid: Tensor | None = None
    on_routed: OnRouted | None = None


def prompt_batch(
    token_ids: Sequence[int],
    start: int,
    blocks_CB: np.ndarray,
    block_size: int,
    num_tokens_P: Sequence[int],
    device: str = "cpu",
    *,
    is_long: bool = False,
) -> ForwardBatch:
    """Return the batch of one sequence's tokens at the positions from `start` on. `blocks_CB`: i32, its block tables."""
    position_T = np.arange(start, start + len(token_ids))

    def metadata(blocks_B: np.ndarray) -> AttentionMetadata:
        slots_T = blocks_B[position_T // block_size].astype(np.int64) * block_size + position_T % block_size
        table = torch.from_numpy(blocks_B[None]).to(device)
        slot_mapping = torch.from_numpy(slots_T).to(device)
        return attention.describe([len(token_ids)], [start + len(token_ids)], table, slot_mapping=slot_mapping)

    return ForwardBatch(
        token_ids_T=torch.tensor(token_ids, dtype=torch.int64, device=device),
        positions_T=torch.from_numpy(position_T).to(device),
        attention_metadata=tuple(metadata(blocks_B) for blocks_B in blocks_CB),
        num_tokens_P=num_tokens_P,
        is_long_T=torch.full((len(token_ids),), int(is_long), device=device),
    )
