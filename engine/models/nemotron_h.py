"""Nemotron-H (v2) and Nemotron 3 Nano and Super: Mamba-2, attention without positions, and experts or MLPs of squared ReLU.

A layer is one of these alone, with one norm. Super's experts read and write a latent (`moe_latent_size`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from expertwire.engine.models import config_readers, deepseek
from expertwire.engine.models.hf_config import HfConfig
from expertwire.engine.models.mixer_configs import AttentionConfig, Mamba2Config
from expertwire.engine.models.model_config import (
    IgnoredTensors,
    LayerConfig,
    MlpConfig,
    ModelFamily,
    MoeConfig,
    TensorNames,
)
from expertwire.kernels.ops.variants import Activation

_KINDS = {"M": "linear_attention", "E": "moe", "*": "full_attention", "-": "mlp"}
# Older configs have other names for the same kinds.
_ALIASES = {"mamba": "linear_attention", "attention": "full_attention"}
_RELU2 = Activation("relu2")


def _layers(hf: HfConfig) -> tuple[LayerConfig, ...]:
    config_readers.no_biases(hf, "attention_bias", "mlp_bias", "use_bias")
    made = {
        "linear_attention": lambda: LayerConfig(mixer=_mamba(hf), mlp=None),
        "full_attention": lambda: LayerConfig(mixer=_attention(hf), mlp=None),
        "mlp": lambda: LayerConfig(mixer=None, mlp=_mlp(hf)),
        "moe": lambda: LayerConfig(mixer=None, mlp=_moe(hf)),
    }
    kinds = _kinds(hf)
    layer_of = {kind: made[kind]() for kind in dict.fromkeys(kinds)}
    return tuple(layer_of[kind] for kind in kinds)


def _kinds(hf: HfConfig) -> list[str]:
    """Return the kind of each layer, from a pattern or a list."""
    pattern, kinds = hf.get("hybrid_override_pattern"), hf.get("layers_block_type")
    if isinstance(kinds, list):
        found = [_ALIASES.get(kind, kind) for kind in kinds if isinstance(kind, str)]
        if found and len(found) == len(kinds) and all(kind in _KINDS.values() for kind in found):
            return found
        raise hf.error(f"layers_block_type must be a list of {', '.join(_KINDS.values())}, got {kinds!r}")
    if not isinstance(pattern, str) or not pattern or not all(letter in _KINDS for letter in pattern):
        raise hf.error(f"hybrid_override_pattern must be a string of the letters {' '.join(_KINDS)}, got {pattern!r}")
    return [_KINDS[letter] for letter in pattern]


def _attention(hf: HfConfig) -> AttentionConfig:
    """Return attention without positions: rope_theta is in the config and unused."""
    num_heads, num_kv_heads = config_readers.head_counts(hf)
    return AttentionConfig(
        num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=hf.integer("head_dim", default=128), rope=None
    )


def _mamba(hf: HfConfig) -> Mamba2Config:
    hf.one_of("mamba_hidden_act", "silu", default="silu")
    config_readers.no_biases(hf, "mamba_proj_bias")
    return Mamba2Config(
        num_heads=hf.integer("mamba_num_heads"),
        head_dim=hf.integer("mamba_head_dim"),
        state_size=hf.integer("ssm_state_size"),
        num_groups=hf.integer("n_groups"),
        conv_kernel=hf.integer("conv_kernel", low=2),
        conv_bias=hf.flag("use_conv_bias"),
        dt_limits=config_readers.dt_limits(hf),
        norm_eps=_norm_eps(hf),
    )


def _mlp(hf: HfConfig) -> MlpConfig:
    return MlpConfig(intermediate_size=hf.integer("intermediate_size"), activation=_RELU2)


def _moe(hf: HfConfig) -> MoeConfig:
    hf.one_of("n_shared_experts", 1, default=1)
    return replace(
        deepseek.biased_experts(hf),
        activation=_RELU2,
        shared_intermediate_size=hf.integer("moe_shared_expert_intermediate_size"),
        latent_size=hf.integer("moe_latent_size", low=0, default=0),
    )


def _norm_eps(hf: HfConfig) -> float:
    return hf.number(hf.first_present("layer_norm_epsilon", "norm_eps", "rms_norm_eps"))


def _fields(hf: HfConfig) -> Mapping[str, Any]:
    return {"rms_norm_eps": _norm_eps(hf)}


NEMOTRON_H = ModelFamily(
    layers=_layers,
    names=TensorNames(
        prefixes=("backbone.", "model."),
        embed="embeddings",
        norm="norm_f",
        input_norm="norm",
        post_norm="norm",
        attention="mixer.",
        qkv=("mixer.q_proj", "mixer.k_proj", "mixer.v_proj"),
        output="mixer.o_proj",
        mamba="mixer.",
        mlp="mixer.",
        moe="mixer.",
        fused=("experts.up_proj", "experts.down_proj"),
    ),
    ignored_tensors=(
        IgnoredTensors(
            pattern=r"mtp\..*", why="multi-token prediction is not used: each token is predicted by the decoder itself"
        ),
    ),
    fields=_fields,
    activation="relu2",
)
