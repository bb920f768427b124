"""gpt-oss: attention sinks, a sliding window in every other layer, biases everywhere, a clamped activation, and MXFP4 experts
whose gate and up rows alternate."""

from __future__ import annotations

from dataclasses import replace

from expertwire.engine.models import config_readers
from expertwire.engine.models.hf_config import REQUIRED, HfConfig
from expertwire.engine.models.model_config import LayerConfig, ModelFamily, MoeConfig, TensorNames
from expertwire.kernels.ops.variants import Activation


def layers(hf: HfConfig) -> tuple[LayerConfig, ...]:
    num_layers = hf.integer("num_hidden_layers")
    plain, bias = config_readers.attention(hf, head_dim=REQUIRED), hf.flag("attention_bias", default=True)
    full = replace(plain, qkv_bias=bias, output_bias=bias, sinks=True)
    sliding = replace(full, window=config_readers.window(hf))
    types = hf.choices("layer_types", num_layers, "full_attention", "sliding_attention")
    slides = [i % 2 == 0 if types is None else types[i] == "sliding_attention" for i in range(num_layers)]
    if any(slides):
        hf.integer("sliding_window")
    moe = _moe(hf)
    return tuple(LayerConfig(mixer=sliding if slide else full, mlp=moe) for slide in slides)


def _moe(hf: HfConfig) -> MoeConfig:
    # A softmax over the chosen logits equals a softmax over all of them, renormalized.
    moe = config_readers.moe(hf, "num_local_experts", "num_experts", size="intermediate_size", renormalize=True)
    return replace(
        moe,
        router_bias=True,
        activation=Activation(
            "swiglu_clamped",
            alpha=hf.number("swiglu_alpha", default=1.702),
            limit=hf.number("swiglu_limit", default=7.0),
        ),
        bias=True,
    )


GPT_OSS = ModelFamily(layers=layers, names=TensorNames(router="router", fused_layout="columns", interleaved=True))
