"""Mixtral: experts in every layer; w1 is the gate projection, w3 up, w2 down."""

from __future__ import annotations

from dataclasses import replace

from expertwire.engine.models import config_readers
from expertwire.engine.models.hf_config import HfConfig
from expertwire.engine.models.model_config import LayerConfig, ModelFamily, TensorNames


def layers(hf: HfConfig) -> tuple[LayerConfig, ...]:
    attention = replace(config_readers.attention(hf), window=config_readers.window(hf))
    moe = config_readers.moe(hf, "num_local_experts", "num_experts", size="intermediate_size", renormalize=True)
    return (LayerConfig(mixer=attention, mlp=moe),) * hf.integer("num_hidden_layers")


MIXTRAL = ModelFamily(layers=layers, names=TensorNames(moe="block_sparse_moe.", gate="w1", up="w3", down="w2"))
