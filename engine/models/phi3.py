"""Phi-3 and Phi-4-mini: Llama with its projections stored in one, part of a head rotated, and a sliding window.

Their 128k versions have two lists of rotary factors (LongRoPE). transformers takes the long one as soon as a sequence is longer
than the original context, though its first tokens were rotated by the other; here, as in vLLM, one list serves all: the long one
if `max_model_len` is longer than that. `--max-model-len 4096` gives the short one.
"""

from __future__ import annotations

from dataclasses import replace

from expertwire.engine.config.fields import Fields
from expertwire.engine.models import config_readers
from expertwire.engine.models.family import Family, Names
from expertwire.engine.models.model_config import Layer


def layers(fields: Fields) -> tuple[Layer, ...]:
    config_readers.no_biases(fields, "attention_bias", "mlp_bias", "lm_head_bias")
    return config_readers.dense(fields, replace(config_readers.attention(fields), window=config_readers.window(fields)))


PHI3 = Family(layers=layers, names=Names(qkv=("self_attn.qkv_proj",), gate_up="gate_up_proj"))
