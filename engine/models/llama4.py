"""The text model of Llama 4: chunked attention with rotary embedding in most layers, full attention without it and with scaled
queries in the others; one expert per token, whose input is scaled. MobileLLM-R1 is a dense model of this family."""

from __future__ import annotations

from dataclasses import replace

from expertwire.engine.models import config_readers
from expertwire.engine.models.hf_config import HfConfig
from expertwire.engine.models.mixer_configs import AttentionConfig, QueryScaling
from expertwire.engine.models.model_config import (
    IgnoredTensors,
    LayerConfig,
    MlpConfig,
    ModelFamily,
    MoeConfig,
    TensorNames,
)
from expertwire.scheduler.config import is_int


def layers(hf: HfConfig) -> tuple[LayerConfig, ...]:
    num_layers = hf.integer("num_hidden_layers")
    is_rotated = _rotated_layers(hf, num_layers)
    types = hf.choices("layer_types", num_layers, "full_attention", "chunked_attention")
    sparse = _sparse_layers(hf, num_layers)
    moe, dense = (_moe(hf) if sparse else None), None
    if len(sparse) < num_layers:
        dense = MlpConfig(intermediate_size=hf.integer("intermediate_size_mlp"))
    found = []
    for i in range(num_layers):
        chunked = is_rotated[i] if types is None else types[i] == "chunked_attention"
        mlp = moe if i in sparse else dense
        assert mlp is not None, f"layer {i} is neither sparse nor dense"
        found.append(LayerConfig(mixer=_attention(hf, is_rotated[i], chunked), mlp=mlp))
    return tuple(found)


def _attention(hf: HfConfig, is_rotated: bool, chunked: bool) -> AttentionConfig:
    plain, bias = config_readers.attention(hf, interleaved=True), hf.flag("attention_bias", default=False)
    chunk = hf.integer("attention_chunk_size", default=None)
    hides = chunk is not None and chunk < hf.integer("max_position_embeddings")
    normed = hf.flag("use_qk_norm")
    # Llama 4 applies this norm after the rotary embedding. It has no weights and a rotation keeps lengths: the order is free.
    return replace(
        plain,
        rope=plain.rope if is_rotated else None,
        qkv_bias=bias,
        output_bias=bias,
        qk_norm="plain" if normed and is_rotated else "none",
        chunk=chunk if chunked and hides else None,
        query_scaling=None if is_rotated else _query_scaling(hf),
    )


def _query_scaling(hf: HfConfig) -> QueryScaling | None:
    # The first checkpoints have 4, which transformers took for true.
    if hf.get("attn_temperature_tuning") != 4 and not hf.flag("attn_temperature_tuning", default=True):
        return None
    beta, length = hf.number("attn_scale", default=0.1), hf.integer("floor_scale", default=8192)
    return QueryScaling(beta=beta, length=length, offset=1)


def _moe(hf: HfConfig) -> MoeConfig:
    moe = config_readers.moe(hf, "num_local_experts", size="intermediate_size", renormalize=False)
    return replace(moe, score="sigmoid", scales_input=True, shared_intermediate_size=moe.intermediate_size)


def _rotated_layers(hf: HfConfig, num_layers: int) -> list[bool]:
    """`no_rope_layers` says 1 where a layer is rotated; an empty list is as good as none."""
    flags = hf.get("no_rope_layers") or None
    if flags is None:
        interval = hf.integer("no_rope_layer_interval", default=4)
        return [(i + 1) % interval != 0 for i in range(num_layers)]
    if not isinstance(flags, list) or len(flags) < num_layers or not all(is_int(f) and f in (0, 1) for f in flags):
        raise hf.error(f"no_rope_layers must be a list of a 0 or 1 for each of the {num_layers} layers, got {flags!r}")
    return [flag == 1 for flag in flags[:num_layers]]


def _sparse_layers(hf: HfConfig, num_layers: int) -> list[int]:
    given = hf.layer_indices("moe_layers", num_layers)
    if given is not None:
        return given
    step = hf.integer("interleave_moe_layer_step")
    return list(range(step - 1, num_layers, step))


LLAMA4 = ModelFamily(
    layers=layers,
    names=TensorNames(
        prefixes=("language_model.model.", "model."),
        heads=("language_model.lm_head", "lm_head"),
        mlp="feed_forward.",
        moe="feed_forward.",
        router="router",
        fused_layout="columns",
        shared="shared_expert.",
    ),
    ignored_tensors=(
        IgnoredTensors(pattern=r"(vision_model|multi_modal_projector)\..*", why="images are not supported"),
    ),
)
