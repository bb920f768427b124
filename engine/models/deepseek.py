"""DeepSeek-V2, V2-Lite, V3, R1, V3.1 and V3.2, and Kimi K2, whose architecture is DeepSeek-V3's: multi-head latent attention,
dense layers first, then experts in groups with a shared one. Other families with latent attention use these functions too.

Sources: DeepSeek's `modeling_deepseek.py` of V2 and V3, `inference/model.py` of V3.2-Exp.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from expertwire.engine.models import config_readers
from expertwire.engine.models.hf_config import HfConfig
from expertwire.engine.models.mixer_configs import AttentionConfig, IndexerConfig, LatentAttentionConfig, QueryScaling
from expertwire.engine.models.model_config import LayerConfig, MlpConfig, ModelFamily, MoeConfig
from expertwire.kernels.ops.variants import ExpertGroups, Rope

MTP_FIELD = "num_nextn_predict_layers"


def latent_attention(hf: HfConfig, *, query_scaling: QueryScaling | None = None) -> LatentAttentionConfig:
    """Return latent attention without an indexer."""
    num_heads = hf.integer("num_attention_heads")
    hf.one_of("num_key_value_heads", num_heads, default=num_heads)
    config_readers.no_biases(hf, "attention_bias")
    qk_nope_head_dim = hf.integer("qk_nope_head_dim")
    return LatentAttentionConfig(
        num_heads=num_heads,
        q_lora_rank=hf.integer("q_lora_rank", default=None),
        kv_lora_rank=hf.integer("kv_lora_rank"),
        qk_nope_head_dim=qk_nope_head_dim,
        v_head_dim=hf.integer("v_head_dim"),
        rope=_rope(hf, qk_nope_head_dim),
        query_scaling=query_scaling,
    )


def _rope(hf: HfConfig, qk_nope_head_dim: int) -> Rope:
    """Return the rotary embedding; `partial_rotary_factor` is a fraction of the whole head or of its rotated part."""
    size, interleaved = hf.integer("qk_rope_head_dim", low=2), hf.flag("rope_interleave", default=True)
    for whole in (qk_nope_head_dim + size, size):
        rope = config_readers.rope(hf, whole, interleaved=interleaved)
        if rope.size == size:
            return rope
    raise hf.error(
        f"partial_rotary_factor must be 1 or {size / (qk_nope_head_dim + size):g}, the part of a head that "
        f"qk_rope_head_dim ({size}) is"
    )


def with_indexer(attention: LatentAttentionConfig, hf: HfConfig, *, interleaved: bool) -> LatentAttentionConfig:
    """Return sparse attention, whose indexer has the rotary embedding of attention; `interleaved` is the config's default."""
    hf.integer("q_lora_rank")
    size = hf.integer("index_head_dim", low=attention.rope.size)
    paired = hf.flag("indexer_rope_interleave", default=interleaved)
    indexer = IndexerConfig(
        num_heads=hf.integer("index_n_heads"),
        head_dim=size,
        top_k=hf.integer("index_topk"),
        rope=replace(attention.rope, interleaved=paired),
    )
    return replace(attention, indexer=indexer)


def biased_experts(hf: HfConfig) -> MoeConfig:
    """Return V3's experts: chosen by sigmoid and bias, from the groups with the highest sum of their two best scores."""
    hf.one_of("topk_method", "noaux_tc", default="noaux_tc")
    hf.one_of("scoring_func", "sigmoid", default="sigmoid")
    moe = experts(hf, "num_local_experts", by="two_best", renormalize=hf.flag("norm_topk_prob"))
    return replace(moe, score="sigmoid", choice_bias=True, router_fp32=True)


def greedy_experts(hf: HfConfig) -> MoeConfig:
    """Return V2's experts: chosen by softmax, from the groups with the best expert (V2-Lite: from all), not renormalized."""
    limited = hf.one_of("topk_method", "greedy", "group_limited_greedy") == "group_limited_greedy"
    hf.one_of("scoring_func", "softmax", default="softmax")
    hf.one_of("norm_topk_prob", False, default=False)
    moe = experts(hf, "num_experts", by="best" if limited else None, renormalize=False)
    return replace(moe, router_fp32=True)


def experts(hf: HfConfig, other_name: str, *, by: Literal["best", "two_best"] | None, renormalize: bool) -> MoeConfig:
    """Return experts with shared ones, which are stored as one.

    Args:
        hf: the config.
        other_name: field of the number of experts if `n_routed_experts` is missing.
        by: the scores by which groups of experts are chosen; None: there are no groups.
        renormalize: as `config_readers.moe` has it.
    """
    moe = config_readers.moe(hf, "n_routed_experts", other_name, size="moe_intermediate_size", renormalize=renormalize)
    return replace(
        moe,
        groups=_groups(hf, moe, by) if by is not None else None,
        scale=hf.number("routed_scaling_factor"),
        shared_intermediate_size=hf.integer("n_shared_experts", low=0, default=0) * moe.intermediate_size,
    )


def _groups(hf: HfConfig, moe: MoeConfig, by: Literal["best", "two_best"]) -> ExpertGroups | None:
    """Return the groups of experts; None if there is one group or all are kept."""
    number = hf.integer("n_group", default=1)
    kept = hf.integer("topk_group", default=number)
    size, least = moe.num_experts // number, 2 if by == "two_best" else 1
    if moe.num_experts % number or (number > 1 and size < least):
        raise hf.error(f"n_group ({number}) must cut {moe.num_experts} experts into equal groups of {least} or more")
    if kept > number or kept * size < moe.top_k:
        raise hf.error(
            f"topk_group must be at most n_group ({number}) and leave num_experts_per_tok "
            f"({moe.top_k}) experts, got {kept}"
        )
    return None if kept == number else ExpertGroups(number=number, kept=kept, by=by)


def stack(hf: HfConfig, attention: AttentionConfig | LatentAttentionConfig, moe: MoeConfig) -> tuple[LayerConfig, ...]:
    """Return layers with this attention, of which some have a dense MLP instead of experts."""
    num_layers = hf.integer("num_hidden_layers")
    types = hf.choices("mlp_layer_types", num_layers, "dense", "sparse")
    if types is None:
        first, step = hf.integer("first_k_dense_replace", low=0), hf.integer("moe_layer_freq", default=1)
        types = ["sparse" if i >= first and i % step == 0 else "dense" for i in range(num_layers)]
    mlp = MlpConfig(intermediate_size=hf.integer("intermediate_size")) if "dense" in types else None
    return tuple(LayerConfig(mixer=attention, mlp=mlp if mlp and kind == "dense" else moe) for kind in types)


def _v2_layers(hf: HfConfig) -> tuple[LayerConfig, ...]:
    return stack(hf, latent_attention(hf), greedy_experts(hf))


def v3_layers(hf: HfConfig) -> tuple[LayerConfig, ...]:
    return stack(hf, latent_attention(hf), biased_experts(hf))


def _v32_layers(hf: HfConfig) -> tuple[LayerConfig, ...]:
    return stack(hf, with_indexer(latent_attention(hf), hf, interleaved=False), biased_experts(hf))


DEEPSEEK_V2 = ModelFamily(layers=_v2_layers)
DEEPSEEK_V3 = ModelFamily(layers=v3_layers, mtp_field=MTP_FIELD)
DEEPSEEK_V32 = ModelFamily(layers=_v32_layers, mtp_field=MTP_FIELD)
