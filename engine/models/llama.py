"""Llama 2 and 3: the plain dense decoder, without biases; Llama 3.1 scales its rotary frequencies (`rope_type` llama3)."""

from __future__ import annotations

from expertwire.engine import readers
from expertwire.engine.family import Family
from expertwire.engine.fields import Fields
from expertwire.engine.model_config import Layer


def layers(fields: Fields) -> tuple[Layer, ...]:
    readers.no_biases(fields, "attention_bias", "mlp_bias")
    return readers.dense(fields, readers.attention(fields))


LLAMA = Family(layers=layers)
