"""Phi-3 and Phi-4-mini: Llama with fused projections, rotary embedding of part of a head, and a sliding window.

Their 128k versions have two lists of rotary factors (LongRoPE). transformers changes to the long one as soon as a sequence is
longer than the original context, although its first tokens have used the other; here, as in vLLM, one list is used throughout:
the long one if `max_model_len` is longer than the original context. `--max-model-len 4096` selects the short one.
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
