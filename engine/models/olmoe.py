"""OLMoE: norms over the whole of query and key; the chosen experts' weights are not brought to a sum of one."""

from __future__ import annotations

from dataclasses import replace

from expertwire.engine.config.fields import Fields
from expertwire.engine.models import config_readers
from expertwire.engine.models.family import Family
from expertwire.engine.models.model_config import Layer


def layers(fields: Fields) -> tuple[Layer, ...]:
    if fields.get("clip_qkv") is not None:
        raise ValueError(f"{fields.file}: {fields.path}clip_qkv must be null, got {fields.get('clip_qkv')!r}")
    bias = fields.flag("attention_bias", default=False)
    attention = replace(config_readers.attention(fields), qkv_bias=bias, output_bias=bias, qk_norm="row")
    renormalize = fields.flag("norm_topk_prob")
    moe = config_readers.moe(
        fields, "num_experts", "num_local_experts", size="intermediate_size", renormalize=renormalize
    )
    return (Layer(attention=attention, mlp=moe),) * fields.integer("num_hidden_layers")


OLMOE = Family(layers=layers)
