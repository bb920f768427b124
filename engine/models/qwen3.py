"""Qwen3, dense and with experts: norms of query and key heads; layers of Qwen3-MoE have experts unless the config says no."""

from __future__ import annotations

from dataclasses import replace

from expertwire.engine.models import config_readers, qwen2
from expertwire.engine.models.hf_config import REQUIRED, HfConfig
from expertwire.engine.models.mixer_configs import AttentionConfig
from expertwire.engine.models.model_config import LayerConfig, ModelFamily


def _attention(hf: HfConfig) -> AttentionConfig:
    attention, bias = config_readers.attention(hf, head_dim=REQUIRED), hf.flag("attention_bias")
    return replace(attention, qkv_bias=bias, output_bias=bias, qk_norm="head")


def dense_layers(hf: HfConfig) -> tuple[LayerConfig, ...]:
    return qwen2.layers_with(hf, _attention(hf))


def moe_layers(hf: HfConfig) -> tuple[LayerConfig, ...]:
    num_layers, attention = hf.integer("num_hidden_layers"), _attention(hf)
    if hf.flag("use_sliding_window", default=False):
        attention = replace(attention, window=config_readers.window(hf))
    renormalize = hf.flag("norm_topk_prob")
    moe = config_readers.moe(
        hf, "num_experts", "num_local_experts", size="moe_intermediate_size", renormalize=renormalize
    )
    return config_readers.sparse_layers(hf, [attention] * num_layers, moe)


QWEN3 = ModelFamily(layers=dense_layers)
QWEN3_MOE = ModelFamily(layers=moe_layers)
