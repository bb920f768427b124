"""Mistral Small 4's text model: latent attention whose queries grow with their position, experts beside a shared one."""

from __future__ import annotations

from expertwire.engine import readers
from expertwire.engine.family import Family
from expertwire.engine.fields import Fields
from expertwire.engine.model_config import Layer, Moe
from expertwire.engine.models import deepseek


def layers(fields: Fields) -> tuple[Layer, ...]:
    attention = deepseek.latent_attention(fields, query_scaling=readers.query_scaling(fields))
    return deepseek.stack(fields, attention, _experts(fields))


def _experts(fields: Fields) -> Moe:
    experts = readers.experts(fields, "n_routed_experts", "num_local_experts")
    return Moe(
        **experts,
        size=fields.integer("moe_intermediate_size"),
        renormalize=fields.flag("norm_topk_prob"),
        groups=deepseek.groups(fields, **experts, by="two_best"),
        scale=fields.number("routed_scaling_factor"),
        shared_size=deepseek.shared_size(fields),
    )


MISTRAL4 = Family(layers=layers)
