"""KV cache tensors of one rank.

M blocks copied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from expertwire.kernels.ops.attention import as_bytes
from expertwire.scheduler.config import CacheSpec
from expertwire.scheduler.plan import RankPlan


@dataclass(frozen=True, kw_only=True)
class NamedCache:
    """A KV cache group: the tensors [blocks, block_size, ...] of each layer that writes it.

    Kinds "full" and "window" keep keys and values [..., G key/value heads, d head size]; "latent" and "index" one tensor
    [..., l]. Keys, values and latents may be fp8 (`EngineConfig.kv_cache_dtype`).
    """

    spec: CacheSpec
    layers: Mapping[int, tuple[Tensor, ...]]


def make(
    spec: CacheSpec,
    num_blocks: int,
    block_size: int,
    shapes: Sequence[tuple[int, ...]],
    dtype: torch.dtype,
    device: str,
) -> NamedCache:
    """Return the group, filled with zeros: padding reads the null block, and 0 * NaN would not be 0.

    Args:
        shapes: of one token, for each tensor of a layer.
    """

    def layer() -> tuple[Tensor, ...]:
        return tuple(torch.zeros((num_blocks, block_size, *shape), dtype=dtype, device=device) for shape in shapes)

    return NamedCache(spec=spec, layers={i: layer() for i in spec.writers})


def copy_blocks(caches: Sequence[NamedCache], plan: RankPlan, upload: Callable[[np.ndarray], Tensor]) -> None:
    """Copy the blocks that a plan names. `upload` copies integers to the caches' device."""
    for index in sorted(set(plan.copy_cache_M.tolist())):
        here_M = plan.copy_cache_M == index
        source, target = upload(plan.copy_from_M[here_M]).long(), upload(plan.copy_to_M[here_M]).long()
        for tensors in caches[index].layers.values():
            for blocks in map(as_bytes, tensors):
                blocks.index_copy_(0, target, blocks.index_select(0, source))
