"""IBM Granite 4.0: Mamba-2 and attention layers, each with experts and a shared MLP, or with the MLP alone.

Granite scales what each half of a layer adds to the residual stream by `residual_multiplier`. Here the stream is divided by it
instead: the embedding is, and the norms' epsilon by its square, which gives the same hidden states behind every norm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from expertwire.engine.models import config_readers
from expertwire.engine.models.hf_config import HfConfig
from expertwire.engine.models.mixer_configs import AttentionConfig, Mamba2Config
from expertwire.engine.models.model_config import LayerConfig, MlpConfig, ModelFamily, MoeConfig, TensorNames

_KINDS = ("mamba", "attention", "linear_attention", "full_attention")


def _layers(hf: HfConfig) -> tuple[LayerConfig, ...]:
    num_layers = hf.integer("num_hidden_layers")
    name = hf.first_present("layer_types", "layers_block_type")
    kinds = hf.choices(name, num_layers, *_KINDS)
    if kinds is None:
        raise hf.error(f"{name} must be a list of {num_layers} values out of {', '.join(_KINDS)}, got null")
    is_recurrent = [kind in ("mamba", "linear_attention") for kind in kinds]
    mamba = _mamba(hf) if any(is_recurrent) else None
    attention = _attention(hf) if not all(is_recurrent) else None
    mlp = _mlp(hf)
    return tuple(LayerConfig(mixer=mamba if recurrent else attention, mlp=mlp) for recurrent in is_recurrent)


def _attention(hf: HfConfig) -> AttentionConfig:
    config_readers.no_biases(hf, "attention_bias")
    kind = hf.one_of("position_embedding_type", "rope", "nope", default="nope")
    attention = config_readers.attention(hf, rotated=kind == "rope")
    return replace(attention, scale=hf.number("attention_multiplier"))


def _mamba(hf: HfConfig) -> Mamba2Config:
    num_heads, inner = hf.integer("mamba_n_heads"), hf.integer("mamba_expand") * hf.integer("hidden_size")
    automatic = hf.get("mamba_d_head") in (None, "auto")
    head_dim = inner // num_heads if automatic else hf.integer("mamba_d_head")
    if head_dim * num_heads != inner:
        raise hf.error(
            f"mamba_n_heads ({num_heads}) times mamba_d_head ({head_dim}) must be mamba_expand * hidden_size ({inner})"
        )
    return Mamba2Config(
        num_heads=num_heads,
        head_dim=head_dim,
        state_size=hf.integer("mamba_d_state"),
        num_groups=hf.integer("mamba_n_groups"),
        conv_kernel=hf.integer("mamba_d_conv", low=2),
        conv_bias=hf.flag("mamba_conv_bias"),
        norm_eps=hf.number("rms_norm_eps"),
        proj_bias=hf.flag("mamba_proj_bias"),
        dt_limits=config_readers.dt_limits(hf),
    )


def _mlp(hf: HfConfig) -> MlpConfig | MoeConfig:
    shared = hf.integer("shared_intermediate_size")
    if not hf.integer("num_local_experts", low=0):
        return MlpConfig(intermediate_size=shared)
    # The softmax of the best logits is that of all, scaled to a sum of one.
    moe = config_readers.moe(hf, "num_local_experts", size="intermediate_size", renormalize=True)
    return replace(moe, shared_intermediate_size=shared)


def _fields(hf: HfConfig) -> Mapping[str, Any]:
    scale = hf.number("residual_multiplier")
    return {
        "rms_norm_eps": hf.number("rms_norm_eps") / scale**2,
        "embedding_scale": hf.number("embedding_multiplier") / scale,
        "logits_scale": 1 / hf.number("logits_scaling"),
    }


GRANITE_MOE_HYBRID = ModelFamily(
    layers=_layers,
    names=TensorNames(
        mlp="shared_mlp.",
        moe="",
        gate_up="input_linear",
        down="output_linear",
        router="block_sparse_moe.router.layer",
        experts="block_sparse_moe.experts.{}.",
        fused=("block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight"),
        shared="shared_mlp.",
    ),
    fields=_fields,
)
