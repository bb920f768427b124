"""Mistral 7B, Nemo and Small, and Ministral 3: Llama with a sliding window, or with queries scaled by position."""

from __future__ import annotations

from dataclasses import replace

from expertwire.engine.models import config_readers
from expertwire.engine.models.hf_config import HfConfig
from expertwire.engine.models.model_config import LayerConfig, ModelFamily


def mistral_layers(hf: HfConfig) -> tuple[LayerConfig, ...]:
    return config_readers.dense(hf, replace(config_readers.attention(hf), window=config_readers.window(hf)))


def ministral3_layers(hf: HfConfig) -> tuple[LayerConfig, ...]:
    attention = replace(
        config_readers.attention(hf),
        window=config_readers.window(hf),
        query_scaling=config_readers.query_scaling(hf),
    )
    return config_readers.dense(hf, attention)


MISTRAL = ModelFamily(layers=mistral_layers)
MINISTRAL3 = ModelFamily(layers=ministral3_layers)
