"""Qwen3-Next, Qwen3.5 and Qwen3.6: gated delta nets and, every fourth layer, attention whose output is gated; the text part.

All norms but those inside the delta nets are stored less one. Qwen3-Next stores the projections of a delta net by key head,
and its experts renormalise if the config says so; the others store them apart and always renormalise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from expertwire.engine.models import config_readers
from expertwire.engine.models.hf_config import REQUIRED, HfConfig
from expertwire.engine.models.mixer_configs import AttentionConfig, GatedDeltaNetConfig
from expertwire.engine.models.model_config import (
    IgnoredTensors,
    LayerConfig,
    MlpConfig,
    ModelFamily,
    MoeConfig,
    TensorNames,
)

_PARTIAL = 0.25  # of a head that is rotated, by default
_MTP = IgnoredTensors(
    pattern=r"mtp\..*", why="multi-token prediction is not used: each token is predicted by the decoder itself"
)
_VISION = IgnoredTensors(pattern=r"model\.visual\..*", why="images are not supported")


def _mixers(hf: HfConfig) -> list[AttentionConfig | GatedDeltaNetConfig]:
    """Return the mixer of each layer, by `layer_types` or `full_attention_interval`."""
    hf.one_of("attn_output_gate", True, default=True)
    hf.one_of("mamba_ssm_dtype", "float32", default="float32")
    num_layers = hf.integer("num_hidden_layers")
    types = hf.choices("layer_types", num_layers, "linear_attention", "full_attention")
    if types is None:
        interval = hf.integer("full_attention_interval", default=4)
        types = ["linear_attention" if (i + 1) % interval else "full_attention" for i in range(num_layers)]
    attention, delta = _attention(hf), _delta(hf)
    return [attention if kind == "full_attention" else delta for kind in types]


def _attention(hf: HfConfig) -> AttentionConfig:
    attention = config_readers.attention(hf, head_dim=REQUIRED, partial=_PARTIAL)
    bias = hf.flag("attention_bias", default=False)
    return replace(attention, qkv_bias=bias, output_bias=bias, qk_norm="head", gated=True)


def _delta(hf: HfConfig) -> GatedDeltaNetConfig:
    num_heads, num_key_heads = hf.integer("linear_num_value_heads"), hf.integer("linear_num_key_heads")
    if num_heads % num_key_heads:
        raise hf.error(
            f"linear_num_value_heads ({num_heads}) must be a multiple of linear_num_key_heads ({num_key_heads})"
        )
    return GatedDeltaNetConfig(
        num_heads=num_heads,
        num_key_heads=num_key_heads,
        key_dim=hf.integer("linear_key_head_dim"),
        value_dim=hf.integer("linear_value_head_dim"),
        conv_kernel=hf.integer("linear_conv_kernel_dim", low=2),
        norm_eps=hf.number("rms_norm_eps"),
    )


def experts(hf: HfConfig, *, renormalize: bool) -> MoeConfig:
    """Return experts beside which a shared one is multiplied by a gate."""
    moe = config_readers.moe(
        hf, "num_experts", "num_local_experts", size="moe_intermediate_size", renormalize=renormalize
    )
    return replace(moe, shared_intermediate_size=hf.integer("shared_expert_intermediate_size"), shared_gate=True)


def _next_layers(hf: HfConfig) -> tuple[LayerConfig, ...]:
    return config_readers.sparse_layers(hf, _mixers(hf), experts(hf, renormalize=hf.flag("norm_topk_prob")))


def _dense_layers(hf: HfConfig) -> tuple[LayerConfig, ...]:
    mlp = MlpConfig(intermediate_size=hf.integer("intermediate_size"))
    return tuple(LayerConfig(mixer=mixer, mlp=mlp) for mixer in _mixers(hf))


def _moe_layers(hf: HfConfig) -> tuple[LayerConfig, ...]:
    moe = experts(hf, renormalize=True)
    return tuple(LayerConfig(mixer=mixer, mlp=moe) for mixer in _mixers(hf))


def _fields(hf: HfConfig) -> Mapping[str, Any]:
    return {"zero_centred_norms": True}


_NAMES = TensorNames(prefixes=("model.language_model.", "model."), shared="shared_expert.")

QWEN3_NEXT = ModelFamily(
    layers=_next_layers,
    names=replace(_NAMES, prefixes=("model.",), delta_by_head=True),
    ignored_tensors=(_MTP,),
    fields=_fields,
)
QWEN3_5 = ModelFamily(layers=_dense_layers, names=_NAMES, ignored_tensors=(_MTP, _VISION), fields=_fields)
QWEN3_5_MOE = replace(QWEN3_5, layers=_moe_layers)
