"""What a decoder's layers are given: where they run, and, of a step, what they share.

T tokens of this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from expertwire.comm.all_to_all.base import AllToAll
from expertwire.engine.kv_cache.caches import NamedCache
from expertwire.engine.models.model_config import QueryScaling
from expertwire.engine.runner.batch import ForwardBatch
from expertwire.kernels.ops.attention import AttentionMetadata
from expertwire.kernels.ops.variants import Rope
from expertwire.kernels.registry import Ops
from expertwire.moe.eplb.placement import Placement


@dataclass(frozen=True, kw_only=True)
class RankContext:
    """Where a model runs."""

    rank: int
    dtype: torch.dtype
    device: str
    ops: Ops
    placement: Placement | None  # None: a dense model
    all_to_alls: tuple[AllToAll, ...]  # one for each part of a step that can be on its way at once; none: a dense model
    exchange_tokens: int | None = None  # as `moe.layer.MoeLayer` has it


@dataclass(frozen=True, kw_only=True)
class LayerContext:
    """Where a layer's attention stands in its model.

    Attributes:
        caches: of the model's, those that the layer writes, in their order.
        fp8_cache: whether keys and values, or latents, are kept in fp8.
        norm: the one behind attention, [D]; `eps` is its.
    """

    ops: Ops
    dtype: torch.dtype
    layer: int
    caches: tuple[int, ...]
    fp8_cache: bool
    norm: Tensor
    eps: float


@dataclass(frozen=True, kw_only=True)
class Step:
    """A step's batch, the caches, and what several layers compute alike."""

    batch: ForwardBatch
    caches: Sequence[NamedCache]
    tables: Mapping[Rope, tuple[Tensor, Tensor]]
    _shared: dict[Hashable, Any] = field(default_factory=dict)

    def cache(self, number: int, layer: int) -> tuple[AttentionMetadata, tuple[Tensor, ...]]:
        """Return the attention metadata of the model's cache of that number, and a layer's tensors."""
        return self.batch.attention_metadata[number], self.caches[number].layers[layer]

    def shared(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """What `compute` returns, computed by the first layer that asks."""
        if key not in self._shared:
            self._shared[key] = compute()
        return self._shared[key]

    def query_scales(self, scaling: QueryScaling) -> Tensor:
        """fp32 [T, 1, 1], of the tokens' positions."""

        def compute() -> Tensor:
            turns_T = ((self.batch.positions_T + scaling.offset) // scaling.length).float()
            return (1 + scaling.beta * torch.log1p(turns_T))[:, None, None]

        return self.shared(scaling, compute)
