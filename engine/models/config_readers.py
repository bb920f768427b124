"""Values of a config.json that several families share; each takes `Fields` and raises ValueError as they do."""

from __future__ import annotations

from typing import Any

from expertwire.engine.config.fields import REQUIRED, Fields
from expertwire.engine.models.model_config import Attention, Layer, Mlp, Moe, QueryScaling, Skipped
from expertwire.kernels.ops.variants import Linear, Llama3, LongRope, Rope, Yarn


def heads(fields: Fields) -> tuple[int, int]:
    """Query heads and key/value heads."""
    num_heads, num_kv_heads = fields.integer("num_attention_heads"), fields.integer("num_key_value_heads")
    if num_heads % num_kv_heads:
        raise ValueError(
            f"{fields.file}: {fields.path}num_attention_heads ({num_heads}) must be a multiple of num_key_value_heads "
            f"({num_kv_heads})"
        )
    return num_heads, num_kv_heads


def head_dim(fields: Fields, default: Any = REQUIRED) -> int:
    """`head_dim`; with a default of None it may be missing, which means hidden_size / num_attention_heads."""
    size = fields.integer("head_dim", default=default)
    if size is None:
        hidden_size, num_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
        if hidden_size % num_heads:
            raise ValueError(
                f"{fields.file}: {fields.path}hidden_size ({hidden_size}) must be a multiple of num_attention_heads "
                f"({num_heads}) where head_dim is not given"
            )
        size = hidden_size // num_heads
    if size % 2:
        raise ValueError(f"{fields.file}: {fields.path}head_dim must be even (rotary embedding), got {size}")
    return size


def attention(
    fields: Fields, *, default_size: Any = None, interleaved: bool = False, partial: float = 1.0
) -> Attention:
    """Of the plain kind: rotated heads, no biases, no norms, no window. `default_size`: of `head_dim`; the rest: of `rope`."""
    num_heads, num_kv_heads = heads(fields)
    size = head_dim(fields, default=default_size)
    return Attention(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=size,
        rope=rope(fields, size, interleaved=interleaved, partial=partial),
    )


def dense(fields: Fields, attention: Attention) -> tuple[Layer, ...]:
    """Equal layers without experts."""
    layer = Layer(attention=attention, mlp=Mlp(size=fields.integer("intermediate_size")))
    return (layer,) * fields.integer("num_hidden_layers")


def no_biases(fields: Fields, *names: str) -> None:
    """Flags that must be false or missing."""
    for name in names:
        fields.one_of(name, False, default=False)


def moe(fields: Fields, *names: str, size: str, renormalize: bool) -> Moe:
    """Of the plain kind: experts chosen and weighed by a softmax, no biases, none shared. Their number is in the first of the
    fields `names` that is there, their inner width in the field `size`."""
    name = fields.first(*names)
    num_experts, top_k = fields.integer(name), fields.integer("num_experts_per_tok")
    if top_k > num_experts:
        raise ValueError(
            f"{fields.file}: {fields.path}num_experts_per_tok ({top_k}) must be at most {name} ({num_experts})"
        )
    return Moe(num_experts=num_experts, top_k=top_k, size=fields.integer(size), renormalize=renormalize)


def window(fields: Fields) -> int | None:
    """`sliding_window`; None if it is missing or hides nothing."""
    size = fields.integer("sliding_window", default=None)
    return None if size is None or size >= fields.integer("max_position_embeddings") else size


def predictors(fields: Fields, name: str) -> tuple[Skipped, ...]:
    """The layers behind the last one, as many as this field says, which predict a further token each."""
    first, count = fields.integer("num_hidden_layers"), fields.integer(name, low=0, default=0)
    layers = "|".join(str(first + i) for i in range(count))
    why = "multi-token prediction is not used: each token is predicted by the decoder itself"
    return (Skipped(pattern=rf"model\.layers\.({layers})\..*", why=why),) if count else ()


def rope(fields: Fields, size: int, *, interleaved: bool = False, partial: float = 1.0) -> Rope:
    """Of heads of `size` numbers: `partial_rotary_factor` says how many are rotated, and `partial` does if it is missing."""
    found = _rope_fields(fields)
    theta = (found if found.get("rope_theta") is not None else fields).number("rope_theta")
    partial = (found if found.get("partial_rotary_factor") is not None else fields).number(
        "partial_rotary_factor", default=partial
    )
    rotated = int(size * min(partial, 1.0))
    if partial > 1 or rotated % 2 or not rotated:
        raise ValueError(
            f"{fields.file}: {fields.path}partial_rotary_factor must leave an even part of {size} numbers, got {partial!r}"
        )
    return Rope(theta=theta, size=rotated, interleaved=interleaved, scaling=_scaling(fields, found, rotated // 2))


def query_scaling(fields: Fields) -> QueryScaling:
    """`llama_4_scaling_beta` of Ministral 3 and Mistral 4, beside what scales the frequencies."""
    found = _rope_fields(fields)
    return QueryScaling(
        beta=found.number("llama_4_scaling_beta", low=0), length=found.integer("original_max_position_embeddings")
    )


def _rope_fields(fields: Fields) -> Fields:
    return fields.inner("rope_parameters" if fields.get("rope_parameters") else "rope_scaling")


def _scaling(fields: Fields, found: Fields, pairs: int) -> Yarn | Llama3 | Linear | LongRope | None:
    kind = found.get("rope_type") or found.get("type") or "default"
    match kind:
        case "default":
            return None
        case "linear":
            return Linear(factor=found.number("factor"))
        case "llama3":
            return _llama3(found)
        case "yarn":
            return _yarn(found)
        case "longrope" | "su":
            return _long_rope(fields, found, pairs)
    raise ValueError(
        f"{fields.file}: {found.path}rope_type must be default, linear, llama3, yarn or longrope, got {kind!r}"
    )


def _llama3(found: Fields) -> Llama3:
    low, high = found.number("low_freq_factor"), found.number("high_freq_factor")
    if low > high:  # Llama 4 Scout's are equal
        raise ValueError(
            f"{found.file}: {found.path}high_freq_factor ({high:g}) must be at least low_freq_factor ({low:g})"
        )
    return Llama3(
        factor=found.number("factor"),
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position=found.integer("original_max_position_embeddings"),
    )


def _yarn(found: Fields) -> Yarn:
    return Yarn(
        factor=found.number("factor"),
        original_max_position=found.integer("original_max_position_embeddings"),
        beta_fast=found.number("beta_fast", default=32.0),
        beta_slow=found.number("beta_slow", default=1.0),
        mscale=found.number("mscale", low=0, default=None),
        mscale_all_dim=found.number("mscale_all_dim", low=0, default=None),
        attention_factor=found.number("attention_factor", default=None),
        truncate=found.flag("truncate", default=True),
    )


def _long_rope(fields: Fields, found: Fields, pairs: int) -> LongRope:
    owner = found if found.get("original_max_position_embeddings") is not None else fields
    return LongRope(
        short_factor=found.numbers("short_factor", pairs),
        long_factor=found.numbers("long_factor", pairs),
        original_max_position=owner.integer("original_max_position_embeddings"),
        max_position=fields.integer("max_position_embeddings"),
        attention_factor=found.number("attention_factor", default=None),
    )
