"""Context of a decoder's layers: the rank they run on, and what they share in a step.

T tokens of this rank, S sequences, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from expertwire.comm.all_to_all.base import AllToAll
from expertwire.engine.kv_cache.caches import NamedCache
from expertwire.engine.models.mixer_configs import QueryScaling
from expertwire.engine.runner.batch import ForwardBatch
from expertwire.kernels.ops.attention import AttentionMetadata
from expertwire.kernels.ops.recurrent import StateMetadata
from expertwire.kernels.ops.rotary import RopeInputs
from expertwire.kernels.ops.variants import LongRope, Rope
from expertwire.kernels.registry import Ops
from expertwire.moe.eplb.placement import Placement


def _do_nothing() -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class RankContext:
    """The rank that a model runs on. `beat` is called before each layer, so that a rank in a long step shows that it works."""

    rank: int
    dtype: torch.dtype
    device: str
    ops: Ops
    placement: Placement | None  # None: a dense model
    all_to_alls: tuple[AllToAll, ...]  # one for each micro-batch in flight; none: a dense model
    exchange_tokens: int | None = None  # as in `moe.layer.MoeLayer`
    beat: Callable[[], None] = _do_nothing


@dataclass(frozen=True, kw_only=True)
class LayerContext:
    """The mixer of one layer in its model.

    Attributes:
        caches: indices of the KV cache groups that the layer writes or reads, ascending.
        fp8_cache: whether keys and values, or latents, are stored in fp8.
        norm: weights [D] of the norm behind the mixer; `eps` belongs to it.
        norm_bias: its bias [D], if it is a LayerNorm; None: it is an RMS norm.
    """

    ops: Ops
    dtype: torch.dtype
    layer: int
    caches: tuple[int, ...]
    fp8_cache: bool
    norm: Tensor
    eps: float
    norm_bias: Tensor | None = None

    def add_norm(self, x_TD: Tensor, delta_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Return the residual sum and its norm, of either kind."""
        return add_norm(self.ops, x_TD, delta_TD, self.norm, self.norm_bias, self.eps)


def add_norm(
    ops: Ops, x_TD: Tensor, delta_TD: Tensor, weight_D: Tensor, bias_D: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Return the residual sum and its RMS norm or, with a bias, its LayerNorm."""
    if bias_D is None:
        return ops.add_rms_norm(x_TD, delta_TD, weight_D, eps)
    return ops.add_layer_norm(x_TD, delta_TD, weight_D, bias_D, eps)


@dataclass(frozen=True, kw_only=True)
class Step:
    """The batch and caches of a step, or of one of its micro-batches, and values that layers share."""

    batch: ForwardBatch
    caches: Sequence[NamedCache]
    tables: Mapping[Rope, tuple[Tensor, Tensor]]
    _shared: dict[Hashable, Any] = field(default_factory=dict)

    def cache(self, number: int, layer: int) -> tuple[AttentionMetadata, tuple[Tensor, ...]]:
        """Return the attention metadata of the model's cache of that number, and a layer's tensors."""
        return self.batch.attention_metadata[number], self.caches[number].layers[layer]

    def states(
        self, numbers: tuple[int, ...], layer: int
    ) -> tuple[StateMetadata, tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Return the metadata of recurrent states, and a layer's tensors in the chunk cache and in the state cache.

        Args:
            numbers: the model's caches of these two kinds, or of the latter alone: then there are no tensors of the former.
        """
        *chunk, state = numbers
        interval, metadata = self.caches[state].tokens_per_block, self.batch.attention_metadata

        def describe() -> StateMetadata:
            blocks_S = metadata[chunk[0]].block_table[:, 0].contiguous() if chunk else None
            return StateMetadata(seqs=metadata[state], interval=interval, chunk_blocks_S=blocks_S)

        states = self.shared(numbers, describe)
        return states, self.caches[chunk[0]].layers[layer] if chunk else (), self.caches[state].layers[layer]

    def rope_inputs(self, rope: Rope, metadata: AttentionMetadata) -> RopeInputs:
        """Return the inputs of an op that rotates by `rope` and writes a cache of this metadata."""
        return RopeInputs(self.tables[rope], self._table_rows(rope), metadata.slot_mapping, rope.interleaved)

    def _table_rows(self, rope: Rope) -> Tensor:
        """Return the tokens' rows of the tables, i64 [T]: with LongRoPE, long requests have rows of their own."""
        scaling, is_long_T, positions_T = rope.scaling, self.batch.is_long_T, self.batch.positions_T
        if not isinstance(scaling, LongRope) or is_long_T is None:
            return positions_T
        return self.shared(scaling, lambda: positions_T + is_long_T * scaling.original_max_position)

    def shared(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """Return the value for `key`, computed by the first layer that asks for it."""
        if key not in self._shared:
            self._shared[key] = compute()
        return self._shared[key]

    def keep(self, layer: int, value: Tensor) -> None:
        """Keep what a layer gives to later ones, for the same tokens."""
        key = "kept", layer
        assert key not in self._shared, f"layer {layer} has given a value already"
        self._shared[key] = value

    def kept(self, layer: int) -> Tensor:
        """Return what an earlier layer has kept."""
        return self._shared["kept", layer]

    def query_scales(self, scaling: QueryScaling) -> Tensor:
        """Return fp32 [T, 1, 1], factors of queries by position."""

        def compute() -> Tensor:
            periods_T = ((self.batch.positions_T + scaling.offset) // scaling.length).float()
            return (1 + scaling.beta * torch.log1p(periods_T))[:, None, None]

        return self.shared(scaling, compute)
