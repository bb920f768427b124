"""DeepSeek-V2, V2-Lite, V3, R1, V3.1 and V3.2, and Kimi K2, which calls itself DeepSeek-V3: latent attention, dense layers
first, experts in groups beside shared ones. Other families with latent attention read theirs with these functions.

Sources: DeepSeek's `modeling_deepseek.py` of V2 and V3, `inference/model.py` of V3.2-Exp.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from expertwire.engine.config.fields import Fields
from expertwire.engine.models import config_readers
from expertwire.engine.models.family import Family
from expertwire.engine.models.model_config import (
    Attention,
    Indexer,
    LatentAttention,
    Layer,
    Mlp,
    Moe,
    QueryScaling,
    Skipped,
)
from expertwire.kernels.ops.variants import Groups, Rope


def latent_attention(fields: Fields, *, query_scaling: QueryScaling | None = None) -> LatentAttention:
    """Without an indexer."""
    num_heads = fields.integer("num_attention_heads")
    fields.one_of("num_key_value_heads", num_heads, default=num_heads)
    config_readers.no_biases(fields, "attention_bias")
    plain_dim = fields.integer("qk_nope_head_dim")
    return LatentAttention(
        num_heads=num_heads,
        query_rank=fields.integer("q_lora_rank", default=None),
        rank=fields.integer("kv_lora_rank"),
        plain_dim=plain_dim,
        value_dim=fields.integer("v_head_dim"),
        rope=_rope(fields, plain_dim),
        query_scaling=query_scaling,
    )


def _rope(fields: Fields, plain_dim: int) -> Rope:
    """A `partial_rotary_factor`, where there is one, is of the whole head or of its rotated part alone."""
    size, interleaved = fields.integer("qk_rope_head_dim", low=2), fields.flag("rope_interleave", default=True)
    for whole in (plain_dim + size, size):
        rope = config_readers.rope(fields, whole, interleaved=interleaved)
        if rope.size == size:
            return rope
    raise ValueError(
        f"{fields.file}: {fields.path}partial_rotary_factor must be 1 or {size / (plain_dim + size):g}, the part of a head that "
        f"qk_rope_head_dim ({size}) is"
    )


def with_indexer(attention: LatentAttention, fields: Fields, *, interleaved: bool) -> LatentAttention:
    """Sparse attention; its indexer rotates as many numbers as attention does, `interleaved` if the config does not say."""
    if attention.query_rank is None:
        raise ValueError(f"{fields.file}: the field {fields.path + 'q_lora_rank'!r} is missing")
    size = fields.integer("index_head_dim", low=attention.rope.size)
    paired = fields.flag("indexer_rope_interleave", default=interleaved)
    indexer = Indexer(
        num_heads=fields.integer("index_n_heads"),
        head_dim=size,
        top_k=fields.integer("index_topk"),
        rope=replace(attention.rope, interleaved=paired),
    )
    return replace(attention, indexer=indexer)


def biased_experts(fields: Fields) -> Moe:
    """V3: chosen by their sigmoids and a bias, out of groups whose two best are good."""
    fields.one_of("topk_method", "noaux_tc", default="noaux_tc")
    fields.one_of("scoring_func", "sigmoid", default="sigmoid")
    moe = experts(fields, "num_local_experts", by="two_best", renormalize=fields.flag("norm_topk_prob"))
    return replace(moe, score="sigmoid", choice_bias=True, router_fp32=True)


def greedy_experts(fields: Fields) -> Moe:
    """V2: chosen by their softmax, whose values are the weights; out of groups whose best is good, unless it is V2-Lite."""
    limited = fields.one_of("topk_method", "greedy", "group_limited_greedy") == "group_limited_greedy"
    fields.one_of("scoring_func", "softmax", default="softmax")
    fields.one_of("norm_topk_prob", False, default=False)
    moe = experts(fields, "num_experts", by="best" if limited else None, renormalize=False)
    return replace(moe, router_fp32=True)


def experts(fields: Fields, other_name: str, *, by: Literal["best", "two_best"] | None, renormalize: bool) -> Moe:
    """Beside shared ones, which are stored as one; in groups that are chosen `by` their experts' scores, None: not in groups.
    `other_name`: what `n_routed_experts` may be called."""
    names = "n_routed_experts", other_name
    moe = config_readers.moe(fields, *names, size="moe_intermediate_size", renormalize=renormalize)
    return replace(
        moe,
        groups=_groups(fields, moe, by) if by is not None else None,
        scale=fields.number("routed_scaling_factor"),
        shared_size=fields.integer("n_shared_experts", low=0, default=0) * moe.size,
    )


def _groups(fields: Fields, moe: Moe, by: Literal["best", "two_best"]) -> Groups | None:
    """None where one group holds all experts or all groups are kept."""
    number = fields.integer("n_group", default=1)
    kept = fields.integer("topk_group", default=number)
    size, least = moe.num_experts // number, 2 if by == "two_best" else 1
    if moe.num_experts % number or (number > 1 and size < least):
        raise ValueError(
            f"{fields.file}: {fields.path}n_group ({number}) must cut {moe.num_experts} experts into equal groups of {least} or "
            "more"
        )
    if kept > number or kept * size < moe.top_k:
        raise ValueError(
            f"{fields.file}: {fields.path}topk_group must be at most n_group ({number}) and leave num_experts_per_tok "
            f"({moe.top_k}) experts, got {kept}"
        )
    return None if kept == number else Groups(number=number, kept=kept, by=by)


def stack(fields: Fields, attention: Attention | LatentAttention, moe: Moe) -> tuple[Layer, ...]:
    """Layers alike, some of them with a dense MLP."""
    num_layers = fields.integer("num_hidden_layers")
    types = fields.listed("mlp_layer_types", num_layers, "dense", "sparse")
    if types is None:
        first, step = fields.integer("first_k_dense_replace", low=0), fields.integer("moe_layer_freq", default=1)
        types = ["sparse" if i >= first and i % step == 0 else "dense" for i in range(num_layers)]
    mlp = Mlp(size=fields.integer("intermediate_size")) if "dense" in types else None
    return tuple(Layer(attention=attention, mlp=mlp if mlp and kind == "dense" else moe) for kind in types)


def predictors(fields: Fields) -> tuple[Skipped, ...]:
    return config_readers.predictors(fields, "num_nextn_predict_layers")


def _v2_layers(fields: Fields) -> tuple[Layer, ...]:
    return stack(fields, latent_attention(fields), greedy_experts(fields))


def v3_layers(fields: Fields) -> tuple[Layer, ...]:
    return stack(fields, latent_attention(fields), biased_experts(fields))


def _v32_layers(fields: Fields) -> tuple[Layer, ...]:
    return stack(fields, with_indexer(latent_attention(fields), fields, interleaved=False), biased_experts(fields))


DEEPSEEK_V2 = Family(layers=_v2_layers)
DEEPSEEK_V3 = Family(layers=v3_layers, skipped=predictors)
DEEPSEEK_V32 = Family(layers=_v32_layers, skipped=predictors)
