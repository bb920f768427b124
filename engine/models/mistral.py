"""Mistral 7B, Nemo and Small, and Ministral 3: Llama with a sliding window, or with queries that grow with their position."""

from __future__ import annotations

from dataclasses import replace

from expertwire.engine import readers
from expertwire.engine.family import Family
from expertwire.engine.fields import Fields
from expertwire.engine.model_config import Layer


def mistral_layers(fields: Fields) -> tuple[Layer, ...]:
    return readers.dense(fields, replace(readers.attention(fields), window=readers.window(fields)))


def ministral3_layers(fields: Fields) -> tuple[Layer, ...]:
    attention = replace(
        readers.attention(fields), window=readers.window(fields), query_scaling=readers.query_scaling(fields)
    )
    return readers.dense(fields, attention)


MISTRAL = Family(layers=mistral_layers)
MINISTRAL3 = Family(layers=ministral3_layers)
