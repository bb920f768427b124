"""Llama 2 and 3: dense, without biases; Llama 3.1 scales its rotary frequencies (`rope_type` llama3)."""

from __future__ import annotations

from expertwire.engine.models import config_readers
from expertwire.engine.models.hf_config import HfConfig
from expertwire.engine.models.model_config import LayerConfig, ModelFamily


def layers(hf: HfConfig) -> tuple[LayerConfig, ...]:
    config_readers.no_biases(hf, "attention_bias", "mlp_bias")
    return config_readers.dense(hf, config_readers.attention(hf))


LLAMA = ModelFamily(layers=layers)
