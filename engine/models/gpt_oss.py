"""gpt-oss: sinks, every other layer a sliding window, biases everywhere, a clamped activation; MXFP4 experts, gate and up rows
alternating."""

from __future__ import annotations

from dataclasses import replace

from expertwire.engine.config.fields import REQUIRED, Fields
from expertwire.engine.models import config_readers
from expertwire.engine.models.family import Family, Names
from expertwire.engine.models.model_config import Layer, Moe
from expertwire.kernels.ops.variants import Activation


def layers(fields: Fields) -> tuple[Layer, ...]:
    num_layers = fields.integer("num_hidden_layers")
    plain, bias = config_readers.attention(fields, default_size=REQUIRED), fields.flag("attention_bias", default=True)
    full = replace(plain, qkv_bias=bias, output_bias=bias, sinks=True)
    sliding = replace(full, window=config_readers.window(fields))
    types = fields.listed("layer_types", num_layers, "full_attention", "sliding_attention")
    slides = [i % 2 == 0 if types is None else types[i] == "sliding_attention" for i in range(num_layers)]
    if any(slides):
        fields.integer("sliding_window")
    moe = _moe(fields)
    return tuple(Layer(attention=sliding if slide else full, mlp=moe) for slide in slides)


def _moe(fields: Fields) -> Moe:
    # A softmax over the logits that were chosen is one over all of them, divided by the sum of those chosen.
    moe = config_readers.moe(fields, "num_local_experts", "num_experts", size="intermediate_size", renormalize=True)
    return replace(
        moe,
        router_bias=True,
        activation=Activation(
            "swiglu_clamped",
            alpha=fields.number("swiglu_alpha", default=1.702),
            limit=fields.number("swiglu_limit", default=7.0),
        ),
        bias=True,
    )


GPT_OSS = Family(layers=layers, names=Names(router="router", fused_layout="columns", pairs=True))
