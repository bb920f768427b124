"""Mixtral: every layer a mixture of experts, no query and key norms; w1 is the gate, w3 up, w2 down."""

from __future__ import annotations

from dataclasses import replace

from expertwire.engine.config.fields import Fields
from expertwire.engine.models import config_readers
from expertwire.engine.models.family import Family, Names
from expertwire.engine.models.model_config import Layer


def layers(fields: Fields) -> tuple[Layer, ...]:
    attention = replace(config_readers.attention(fields), window=config_readers.window(fields))
    moe = config_readers.moe(fields, "num_local_experts", "num_experts", size="intermediate_size", renormalize=True)
    return (Layer(attention=attention, mlp=moe),) * fields.integer("num_hidden_layers")


MIXTRAL = Family(layers=layers, names=Names(moe="block_sparse_moe.", gate="w1", up="w3", down="w2"))
