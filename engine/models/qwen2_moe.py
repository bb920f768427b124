"""Qwen1.5-MoE and Qwen2-MoE: biases of queries, keys and values; a gated shared expert; weights are not renormalized."""

from __future__ import annotations

from dataclasses import replace

from expertwire.engine.models import config_readers, qwen3_next
from expertwire.engine.models.hf_config import HfConfig
from expertwire.engine.models.model_config import LayerConfig, ModelFamily, TensorNames


def layers(hf: HfConfig) -> tuple[LayerConfig, ...]:
    # The published code and transformers 5 disagree on which layers would slide.
    hf.one_of("use_sliding_window", False, default=False)
    attention = replace(config_readers.attention(hf), qkv_bias=hf.flag("qkv_bias", default=True))
    moe = qwen3_next.experts(hf, renormalize=hf.flag("norm_topk_prob"))
    return config_readers.sparse_layers(hf, [attention] * hf.integer("num_hidden_layers"), moe)


QWEN2_MOE = ModelFamily(layers=layers, names=TensorNames(shared="shared_expert."))
