"""Differential attention of a layer, and the norm behind it.

Heads 2j and 2j + 1 are pair j, of queries, keys and values alike; a and b are a pair's two heads, [a | b] both side by side:

    o = softmax(q_a k_a^T / sqrt(d)) [v_a | v_b] - lambda softmax(q_b k_b^T / sqrt(d)) [v_a | v_b]
    output = output_proj((1 - lambda_init) rms_norm(o))
    lambda = exp(lambda_q1 . lambda_k1) - exp(lambda_q2 . lambda_k2) + lambda_init

Ye et al., "Differential Transformer" (2024). The cache keeps a pair as one head of 2d numbers, and its two queries are
[q_a | 0] and [0 | q_b]: the zeros add nothing to a score, so this is grouped-query attention, by the same op as any other.

T tokens, D width of rows, H query heads, J pairs of query heads, d head size, p = 2d.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from expertwire.engine.layers import kv_scales
from expertwire.engine.layers.attention import NO_ROPE
from expertwire.engine.layers.step import LayerContext, Step
from expertwire.engine.loader.parameters import LoadedParameters, ParameterLayout
from expertwire.engine.models.mixer_configs import DifferentialAttentionConfig
from expertwire.engine.models.model_config import TensorNames
from expertwire.kernels.ops.attention import AttentionOptions
from expertwire.kernels.ops.linear import Linear

_LAMBDAS = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")


def declare(
    layout: ParameterLayout,
    param: str,
    source: str,
    config: DifferentialAttentionConfig,
    names: TensorNames,
    width: int,
) -> None:
    """Declare the parameters of a layer whose tensors begin with `source`; one module holds all of its projections."""
    [module], sizes, inner = names.qkv, config.qkv_sizes, source + names.attention + "inner_cross_attn."
    layout.matrix(param + "qkv", (source + module, sum(sizes)), columns=width)
    layout.vector(param + "qkv_bias", (source + module + ".bias", sum(sizes)), fan_in=width)
    layout.matrix(param + "o", (source + names.output, width), columns=sizes[0])
    layout.vector(param + "o_bias", (source + names.output + ".bias", width), fan_in=width)
    for name in _LAMBDAS:
        layout.vector(param + name, (inner + name, config.head_dim), fan_in=config.head_dim, dtype=torch.float32)
    layout.vector(param + "subln", (inner + "subln.weight", 2 * config.head_dim), dtype=torch.float32)


@dataclass(frozen=True, kw_only=True)
class DifferentialAttention:
    """The attention of one layer.

    Attributes:
        lambda_full: fp32, no dimensions.
        norm_p: fp32, weights of the norm, times 1 - lambda_init.
    """

    config: DifferentialAttentionConfig
    context: LayerContext
    options: AttentionOptions
    qkv: Linear
    output: Linear
    lambda_full: Tensor
    norm_p: Tensor

    def forward(self, x_TD: Tensor, normed_TD: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """Return the residual sum `x + attention(normed)` and its norm."""
        c, ops = self.config, self.context.ops
        [cache] = self.context.caches
        metadata, (k_cache, v_cache) = step.cache(cache, self.context.layer if c.kv_layer is None else c.kv_layer)
        q_TJp = self.qkv(normed_TD).unflatten(1, (-1, 2 * c.head_dim))
        if c.kv_layer is None:
            rope, scales = step.rope_inputs(NO_ROPE, metadata), self.options.kv_scales_2G
            q_TJp = ops.rope_and_cache(q_TJp, None, c.norm_eps, rope, k_cache, v_cache, scales)
        attended_THp = ops.attend(_apart(q_TJp), k_cache, v_cache, metadata, self.options)
        a_TJp, b_TJp = attended_THp.float().unflatten(1, (-1, 2)).unbind(2)
        # In fp32, and product and difference each rounded, whatever the batch.
        scaled_TJp = self.lambda_full * b_TJp
        pairs = ops.rms_norm((a_TJp - scaled_TJp).flatten(0, 1), self.norm_p, c.norm_eps)
        rows_TD = pairs.to(x_TD.dtype).view(len(x_TD), a_TJp.shape[1] * a_TJp.shape[2])
        return self.context.add_norm(x_TD, self.output(rows_TD))


def _apart(q_TJp: Tensor) -> Tensor:
    """Return queries [T, H, p]: the two of each pair, each with zeros in the other's place."""
    size = q_TJp.shape[2] // 2
    q_TJ2p = q_TJp.new_zeros(*q_TJp.shape[:2], 2, 2 * size)
    q_TJ2p[:, :, 0, :size] = q_TJp[..., :size]
    q_TJ2p[:, :, 1, size:] = q_TJp[..., size:]
    return q_TJ2p.flatten(1, 2)


def bind(p: LoadedParameters, config: DifferentialAttentionConfig, context: LayerContext) -> DifferentialAttention:
    """Return the layer of the parameters that `declare` declared."""
    linear, c = context.ops.linear, config
    q1, k1, q2, k2 = (p.tensor(name) for name in _LAMBDAS)
    pairs = c.num_kv_heads // 2
    return DifferentialAttention(
        config=config,
        context=context,
        options=AttentionOptions(
            scale=c.head_dim**-0.5,
            window=c.window or 0,
            kv_scales_2G=kv_scales.bind(p, pairs, context.norm) if context.fp8_cache else None,
        ),
        qkv=linear(p.weight("qkv"), p.tensor("qkv_bias"), dtype=context.dtype),
        output=linear(p.weight("o"), p.tensor("o_bias"), dtype=context.dtype),
        lambda_full=(q1 * k1).sum().exp() - (q2 * k2).sum().exp() + c.lambda_init,
        norm_p=p.tensor("subln") * (1 - c.lambda_init),
    )
