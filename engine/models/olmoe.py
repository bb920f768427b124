"""OLMoE: norms over the whole query and key; the weights of the chosen experts are not renormalized."""

from __future__ import annotations

from dataclasses import replace

from expertwire.engine.models import config_readers
from expertwire.engine.models.hf_config import HfConfig
from expertwire.engine.models.model_config import LayerConfig, ModelFamily


def layers(hf: HfConfig) -> tuple[LayerConfig, ...]:
    if hf.get("clip_qkv") is not None:
        raise hf.error(f"clip_qkv must be null, got {hf.get('clip_qkv')!r}")
    bias = hf.flag("attention_bias", default=False)
    attention = replace(config_readers.attention(hf), qkv_bias=bias, output_bias=bias, qk_norm="row")
    renormalize = hf.flag("norm_topk_prob")
    moe = config_readers.moe(hf, "num_experts", "num_local_experts", size="intermediate_size", renormalize=renormalize)
    return (LayerConfig(mixer=attention, mlp=moe),) * hf.integer("num_hidden_layers")


OLMOE = ModelFamily(layers=layers)
