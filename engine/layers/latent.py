"""Multi-head latent attention (MLA) of a layer, and the norm behind it.

`kernels.ops.mla` has the mathematics, `kernels.ops.index` that of the sparse variant.

T tokens, D model width, H heads, c latent size, r rotated size, n size without position, v value size, l = c + r, d
index head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from expertwire.engine.layers import kv_scales
from expertwire.engine.layers.step import LayerContext, Step
from expertwire.engine.loader.parameters import LoadedParameters, ParameterLayout
from expertwire.engine.models.mixer_configs import IndexerConfig, LatentAttentionConfig
from expertwire.engine.models.model_config import TensorNames
from expertwire.kernels.formats import dequantize
from expertwire.kernels.ops import attention, mla, rotary
from expertwire.kernels.ops.attention import AttentionMetadata
from expertwire.kernels.ops.heads import PerHead
from expertwire.kernels.ops.linear import Linear

_INDEX_EPS = 1e-6


def declare(
    layout: ParameterLayout, param: str, source: str, config: LatentAttentionConfig, names: TensorNames, width: int
) -> None:
    """Declare the parameters of a layer whose tensors begin with `source`."""
    c, attn = config, source + "self_attn."
    query = c.num_heads * (c.qk_nope_head_dim + c.rope.size)
    if c.q_lora_rank is None:
        layout.matrix(param + "q", (attn + "q_proj", query), columns=width)
    else:
        layout.matrix(param + "q_a", (attn + "q_a_proj", c.q_lora_rank), columns=width)
        layout.vector(param + "q_a_norm", (attn + "q_a_layernorm.weight", c.q_lora_rank))
        layout.matrix(param + "q", (attn + "q_b_proj", query), columns=c.q_lora_rank)
    layout.matrix(param + "kv_a", (attn + "kv_a_proj_with_mqa", c.kv_lora_rank + c.rope.size), columns=width)
    layout.vector(param + "kv_a_norm", (attn + "kv_a_layernorm.weight", c.kv_lora_rank))
    layout.matrix(
        param + "kv_b", (attn + "kv_b_proj", c.num_heads * (c.qk_nope_head_dim + c.v_head_dim)), columns=c.kv_lora_rank
    )
    layout.matrix(param + "o", (source + names.output, width), columns=c.num_heads * c.v_head_dim)
    if c.indexer is not None:
        _declare_indexer(layout, param + "indexer.", attn + "indexer.", c.indexer, c.q_lora_rank or width, width)
    layout.ignore(attn + "rotary_emb.inv_freq")


def _declare_indexer(
    layout: ParameterLayout, param: str, source: str, config: IndexerConfig, query_width: int, width: int
) -> None:
    size = config.head_dim
    layout.matrix(param + "q", (source + "wq_b", config.num_heads * size), columns=query_width)
    layout.matrix(param + "k", (source + "wk", size), columns=width)
    layout.vector(param + "k_norm", (source + "k_norm.weight", size))
    layout.vector(param + "k_norm_bias", (source + "k_norm.bias", size), fan_in=size)
    layout.matrix(param + "weights", (source + "weights_proj", config.num_heads), columns=width)


@dataclass(frozen=True, kw_only=True)
class SparseIndex:
    """Indexer of sparse attention."""

    config: IndexerConfig
    context: LayerContext
    query: Linear
    key: Linear
    norm: tuple[Tensor, Tensor]
    weights: Linear

    def choose(self, query_Tq: Tensor, normed_TD: Tensor, step: Step) -> Tensor:
        """Return i64 [T, top_k], the positions each token attends to; `query_Tq` is the compressed query."""
        c, ops = self.config, self.context.ops
        metadata, (index_cache,) = step.cache(self.context.caches[1], self.context.layer)
        q_THd = self.query(query_Tq).unflatten(1, (c.num_heads, c.head_dim))
        q_THd = ops.rope_and_cache_index(
            q_THd,
            self.key(normed_TD),
            self.norm,
            _INDEX_EPS,
            step.rope_inputs(c.rope, metadata),
            index_cache,
        )
        weights_TH = self.weights(normed_TD).float() * (c.num_heads * c.head_dim) ** -0.5
        return ops.choose_positions(q_THd, weights_TH, index_cache, metadata, c.top_k)


@dataclass(frozen=True, kw_only=True)
class LatentQueryAttention:
    """The attention of one layer.

    Attributes:
        context: its first KV cache group has the latents, the second the index keys.
        compress: the first of two query projections, and its norm.
        absorb: [T, H, n] to [T, H, c].
        value: [T, H, c] to [T, H, v].
        expand: rows [*, c] to [*, H * (n + v)], for prefills in expanded form; None: never expand.
        kv_scale: fp32 [1], of an fp8 cache.
    """

    config: LatentAttentionConfig
    context: LayerContext
    scale: float
    compress: tuple[Linear, Tensor] | None
    query: Linear
    latent: Linear
    latent_norm: Tensor
    absorb: PerHead
    value: PerHead
    expand: Linear | None
    index: SparseIndex | None
    kv_scale: Tensor | None
    output: Linear

    def forward(self, x_TD: Tensor, normed_TD: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """Return the residual sum `x + attention(normed)` and its norm."""
        c, context = self.config, self.context
        metadata, (cache,) = step.cache(context.caches[0], context.layer)
        query_Tq = self._compressed(normed_TD)
        q_THq = self.query(query_Tq).unflatten(1, (c.num_heads, -1))
        plain_THn, rotated_THr = q_THq.split((c.qk_nope_head_dim, c.rope.size), dim=2)
        # Absorbed queries; their rotated and latent parts are written in place.
        q_THl = plain_THn.new_empty(len(plain_THn), c.num_heads, c.kv_lora_rank + c.rope.size)
        rotated_THr = context.ops.rope_and_cache_latent(
            rotated_THr,
            self.latent(normed_TD),
            self.latent_norm,
            c.norm_eps,
            step.rope_inputs(c.rope, metadata),
            cache,
            out=q_THl[..., c.kv_lora_rank :],
            kv_scale=self.kv_scale,
        )
        if c.query_scaling is not None:
            scales = step.query_scales(c.query_scaling)
            plain_THn = (plain_THn * scales).to(x_TD.dtype)
            rotated_THr.copy_(rotated_THr * scales)
        chosen = self.index.choose(query_Tq, normed_TD, step) if self.index is not None else None
        attended_THv = self._attended(plain_THn, q_THl, cache, metadata, chosen)
        return context.add_norm(x_TD, self.output(attended_THv.flatten(1)))

    def _attended(
        self, plain_THn: Tensor, q_THl: Tensor, cache: Tensor, metadata: AttentionMetadata, chosen: Tensor | None
    ) -> Tensor:
        """Return [T, H, v]; q_THl holds the rotated parts, its first c numbers are written here."""
        num = attention.known_decodes(metadata, len(plain_THn))
        if self.expand is None or num is None or num == len(plain_THn):
            return self._absorbed(plain_THn, q_THl, cache, metadata, chosen)
        prefills = attention.prefills(metadata, num)
        if not mla.is_worth_expanding(prefills, len(plain_THn) - num):
            return self._absorbed(plain_THn, q_THl, cache, metadata, chosen)
        prefills_THv = mla.attend_expanded(
            torch.cat((plain_THn[num:], q_THl[num:, :, self.config.kv_lora_rank :]), dim=2),
            cache,
            prefills,
            rank=self.config.kv_lora_rank,
            scale=self.scale,
            expand=self.expand,
            attend=self.context.ops.attend_expanded,
            narrow_values=self.context.ops.on_device,
            kv_scale=self.kv_scale,
        )
        if num == 0:
            return prefills_THv
        decodes_THv = self._absorbed(plain_THn[:num], q_THl[:num], cache, attention.decodes(metadata, num), None)
        return torch.cat((decodes_THv, prefills_THv))

    def _absorbed(
        self, plain_THn: Tensor, q_THl: Tensor, cache: Tensor, metadata: AttentionMetadata, chosen: Tensor | None
    ) -> Tensor:
        rank = self.config.kv_lora_rank
        self.absorb(plain_THn, out=q_THl[..., :rank])
        attended_THc = self.context.ops.attend_latent(
            q_THl, cache, metadata, rank=rank, scale=self.scale, chosen=chosen, kv_scale=self.kv_scale
        )
        return self.value(attended_THc)

    def _compressed(self, normed_TD: Tensor) -> Tensor:
        if self.compress is None:
            return normed_TD
        project, norm = self.compress
        return self.context.ops.rms_norm(project(normed_TD), norm, self.config.norm_eps)


def bind(p: LoadedParameters, config: LatentAttentionConfig, context: LayerContext) -> LatentQueryAttention:
    """Return the layer of the parameters that `declare` declared."""
    c, ops, dtype, compress, index = config, context.ops, context.dtype, None, None
    if c.q_lora_rank is not None:
        compress = ops.linear(p.weight("q_a"), dtype=dtype), p.tensor("q_a_norm")
    kv_b_Hxc = dequantize(p.weight("kv_b"), dtype).unflatten(0, (c.num_heads, -1))
    key_Hnc, value_Hvc = kv_b_Hxc.split((c.qk_nope_head_dim, c.v_head_dim), dim=1)
    expand = ops.linear(kv_b_Hxc.flatten(0, 1), dtype=dtype) if ops.fast and c.indexer is None else None
    if c.indexer is not None:
        index = _bind_indexer(p.within("indexer."), c.indexer, context)
    return LatentQueryAttention(
        config=config,
        context=context,
        scale=c.scale or rotary.softmax_scale(c.qk_nope_head_dim + c.rope.size, c.rope.scaling),
        compress=compress,
        query=ops.linear(p.weight("q"), dtype=dtype),
        latent=ops.linear(p.weight("kv_a"), dtype=dtype),
        latent_norm=p.tensor("kv_a_norm"),
        absorb=ops.linear_per_head(key_Hnc.transpose(1, 2).contiguous()),
        value=ops.linear_per_head(value_Hvc.contiguous()),
        expand=expand,
        index=index,
        kv_scale=kv_scales.bind(p, 1, context.norm)[0] if context.fp8_cache else None,
        output=ops.linear(p.weight("o"), dtype=dtype),
    )


def _bind_indexer(p: LoadedParameters, config: IndexerConfig, context: LayerContext) -> SparseIndex:
    assert len(context.caches) == 2, f"layer {context.layer} has an indexer, and caches {context.caches}"
    query, key, weights = (context.ops.linear(p.weight(name), dtype=context.dtype) for name in ("q", "k", "weights"))
    norm = p.tensor("k_norm"), p.tensor("k_norm_bias")
    return SparseIndex(config=config, context=context, query=query, key=key, norm=norm, weights=weights)
