"""Qwen3, dense and with experts: norms on query and key heads. Layers of Qwen3-MoE are mixtures unless the config says no."""

from __future__ import annotations

from dataclasses import replace

from expertwire.engine.config.fields import REQUIRED, Fields
from expertwire.engine.models import config_readers
from expertwire.engine.models.family import Family
from expertwire.engine.models.model_config import Attention, Layer, Mlp


def _attention(fields: Fields) -> Attention:
    attention, bias = config_readers.attention(fields, default_size=REQUIRED), fields.flag("attention_bias")
    return replace(attention, qkv_bias=bias, output_bias=bias, qk_norm="head")


def dense_layers(fields: Fields) -> tuple[Layer, ...]:
    num_layers, attention = fields.integer("num_hidden_layers"), _attention(fields)
    mlp = Mlp(size=fields.integer("intermediate_size"))
    slides = [False] * num_layers
    if fields.flag("use_sliding_window", default=False):
        types = fields.listed("layer_types", num_layers, "full_attention", "sliding_attention")
        # Without a list, the layers from max_window_layers on slide.
        first = fields.integer("max_window_layers", low=0) if types is None else num_layers
        slides = [i >= first if types is None else types[i] == "sliding_attention" for i in range(num_layers)]
    sliding = replace(attention, window=config_readers.window(fields)) if any(slides) else attention
    return tuple(Layer(attention=sliding if slide else attention, mlp=mlp) for slide in slides)


def moe_layers(fields: Fields) -> tuple[Layer, ...]:
    num_layers, attention = fields.integer("num_hidden_layers"), _attention(fields)
    if fields.flag("use_sliding_window", default=False):
        attention = replace(attention, window=config_readers.window(fields))
    step, dense = fields.integer("decoder_sparse_step"), fields.layers("mlp_only_layers", num_layers) or []
    mlp = Mlp(size=fields.integer("intermediate_size"))
    renormalize = fields.flag("norm_topk_prob")
    moe = config_readers.moe(
        fields, "num_experts", "num_local_experts", size="moe_intermediate_size", renormalize=renormalize
    )
    return tuple(
        Layer(attention=attention, mlp=moe if i not in dense and (i + 1) % step == 0 else mlp)
        for i in range(num_layers)
    )


QWEN3 = Family(layers=dense_layers)
QWEN3_MOE = Family(layers=moe_layers)
