"""KV cache tensors of one rank.

M blocks copied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from expertwire.kernels.ops.copy_blocks import CopyBlocks
from expertwire.scheduler.config import CacheSpec
from expertwire.scheduler.plan import RankPlan


@dataclass(frozen=True, kw_only=True)
class NamedCache:
    """A KV cache group: the tensors [blocks, tokens of a block, ...] of each layer that writes it; of kind "state" [blocks, ...].

    Kinds "full" and "window" keep keys and values [..., G key/value heads, d head size]; "latent" and "index" one tensor
    [..., l]; "chunk" and "state" what `kernels.ops.recurrent` says. Keys, values and latents may be fp8
    (`EngineConfig.kv_cache_dtype`).
    """

    spec: CacheSpec
    tokens_per_block: int  # tokens of an entry of a block table, as `CacheSpec.tokens_per_block`
    layers: Mapping[int, tuple[Tensor, ...]]

    def tensors(self) -> list[Tensor]:
        """Return those of all layers."""
        return [tensor for tensors in self.layers.values() for tensor in tensors]


def make(
    spec: CacheSpec,
    num_blocks: int,
    block_size: int,
    tensors: Mapping[int, Sequence[tuple[tuple[int, ...], torch.dtype]]],
    device: str,
) -> NamedCache:
    """Return the group, filled with zeros: padding reads the null block, and 0 * NaN would not be 0.

    Args:
        tensors: of each layer that writes it, shape and dtype of each tensor: of one token, or of one state.
    """
    lead = (num_blocks,) if spec.kind == "state" else (num_blocks, spec.chunk_size or block_size)
    layers = {
        layer: tuple(torch.zeros((*lead, *shape), dtype=dtype, device=device) for shape, dtype in each)
        for layer, each in tensors.items()
    }
    return NamedCache(spec=spec, tokens_per_block=spec.tokens_per_block(block_size), layers=layers)


def copy_blocks(copies: Sequence[CopyBlocks], plan: RankPlan, upload: Callable[..., list[Tensor]]) -> None:
    """Copy the blocks that a plan names.

    Args:
        copies: of each cache group.
        upload: brings arrays to the caches' device, here all by one call.
    """
    found = sorted(set(plan.copy_cache_M.tolist()))
    if not found:
        return
    blocks_M = [blocks for index in found for blocks in _copied(plan, plan.copy_cache_M == index)]
    uploaded = upload(*blocks_M)
    for index, source_M, target_M in zip(found, uploaded[::2], uploaded[1::2], strict=True):
        copies[index](source_M, target_M)


def _copied(plan: RankPlan, here_M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the blocks that are copied and those that they are copied to, i64, of some of a plan's copies."""
    return plan.copy_from_M[here_M].astype(np.int64), plan.copy_to_M[here_M].astype(np.int64)
