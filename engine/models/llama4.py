"""Llama 4, its text part: rotated layers see their own chunk, the others everything, with scaled queries; one expert a token,
which is given the scaled input. MobileLLM-R1 is a dense one."""

from __future__ import annotations

from dataclasses import replace

from expertwire.engine.config.fields import Fields
from expertwire.engine.models import config_readers
from expertwire.engine.models.family import Family, Names
from expertwire.engine.models.model_config import Attention, Layer, Mlp, Moe, QueryScaling, Skipped
from expertwire.scheduler.checks import is_int


def layers(fields: Fields) -> tuple[Layer, ...]:
    num_layers = fields.integer("num_hidden_layers")
    is_rotated = _rotated_layers(fields, num_layers)
    types = fields.listed("layer_types", num_layers, "full_attention", "chunked_attention")
    sparse = _sparse_layers(fields, num_layers)
    moe, dense = (_moe(fields) if sparse else None), None
    if len(sparse) < num_layers:
        dense = Mlp(size=fields.integer("intermediate_size_mlp"))
    found = []
    for i in range(num_layers):
        chunked = is_rotated[i] if types is None else types[i] == "chunked_attention"
        mlp = moe if i in sparse else dense
        assert mlp is not None, f"layer {i} is neither sparse nor dense"
        found.append(Layer(attention=_attention(fields, is_rotated[i], chunked), mlp=mlp))
    return tuple(found)


def _attention(fields: Fields, is_rotated: bool, chunked: bool) -> Attention:
    plain, bias = config_readers.attention(fields, interleaved=True), fields.flag("attention_bias", default=False)
    chunk = fields.integer("attention_chunk_size", default=None)
    hides = chunk is not None and chunk < fields.integer("max_position_embeddings")
    normed = fields.flag("use_qk_norm")
    # The norm follows the rotation, but has no weights, and a rotation keeps the norm: it may as well come first.
    return replace(
        plain,
        rope=plain.rope if is_rotated else None,
        qkv_bias=bias,
        output_bias=bias,
        qk_norm="plain" if normed and is_rotated else "none",
        chunk=chunk if chunked and hides else None,
        query_scaling=None if is_rotated else _query_scaling(fields),
    )


def _query_scaling(fields: Fields) -> QueryScaling | None:
    # The first files have a 4 here, which was taken for true.
    if fields.get("attn_temperature_tuning") != 4 and not fields.flag("attn_temperature_tuning", default=True):
        return None
    beta, length = fields.number("attn_scale", default=0.1), fields.integer("floor_scale", default=8192)
    return QueryScaling(beta=beta, length=length, offset=1)


def _moe(fields: Fields) -> Moe:
    moe = config_readers.moe(fields, "num_local_experts", size="intermediate_size", renormalize=False)
    return replace(moe, score="sigmoid", scales_input=True, shared_size=moe.size)


def _rotated_layers(fields: Fields, num_layers: int) -> list[bool]:
    """`no_rope_layers` says 1 where a layer is rotated; an empty list is as good as none."""
    flags = fields.get("no_rope_layers") or None
    if flags is None:
        interval = fields.integer("no_rope_layer_interval", default=4)
        return [(i + 1) % interval != 0 for i in range(num_layers)]
    if not isinstance(flags, list) or len(flags) < num_layers or not all(is_int(f) and f in (0, 1) for f in flags):
        raise ValueError(
            f"{fields.file}: {fields.path}no_rope_layers must be a list of a 0 or 1 for each of the {num_layers} layers, "
            f"got {flags!r}"
        )
    return [flag == 1 for flag in flags[:num_layers]]


def _sparse_layers(fields: Fields, num_layers: int) -> list[int]:
    given = fields.layers("moe_layers", num_layers)
    if given is not None:
        return given
    step = fields.integer("interleave_moe_layer_step")
    return list(range(step - 1, num_layers, step))


def _vision(fields: Fields) -> tuple[Skipped, ...]:
    return (Skipped(pattern=r"(vision_model|multi_modal_projector)\..*", why="images are not supported"),)


LLAMA4 = Family(
    layers=layers,
    names=Names(
        prefixes=("language_model.model.", "model."),
        heads=("language_model.lm_head", "lm_head"),
        mlp="feed_forward.",
        moe="feed_forward.",
        router="router",
        fused_layout="columns",
        shared="shared_expert.",
    ),
    skipped=_vision,
)
