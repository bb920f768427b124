"""One rank's share of a step, as the model sees it.

T tokens of this rank, P ranks, C caches, W blocks of a sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from expertwire.kernels.ops import attention
from expertwire.kernels.ops.attention import AttentionMetadata


@dataclass(frozen=True, kw_only=True)
class ForwardBatch:
    """Tokens of several sequences, one after another.

    `token_ids_T` and `positions_T` are i64. `attention_metadata`: of each cache, in the order of the model's `cache_specs`.
    `num_tokens_P`: of every rank. `num_valid`, i32 [1] on the device: this rank's tokens from there on only fill up a captured
    step, of which `num_tokens_P` says what ranks have at most. None: all count.
    `routed` is told, layer by layer, the logical experts of the tokens, i64 [T, K].
    """

    token_ids_T: Tensor
    positions_T: Tensor
    attention_metadata: tuple[AttentionMetadata, ...]
    num_tokens_P: Sequence[int]
    num_valid: Tensor | None = None
    routed: Callable[[int, Tensor], None] | None = None


def in_parts(num_tokens_P: Sequence[int], num_parts: int) -> list[list[int]]:
    """Every rank's tokens in each part of a step: as even as can be, and found alike by all ranks."""
    return [[(num + part) // num_parts for num in num_tokens_P] for part in reversed(range(num_parts))]


def of_prompt(
    token_ids: Sequence[int],
    start: int,
    blocks_CW: np.ndarray,
    block_size: int,
    num_tokens_P: Sequence[int],
    device: str = "cpu",
) -> ForwardBatch:
    """Tokens of one sequence, at the positions from `start` on. `blocks_CW`: i32, its block table in each cache."""
    position_T = np.arange(start, start + len(token_ids))
    return ForwardBatch(
        token_ids_T=torch.tensor(token_ids, dtype=torch.int64, device=device),
        positions_T=torch.from_numpy(position_T).to(device),
        attention_metadata=tuple(
            attention.describe(
                [len(token_ids)],
                [start + len(token_ids)],
                torch.from_numpy(blocks_W[None]).to(device),
                slot_mapping=slot_mapping(blocks_W[position_T // block_size], position_T, block_size, device),
            )
            for blocks_W in blocks_CW
        ),
        num_tokens_P=num_tokens_P,
    )


def slot_mapping(block_T: np.ndarray, position_T: np.ndarray, block_size: int, device: str) -> Tensor:
    """Return where tokens in these blocks, at these positions, are stored: i64, block * block_size + offset."""
    return torch.from_numpy(block_T.astype(np.int64) * block_size + position_T % block_size).to(device)
