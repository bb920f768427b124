"""Grouped-query attention of a layer, and the norm behind it.

T tokens, D model width, H query heads, G key/value heads, d head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from expertwire.engine.layers import kv_scales
from expertwire.engine.layers.step import LayerContext, Step
from expertwire.engine.loader.parameters import LoadedParameters, ParameterLayout
from expertwire.engine.models.mixer_configs import AttentionConfig
from expertwire.engine.models.model_config import TensorNames
from expertwire.kernels.ops.attention import AttentionOptions
from expertwire.kernels.ops.attention_block import AttentionBlock, AttentionInputs, AttentionWeights
from expertwire.kernels.ops.variants import Rope

NO_ROPE = Rope(theta=1.0, size=0)


def declare(
    layout: ParameterLayout, param: str, source: str, config: AttentionConfig, names: TensorNames, width: int
) -> None:
    """Declare the parameters of a layer whose tensors begin with `source`."""
    sizes, modules = config.qkv_sizes, [source + name for name in names.qkv]
    parts = list(zip(modules, sizes, strict=True)) if len(modules) == len(sizes) else [(modules[0], sum(sizes))]
    layout.matrix(param + "qkv", *parts, columns=width)
    if config.qkv_bias:
        layout.vector(param + "qkv_bias", *((module + ".bias", size) for module, size in parts), fan_in=width)
    layout.matrix(param + "o", (source + names.output, width), columns=config.num_heads * config.head_dim)
    if config.output_bias:
        layout.vector(param + "o_bias", (source + names.output + ".bias", width), fan_in=width)
    if config.qk_norm in ("head", "row"):
        q_size, k_size, _ = sizes if config.qk_norm == "row" else (config.head_dim,) * 3
        layout.norm(param + "q_norm", (source + "self_attn.q_norm.weight", q_size))
        layout.norm(param + "k_norm", (source + "self_attn.k_norm.weight", k_size))
    if config.sinks:
        layout.vector(param + "sinks", (source + "self_attn.sinks", config.num_heads), fan_in=1)
    layout.ignore(source + "self_attn.rotary_emb.inv_freq")


@dataclass(frozen=True, kw_only=True)
class GroupedQueryAttention:
    """The attention of one layer; `rope` has size 0 in layers without rotary embedding."""

    config: AttentionConfig
    context: LayerContext
    rope: Rope
    block: AttentionBlock

    def forward(self, x_TD: Tensor, normed_TD: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """Return the residual sum `x + attention(normed)` and its norm."""
        [cache] = self.context.caches
        metadata, (k_cache, v_cache) = step.cache(cache, self.context.layer)
        scaling = self.config.query_scaling

        def inputs() -> AttentionInputs:
            return AttentionInputs(
                rope=step.rope_inputs(self.rope, metadata),
                metadata=metadata,
                query_scales_T11=None if scaling is None else step.query_scales(scaling),
            )

        return self.block(x_TD, normed_TD, k_cache, v_cache, step.shared((self.rope, cache, scaling), inputs))


def bind(p: LoadedParameters, config: AttentionConfig, context: LayerContext) -> GroupedQueryAttention:
    """Return the layer of the parameters that `declare` declared."""
    assert context.norm_bias is None, f"layer {context.layer}: LayerNorm behind {config}"
    ops, rope = context.ops, rope_of(config)
    weights = AttentionWeights(
        qkv=ops.linear(p.weight("qkv"), p.maybe("qkv_bias"), dtype=context.dtype),
        output=ops.linear(p.weight("o"), p.maybe("o_bias"), dtype=context.dtype),
        norm_D=context.norm,
        eps=context.eps,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        gated=config.gated,
        row_norms=(p.tensor("q_norm"), p.tensor("k_norm")) if config.qk_norm == "row" else None,
        head_norms_hd=_head_norms(p, config, context.norm) if config.qk_norm in ("head", "plain") else None,
        options=AttentionOptions(
            scale=config.scale,
            window=config.window or 0,
            chunk=config.chunk or 0,
            sinks_H=p.maybe("sinks"),
            kv_scales_2G=kv_scales.bind(p, config.num_kv_heads, context.norm) if context.fp8_cache else None,
        ),
    )
    block = ops.attention_block(weights, scales_queries=config.query_scaling is not None)
    return GroupedQueryAttention(config=config, context=context, rope=rope, block=block)


def rope_of(config: AttentionConfig) -> Rope:
    """Return the rotary embedding, of size 0 where nothing is rotated."""
    return config.rope if config.rope is not None else NO_ROPE


def _head_norms(p: LoadedParameters, config: AttentionConfig, like: Tensor) -> Tensor:
    shapes: Sequence[tuple[str, int]] = (("q_norm", config.num_heads), ("k_norm", config.num_kv_heads))
    if config.qk_norm == "plain":
        return like.new_ones(config.num_heads + config.num_kv_heads, config.head_dim)
    return torch.cat([p.tensor(name).expand(count, -1) for name, count in shapes])
