"""Llama 2 and 3: the plain dense decoder, without biases; Llama 3.1 scales its rotary frequencies (`rope_type` llama3)."""

from __future__ import annotations

from expertwire.engine.config.fields import Fields
from expertwire.engine.models import config_readers
from expertwire.engine.models.family import Family
from expertwire.engine.models.model_config import Layer


def layers(fields: Fields) -> tuple[Layer, ...]:
    config_readers.no_biases(fields, "attention_bias", "mlp_bias")
    return config_readers.dense(fields, config_readers.attention(fields))


LLAMA = Family(layers=layers)
