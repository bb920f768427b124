"""Mistral 7B, Nemo and Small, and Ministral 3: Llama with a sliding window, or with queries that grow with their position."""

from __future__ import annotations

from dataclasses import replace

from expertwire.engine.config.fields import Fields
from expertwire.engine.models import config_readers
from expertwire.engine.models.family import Family
from expertwire.engine.models.model_config import Layer


def mistral_layers(fields: Fields) -> tuple[Layer, ...]:
    return config_readers.dense(fields, replace(config_readers.attention(fields), window=config_readers.window(fields)))


def ministral3_layers(fields: Fields) -> tuple[Layer, ...]:
    attention = replace(
        config_readers.attention(fields),
        window=config_readers.window(fields),
        query_scaling=config_readers.query_scaling(fields),
    )
    return config_readers.dense(fields, attention)


MISTRAL = Family(layers=mistral_layers)
MINISTRAL3 = Family(layers=ministral3_layers)
