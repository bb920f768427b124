"""Grouped-query attention, and the norm behind it.

T tokens, D model width, H query heads, G key/value heads, d head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from expertwire.engine.layers import kv_scales
from expertwire.engine.layers.step import LayerContext, Step
from expertwire.engine.loader.layout import Layout, Parameters
from expertwire.engine.models.family import Names
from expertwire.engine.models.model_config import Attention
from expertwire.kernels.ops import attention as kernels
from expertwire.kernels.ops.linear import Linear
from expertwire.kernels.ops.variants import Rope


def declare(layout: Layout, param: str, source: str, config: Attention, names: Names, width: int) -> None:
    """The parameters of a layer whose tensors begin with `source`."""
    sizes, modules = config.qkv_sizes, [source + name for name in names.qkv]
    parts = list(zip(modules, sizes, strict=True)) if len(modules) == len(sizes) else [(modules[0], sum(sizes))]
    layout.matrix(param + "qkv", *parts, columns=width)
    if config.qkv_bias:
        layout.vector(param + "qkv_bias", *((module + ".bias", size) for module, size in parts), fan_in=width)
    layout.matrix(param + "o", (source + names.output, width), columns=sizes[0])
    if config.output_bias:
        layout.vector(param + "o_bias", (source + names.output + ".bias", width), fan_in=width)
    if config.qk_norm in ("head", "row"):
        q_size, k_size, _ = sizes if config.qk_norm == "row" else (config.head_dim,) * 3
        layout.vector(param + "q_norm", (source + "self_attn.q_norm.weight", q_size))
        layout.vector(param + "k_norm", (source + "self_attn.k_norm.weight", k_size))
    if config.sinks:
        layout.vector(param + "sinks", (source + "self_attn.sinks", config.num_heads), fan_in=1)
    layout.ignore(source + "self_attn.rotary_emb.inv_freq")


@dataclass(frozen=True, kw_only=True)
class GroupedQueryAttention:
    """Query, key and value projections are one product; so are the norms of query and key heads. `fused` does all in one call."""

    config: Attention
    context: LayerContext
    rope: Rope  # of size 0 where nothing is rotated
    qkv: Linear
    row_norms: tuple[Tensor, Tensor] | None  # of the whole query's and key's projections, [H * d] and [G * d]
    head_norms: Tensor | None  # [H + G, d]
    sinks: Tensor | None
    kv_scales: Tensor | None  # fp32 [2, G], of an fp8 cache
    output: Linear
    fused: kernels.Fused | None

    def forward(self, x_TD: Tensor, normed_TD: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """x plus the attention of its norm, and the norm of that."""
        c, context, batch = self.config, self.context, step.batch
        [cache] = context.caches
        rows, (k_cache, v_cache) = step.cache(cache, context.layer)
        tables = step.tables[self.rope]
        if self.fused is not None:
            places = tables, batch.positions_T, rows.slot_mapping_T, rows.sequences
            fused = self.fused
            shared = step.shared((self.rope, cache), lambda: fused.step(*places))
            return fused(x_TD, normed_TD, k_cache, v_cache, shared)
        qkv_Thd = self._normed_rows(self.qkv(normed_TD)).unflatten(1, (-1, c.head_dim))
        q_THd = context.ops.rope_and_cache(
            qkv_Thd,
            self.head_norms,
            context.eps,
            tables,
            batch.positions_T,
            rows.slot_mapping_T,
            k_cache,
            v_cache,
            interleaved=self.rope.interleaved,
            kv_scales_2G=self.kv_scales,
        )
        if c.query_scaling is not None:
            q_THd = (q_THd * step.query_scales(c.query_scaling)).to(x_TD.dtype)
        attended_THd = context.ops.attend(
            q_THd,
            k_cache,
            v_cache,
            rows.sequences,
            scale=c.scale,
            window=c.window or 0,
            chunk=c.chunk or 0,
            sinks_H=self.sinks,
            kv_scales_2G=self.kv_scales,
        )
        return context.ops.add_rms_norm(x_TD, self.output(attended_THd.flatten(1)), context.norm, context.eps)

    def _normed_rows(self, qkv_TX: Tensor) -> Tensor:
        if self.row_norms is None:
            return qkv_TX
        q_TX, k_TX, v_TX = qkv_TX.split(self.config.qkv_sizes, dim=1)
        (q_weight, k_weight), rms_norm, eps = self.row_norms, self.context.ops.rms_norm, self.context.eps
        normed = rms_norm(q_TX.contiguous(), q_weight, eps), rms_norm(k_TX.contiguous(), k_weight, eps)
        return torch.cat((*normed, v_TX), dim=1)


def bind(p: Parameters, config: Attention, context: LayerContext) -> GroupedQueryAttention:
    """Of the parameters that `declare` declared."""
    ops, dtype, row_norms, head_norms = context.ops, context.dtype, None, None
    if config.qk_norm == "row":
        row_norms = p.tensor("q_norm"), p.tensor("k_norm")
    elif config.qk_norm != "none":
        head_norms = _head_norms(p, config, context.norm)
    qkv = ops.linear(p.weight("qkv"), p.maybe("qkv_bias"), dtype=dtype)
    output = ops.linear(p.weight("o"), p.maybe("o_bias"), dtype=dtype)
    sinks, rope, fused = p.maybe("sinks"), rope_of(config), None
    scales_2G = kv_scales.bind(p, config.num_kv_heads, context.norm) if context.fp8_cache else None
    if row_norms is None and config.query_scaling is None and not ops.on_device:
        fused = kernels.fuse(
            qkv,
            output,
            head_norms,
            context.norm,
            context.eps,
            config.head_dim,
            interleaved=rope.interleaved,
            scale=config.scale,
            window=config.window or 0,
            chunk=config.chunk or 0,
            sinks_H=sinks,
            kv_scales_2G=scales_2G,
        )
    return GroupedQueryAttention(
        config=config,
        context=context,
        rope=rope,
        qkv=qkv,
        row_norms=row_norms,
        head_norms=head_norms,
        sinks=sinks,
        kv_scales=scales_2G,
        output=output,
        fused=fused,
    )


def rope_of(config: Attention) -> Rope:
    """Of size 0 where nothing is rotated."""
    return config.rope if config.rope is not None else Rope(theta=1.0, size=0)


def _head_norms(p: Parameters, config: Attention, like: Tensor) -> Tensor:
    shapes: Sequence[tuple[str, int]] = (("q_norm", config.num_heads), ("k_norm", config.num_kv_heads))
    if config.qk_norm == "plain":
        return like.new_ones(config.num_heads + config.num_kv_heads, config.head_dim)
    return torch.cat([p.tensor(name).expand(count, -1) for name, count in shapes])
