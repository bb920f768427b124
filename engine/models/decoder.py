"""Decoder of all model families: layers of attention and an MLP or a mixture of experts, as the config describes.

A family's file in `engine.models` describes its layers and the names of its checkpoints' tensors. Life of a model:
layers declare parameters in a `ParameterLayout`; the loader fills them; `bind` prepares them for the kernels; then
`forward` and `logits`.

T tokens of this rank, O sampled rows, D model width, L layers, V vocabulary, E logical experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from expertwire.engine.kv_cache import caches as named_caches
from expertwire.engine.kv_cache.caches import NamedCache
from expertwire.engine.layers import attention, head, mixers, mlp
from expertwire.engine.layers.mixers import MixerLayer
from expertwire.engine.layers.step import LayerContext, RankContext, Step, add_norm
from expertwire.engine.loader.checkpoint import StoredTensor
from expertwire.engine.loader.parameters import LoadedParameters
from expertwire.engine.models.decoder_parameters import declare_parameters, norm_names
from expertwire.engine.models.mixer_configs import (
    AttentionConfig,
    DifferentialAttentionConfig,
    LatentAttentionConfig,
    Mixer,
)
from expertwire.engine.models.model_config import MlpConfig, ModelConfig, MoeConfig
from expertwire.engine.runner.batch import ForwardBatch
from expertwire.kernels.formats import Weight, quantize_experts
from expertwire.kernels.ops import rotary
from expertwire.kernels.ops.attention import FP8
from expertwire.kernels.ops.experts import GroupedMlpWeights
from expertwire.kernels.ops.variants import Rope
from expertwire.moe import layer as moe_layer
from expertwire.moe.layer import MoeLayer
from expertwire.moe.micro_batch import MicroBatch, interleave
from expertwire.scheduler.config import CacheSpec

Params = dict[str, Tensor]
Norm = tuple[Tensor, Tensor | None]  # weights, and the bias of a LayerNorm


class MlpLayer(Protocol):
    """A dense layer's second half."""

    def __call__(self, x_TD: Tensor, normed_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Return the residual sum `x + mlp(normed)` and its norm."""
        ...


class Model(Protocol):
    """The interface between a model and the runner."""

    def forward(self, batches: Sequence[ForwardBatch], caches: Sequence[NamedCache]) -> Tensor:
        """Return hidden states [T, D] after the last norm, of a step's micro-batches in order; write the caches.

        A micro-batch may attend to what earlier ones write. All ranks call this together, with equally many
        micro-batches.
        """
        ...

    def logits(self, x_OD: Tensor) -> Tensor:
        """Return fp32 [O, V] for any rows of hidden states; of a model with labels their scores."""
        ...

    def allocate(self, *, num_blocks: Sequence[int], block_size: int, max_model_len: int) -> list[NamedCache]:
        """Return the KV cache groups of `ModelConfig.cache_specs`; called once, before `forward`."""
        ...


@dataclass(frozen=True, kw_only=True)
class DecoderLayer:
    """Pre-norm residual layer: a mixer, then an MLP or a mixture of experts; any may be missing."""

    mixer: MixerLayer | None
    mlp: MlpLayer | None
    moe: MoeLayer | None


class Decoder:
    """A decoder on one rank.

    Args:
        config: of the model.
        context: of the rank.
        stored: the checkpoint's tensors, whose names and shapes show its formats; None: random weights.
        quantize: format for unquantised experts: "fp8", "int4" or "mxfp4"; None: unchanged.
    """

    def __init__(
        self,
        config: ModelConfig,
        context: RankContext,
        stored: Mapping[str, StoredTensor] | None = None,
        quantize: str | None = None,
    ) -> None:
        self.config, self.context = config, context
        self.layers: list[DecoderLayer] = []
        self.layout = declare_parameters(config, stored, self._experts_here)
        self._quantize = quantize
        self._tables: dict[Rope, tuple[Tensor, Tensor]] = {}

    # ---- parameters

    def _experts_here(self, i: int) -> tuple[int, ...]:
        assert self.context.placement is not None, f"{self.config.architecture} has experts but no placement"
        return self.context.placement.experts_of(self.context.rank, i)

    # ---- binding

    def bind(self, params: Params) -> None:
        """Prepare `params` for the kernels; empty the dictionary, so that at most one parameter is held twice."""
        c, ops, p = self.config, self.context.ops, self.layout.loaded(params)
        self._embed = p.tensor("embed")
        self._head = head.bind(p, c, self._embed, ops, self.context.dtype)
        # Each half of a layer ends with the norm of the half after it.
        norms = [(p.tensor(name), p.maybe(name + "_bias")) for name in norm_names(c)]
        self._first_norm, behind = norms[0], iter(norms[1:])
        for i in range(c.num_layers):
            self.layers.append(self._bind_layer(i, p.within(f"layers.{i}."), behind))
        assert not p.rest(), f"parameters that no layer took: {p.rest()}"

    def _bind_layer(self, i: int, p: LoadedParameters, norms: Iterator[Norm]) -> DecoderLayer:
        """Bind a layer; `norms`: behind this half of a layer, and those that follow."""
        layer, mix, dense, moe = self.config.layers[i], None, None, None
        if layer.mixer is not None:
            mix = self._bind_mixer(i, p, layer.mixer, next(norms))
        if isinstance(layer.mlp, MlpConfig):
            dense = self._dense(p, layer.mlp, next(norms))
        elif layer.mlp is not None:
            moe = self._bind_moe(i, p, layer.mlp, next(norms))
        return DecoderLayer(mixer=mix, mlp=dense, moe=moe)

    def _bind_mixer(self, i: int, p: LoadedParameters, config: Mixer, norm: Norm) -> MixerLayer:
        context = LayerContext(
            ops=self.context.ops,
            dtype=self.context.dtype,
            layer=i,
            caches=tuple(number for number, spec in enumerate(self.config.cache_specs()) if i in spec.readers),
            fp8_cache=self.config.kv_cache_dtype == "fp8",
            norm=norm[0],
            eps=self.config.rms_norm_eps,
            norm_bias=norm[1],
        )
        return mixers.bind(p, config, context)

    def _dense(self, p: LoadedParameters, config: MlpConfig, next_norm: Norm) -> MlpLayer:
        ops, eps = self.context.ops, self.config.rms_norm_eps
        dense = mlp.bind(p, config, ops, self.context.dtype)

        def apply(x_TD: Tensor, normed_TD: Tensor) -> tuple[Tensor, Tensor]:
            return add_norm(ops, x_TD, dense(normed_TD), *next_norm, eps)

        return apply

    def _bind_moe(self, i: int, p: LoadedParameters, moe: MoeConfig, next_norm: Norm) -> MoeLayer:
        context = self.context
        assert context.placement is not None
        assert next_norm[1] is None, f"layer {i}: LayerNorm behind experts"
        assert context.all_to_alls, f"{self.config.architecture} has experts but no all-to-all"
        shared = latent = None
        if moe.shared_intermediate_size:
            config = MlpConfig(intermediate_size=moe.shared_intermediate_size, activation=moe.activation)
            gate = context.ops.linear(p.weight("shared.gate"), dtype=context.dtype) if moe.shared_gate else None
            shared = mlp.bind(p.within("shared."), config, context.ops, context.dtype, gate)
        if moe.latent_size:
            down, up = (context.ops.linear(p.weight(name), dtype=context.dtype) for name in ("latent_in", "latent_out"))
            latent = down, up
        experts = GroupedMlpWeights(
            self._experts(p, "w13", moe.w13_parts),
            self._experts(p, "w2", (moe.latent_size or self.config.hidden_size,)),
            moe.activation,
            p.maybe("w13_bias"),
            p.maybe("w2_bias"),
        )
        return moe_layer.prepare(
            p.tensor("router"),
            experts,
            next_norm[0],
            ops=context.ops,
            routing=moe,
            router_bias=p.maybe("router_bias"),
            choice_bias=p.maybe("choice_bias"),
            eps=self.config.rms_norm_eps,
            placement=context.placement,
            rank=context.rank,
            all_to_alls=context.all_to_alls,
            shared=shared,
            latent=latent,
            layer=i,
            exchange_tokens=context.exchange_tokens,
        )

    def _experts(self, p: LoadedParameters, name: str, parts: tuple[int, ...]) -> Weight:
        weight = p.weight(name)
        if self._quantize is None or not isinstance(weight, Tensor):
            return weight
        return quantize_experts(weight, self._quantize, parts)

    # ---- running

    def allocate(self, *, num_blocks: Sequence[int], block_size: int, max_model_len: int) -> list[NamedCache]:
        """As `Model.allocate`."""
        device = self.context.device
        for rope in self._ropes():
            self._tables[rope] = rotary.tables(max_model_len, rope, device)
        specs = self.config.cache_specs()
        return [
            named_caches.make(spec, num, block_size, {i: self._cache_tensors(spec, i) for i in spec.writers}, device)
            for spec, num in zip(specs, num_blocks, strict=True)
        ]

    def _cache_tensors(self, spec: CacheSpec, layer: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Return shape and dtype of each tensor that a layer keeps in a cache."""
        config, found = self.config, []
        mixer = config.layers[layer].mixer
        assert mixer is not None, f"layer {layer} has no mixer, and writes the cache {spec.name}"
        for shape, name in mixer.cache_tensors[spec.kind]:
            dtype = config.cache_dtype(spec.kind, name)
            found.append((shape, FP8 if dtype == "fp8" else getattr(torch, dtype)))
        return found

    def _ropes(self) -> set[Rope]:
        ropes = set()
        for layer in self.config.layers:
            if isinstance(layer.mixer, AttentionConfig):
                ropes.add(attention.rope_of(layer.mixer))
            elif isinstance(layer.mixer, DifferentialAttentionConfig):
                ropes.add(attention.NO_ROPE)
            elif isinstance(layer.mixer, LatentAttentionConfig):
                ropes.add(layer.mixer.rope)
                if layer.mixer.indexer is not None:
                    ropes.add(layer.mixer.indexer.rope)
        return ropes

    def forward(self, batches: Sequence[ForwardBatch], caches: Sequence[NamedCache]) -> Tensor:
        """As `Model.forward`."""
        outputs = interleave([self._micro_batch(i, batch, caches) for i, batch in enumerate(batches)])
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _micro_batch(self, number: int, batch: ForwardBatch, caches: Sequence[NamedCache]) -> MicroBatch[Tensor]:
        step = Step(batch=batch, caches=caches, tables=self._tables)
        # On a CPU an index between brackets divides even 30 rows among torch's threads, and waits for them.
        x_TD = self._embed.index_select(0, batch.token_ids_T)
        if self.config.embedding_scale != 1:
            x_TD = x_TD * self.config.embedding_scale
        normed_TD = self._norm_first(x_TD)
        for i, layer in enumerate(self.layers):
            self.context.beat()
            if layer.mixer is not None:
                x_TD, normed_TD = layer.mixer(x_TD, normed_TD, step)
            if layer.moe is not None:
                on_routed = None if batch.on_routed is None else partial(batch.on_routed, i)
                x_TD, normed_TD = yield from layer.moe.micro_batch(
                    x_TD, normed_TD, batch.num_tokens_P, number, on_routed, batch.num_valid
                )
            elif layer.mlp is not None:
                x_TD, normed_TD = layer.mlp(x_TD, normed_TD)
        return normed_TD

    def _norm_first(self, x_TD: Tensor) -> Tensor:
        (weight_D, bias_D), ops, eps = self._first_norm, self.context.ops, self.config.rms_norm_eps
        if bias_D is None:
            return ops.rms_norm(x_TD, weight_D, eps)
        return ops.layer_norm(x_TD, weight_D, bias_D, eps)

    def logits(self, x_OD: Tensor) -> Tensor:
        """As `Model.logits`."""
        return self._head(x_OD)

    def run_experts_alone(self) -> None:
        """Run the first sparse layer's experts, if there are any, without other ranks; see `MoeLayer.run_experts_alone`."""
        first = next((layer.moe for layer in self.layers if layer.moe is not None), None)
        if first is not None:
            first.run_experts_alone()

    def take_expert_load(self) -> Tensor:
        """Return i64 [L * E], this rank's routed rows of each expert since the last call; 0 in dense layers. It is on the model's
        device, so that nobody has to wait for it."""
        counted = {i: torch.as_tensor(layer.moe.load_E) for i, layer in enumerate(self.layers) if layer.moe is not None}
        none_E = torch.zeros(self.config.num_experts, dtype=torch.int64, device=self.context.device)
        load_LE = torch.stack([counted.get(i, none_E) for i in range(self.config.num_layers)])
        for load_E in counted.values():
            load_E.zero_()
        return load_LE.view(-1)
