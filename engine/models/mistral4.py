"""Mistral Small 4's text model: latent attention whose queries grow with their position, experts beside a shared one."""

from __future__ import annotations

from expertwire.engine.config.fields import Fields
from expertwire.engine.models import config_readers, deepseek
from expertwire.engine.models.family import Family
from expertwire.engine.models.model_config import Layer


def layers(fields: Fields) -> tuple[Layer, ...]:
    attention = deepseek.latent_attention(fields, query_scaling=config_readers.query_scaling(fields))
    renormalize = fields.flag("norm_topk_prob")
    moe = deepseek.experts(fields, "num_local_experts", by="two_best", renormalize=renormalize)
    return deepseek.stack(fields, attention, moe)


MISTRAL4 = Family(layers=layers)
