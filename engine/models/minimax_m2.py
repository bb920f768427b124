"""MiniMax-M2: norms over the whole query and key, rotary embedding of half a head, sigmoid routing with a bias for the choice."""

from __future__ import annotations

from dataclasses import replace

from expertwire.engine.models import config_readers
from expertwire.engine.models.hf_config import REQUIRED, HfConfig
from expertwire.engine.models.mixer_configs import AttentionConfig
from expertwire.engine.models.model_config import LayerConfig, ModelFamily, MoeConfig, TensorNames
from expertwire.kernels.ops.variants import Rope


def layers(hf: HfConfig) -> tuple[LayerConfig, ...]:
    hf.one_of("qk_norm_type", "per_layer", default="per_layer")
    normed = hf.flag("use_qk_norm", default=True)
    plain = config_readers.attention(hf, head_dim=REQUIRED)
    attention = replace(plain, rope=_rope(hf, plain), qk_norm="row" if normed else "none")
    layer, num_layers = LayerConfig(mixer=attention, mlp=_moe(hf)), hf.integer("num_hidden_layers")
    types = hf.get("attn_type_list")
    if types is not None and types != [1] * num_layers:
        raise hf.error(f"attn_type_list must be {num_layers} times 1 (softmax attention), got {types!r}")
    return (layer,) * num_layers


def _rope(hf: HfConfig, attention: AttentionConfig) -> Rope | None:
    size = hf.integer("rotary_dim", default=None)
    if size is None or attention.rope is None:
        return attention.rope
    if size % 2 or size > attention.head_dim:
        raise hf.error(f"rotary_dim must be even and at most head_dim ({attention.head_dim}), got {size}")
    return replace(attention.rope, size=size)


def _moe(hf: HfConfig) -> MoeConfig:
    hf.one_of("scoring_func", "sigmoid", default="sigmoid")
    hf.one_of("shared_intermediate_size", 0, default=0)
    moe = config_readers.moe(hf, "num_local_experts", "num_experts", size="intermediate_size", renormalize=True)
    choice_bias = hf.flag("use_routing_bias", default=True)
    return replace(moe, score="sigmoid", choice_bias=choice_bias, router_fp32=True)


MINIMAX_M2 = ModelFamily(
    layers=layers,
    names=TensorNames(
        moe="block_sparse_moe.",
        gate="w1",
        up="w3",
        down="w2",
        choice_bias="e_score_correction_bias",
    ),
    mtp_field="num_mtp_modules",
)
