"""MiniMax-M2: norms over the whole of query and key, half of a head rotated, sigmoid routing with a bias for the choice."""

from __future__ import annotations

from dataclasses import replace

from expertwire.engine.config.fields import REQUIRED, Fields
from expertwire.engine.models import config_readers
from expertwire.engine.models.family import Family, Names
from expertwire.engine.models.model_config import Attention, Layer, Moe, Skipped
from expertwire.kernels.ops.variants import Rope


def layers(fields: Fields) -> tuple[Layer, ...]:
    fields.one_of("qk_norm_type", "per_layer", default="per_layer")
    normed = fields.flag("use_qk_norm", default=True)
    plain = config_readers.attention(fields, default_size=REQUIRED)
    attention = replace(plain, rope=_rope(fields, plain), qk_norm="row" if normed else "none")
    layer, num_layers = Layer(attention=attention, mlp=_moe(fields)), fields.integer("num_hidden_layers")
    types = fields.get("attn_type_list")
    if types is not None and types != [1] * num_layers:
        raise ValueError(
            f"{fields.file}: {fields.path}attn_type_list must be {num_layers} times 1 (softmax attention), got {types!r}"
        )
    return (layer,) * num_layers


def _rope(fields: Fields, attention: Attention) -> Rope | None:
    size = fields.integer("rotary_dim", default=None)
    if size is None or attention.rope is None:
        return attention.rope
    if size % 2 or size > attention.head_dim:
        raise ValueError(
            f"{fields.file}: {fields.path}rotary_dim must be even and at most head_dim ({attention.head_dim}), got {size}"
        )
    return replace(attention.rope, size=size)


def _moe(fields: Fields) -> Moe:
    fields.one_of("scoring_func", "sigmoid", default="sigmoid")
    fields.one_of("shared_intermediate_size", 0, default=0)
    moe = config_readers.moe(fields, "num_local_experts", "num_experts", size="intermediate_size", renormalize=True)
    choice_bias = fields.flag("use_routing_bias", default=True)
    return replace(moe, score="sigmoid", choice_bias=choice_bias, router_fp32=True)


def _predictors(fields: Fields) -> tuple[Skipped, ...]:
    return config_readers.predictors(fields, "num_mtp_modules")


MINIMAX_M2 = Family(
    layers=layers,
    names=Names(
        moe="block_sparse_moe.",
        gate="w1",
        up="w3",
        down="w2",
        choice_bias="e_score_correction_bias",
    ),
    skipped=_predictors,
)
