"""Phi-3 and Phi-4-mini: Llama with fused projections, rotary embedding of part of a head, and a sliding window.

Their 128k versions have two lists of rotary factors (LongRoPE). As in transformers, and unlike in vLLM, where the length that is
served decides for all, each request has its own: the long one if prompt and `max_tokens` do not fit the original context
(`scheduler.admission.is_long`). A request that may outgrow that context has the long list from its first token on; one without
`max_tokens` has the short one until it does, and is then computed anew with the long one, as transformers' `generate` does.
"""

from __future__ import annotations

from dataclasses import replace

from expertwire.engine.models import config_readers
from expertwire.engine.models.hf_config import HfConfig
from expertwire.engine.models.model_config import LayerConfig, ModelFamily, TensorNames


def layers(hf: HfConfig) -> tuple[LayerConfig, ...]:
    config_readers.no_biases(hf, "attention_bias", "mlp_bias", "lm_head_bias")
    return config_readers.dense(hf, replace(config_readers.attention(hf), window=config_readers.window(hf)))


PHI3 = ModelFamily(layers=layers, names=TensorNames(qkv=("self_attn.qkv_proj",), gate_up="gate_up_proj"))
