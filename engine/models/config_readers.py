"""Functions that several model families use to read a config.json; each raises ValueError as `HfConfig` does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from expertwire.engine.models.hf_config import HfConfig
from expertwire.engine.models.mixer_configs import AttentionConfig, Mixer, QueryScaling
from expertwire.engine.models.model_config import IgnoredTensors, LayerConfig, MlpConfig, MoeConfig
from expertwire.kernels.ops.variants import LinearScaling, Llama3, LongRope, Rope, Yarn
from expertwire.scheduler.config import is_number


def attention(
    hf: HfConfig, *, head_dim: Any = None, interleaved: bool = False, partial: float = 1.0, rotated: bool = True
) -> AttentionConfig:
    """Return grouped-query attention with rotary embedding, if `rotated`, without biases, norms or a window.

    Args:
        hf: the config.
        head_dim: the default of the field `head_dim`; None: hidden_size / num_attention_heads.
        interleaved: as `rope` has it.
        partial: as `rope` has it.
    """
    num_heads, num_kv_heads = head_counts(hf)
    size = _head_dim(hf, num_heads, head_dim)
    return AttentionConfig(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=size,
        rope=rope(hf, size, interleaved=interleaved, partial=partial) if rotated else None,
    )


def head_counts(hf: HfConfig) -> tuple[int, int]:
    """Return the numbers of query heads and of key and value heads."""
    num_heads, num_kv_heads = hf.integer("num_attention_heads"), hf.integer("num_key_value_heads")
    if num_heads % num_kv_heads:
        raise hf.error(f"num_attention_heads ({num_heads}) must be a multiple of num_key_value_heads ({num_kv_heads})")
    return num_heads, num_kv_heads


def dt_limits(hf: HfConfig) -> tuple[float, float]:
    """Return `time_step_limit`, the bounds of Mamba-2's time step; without a field there are none. Infinity may be a number or,
    as some tools write it, a string or an object."""
    limits = hf.get("time_step_limit")
    if limits is None:
        return 0.0, math.inf
    infinity = ("inf", "Infinity", {"__float__": "Infinity"})
    if isinstance(limits, list) and len(limits) == 2:
        low, high = (math.inf if limit in infinity else limit for limit in limits)
        if is_number(low) and (is_number(high) or high == math.inf) and 0 <= low < high:
            return float(low), float(high)
    raise hf.error(f"time_step_limit must be a list of two numbers >= 0, the second one larger, got {limits!r}")


def _head_dim(hf: HfConfig, num_heads: int, default: Any) -> int:
    size = hf.integer("head_dim", default=default)
    if size is None:
        hidden_size = hf.integer("hidden_size")
        if hidden_size % num_heads:
            raise hf.error(
                f"hidden_size ({hidden_size}) must be a multiple of num_attention_heads ({num_heads}) where head_dim is "
                "not given"
            )
        size = hidden_size // num_heads
    if size % 2:
        raise hf.error(f"head_dim must be even (rotary embedding), got {size}")
    return size


def dense(hf: HfConfig, attention: AttentionConfig) -> tuple[LayerConfig, ...]:
    """Return equal layers without experts."""
    layer = LayerConfig(mixer=attention, mlp=MlpConfig(intermediate_size=hf.integer("intermediate_size")))
    return (layer,) * hf.integer("num_hidden_layers")


def no_biases(hf: HfConfig, *names: str) -> None:
    """Check that flags are false or missing."""
    for name in names:
        hf.one_of(name, False, default=False)


def moe(hf: HfConfig, *names: str, size: str, renormalize: bool) -> MoeConfig:
    """Return experts that a softmax chooses and weighs, without biases and without a shared one.

    Args:
        hf: the config.
        names: fields of which the first that is present has the number of experts.
        size: field of an expert's intermediate size.
        renormalize: whether the weights of the chosen experts are scaled to a sum of one.
    """
    name = hf.first_present(*names)
    num_experts, top_k = hf.integer(name), hf.integer("num_experts_per_tok")
    if top_k > num_experts:
        raise hf.error(f"num_experts_per_tok ({top_k}) must be at most {name} ({num_experts})")
    return MoeConfig(num_experts=num_experts, top_k=top_k, intermediate_size=hf.integer(size), renormalize=renormalize)


def sparse_layers(hf: HfConfig, mixers: Sequence[Mixer], moe: MoeConfig) -> tuple[LayerConfig, ...]:
    """Return Qwen's layers: every `decoder_sparse_step`-th one has experts, unless `mlp_only_layers` has it; others are dense."""
    step, dense = hf.integer("decoder_sparse_step"), hf.layer_indices("mlp_only_layers", len(mixers)) or []
    sparse = [(i + 1) % step == 0 and i not in dense for i in range(len(mixers))]
    mlp = None if all(sparse) else MlpConfig(intermediate_size=hf.integer("intermediate_size"))
    return tuple(LayerConfig(mixer=mixers[i], mlp=moe if sparse[i] else mlp) for i in range(len(mixers)))


def window(hf: HfConfig) -> int | None:
    """Return `sliding_window`; None if it is missing or as long as the model's context."""
    size = hf.integer("sliding_window", default=None)
    return None if size is None or size >= hf.integer("max_position_embeddings") else size


def mtp_layers(hf: HfConfig, name: str) -> tuple[IgnoredTensors, ...]:
    """Return the layers for multi-token prediction, which follow the decoder's last one; field `name` has their number."""
    first, count = hf.integer("num_hidden_layers"), hf.integer(name, low=0, default=0)
    layers = "|".join(str(first + i) for i in range(count))
    why = "multi-token prediction is not used: each token is predicted by the decoder itself"
    return (IgnoredTensors(pattern=rf"model\.layers\.({layers})\..*", why=why),) if count else ()


def rope(hf: HfConfig, size: int, *, interleaved: bool = False, partial: float = 1.0) -> Rope:
    """Return the rotary embedding of heads of `size` numbers.

    `partial_rotary_factor` (by default `partial`) is the fraction of a head that is rotated.
    """
    scaling = _rope_section(hf)
    theta = (scaling if scaling.get("rope_theta") is not None else hf).number("rope_theta")
    partial = (scaling if scaling.get("partial_rotary_factor") is not None else hf).number(
        "partial_rotary_factor", default=partial
    )
    rotated = int(size * min(partial, 1.0))
    if partial > 1 or rotated % 2 or not rotated:
        raise hf.error(f"partial_rotary_factor must leave an even part of {size} numbers, got {partial!r}")
    return Rope(theta=theta, size=rotated, interleaved=interleaved, scaling=_scaling(hf, scaling, rotated // 2))


def query_scaling(hf: HfConfig) -> QueryScaling:
    """Return the query scaling of Ministral 3 and Mistral 4: `llama_4_scaling_beta` among the rope parameters."""
    scaling = _rope_section(hf)
    return QueryScaling(
        beta=scaling.number("llama_4_scaling_beta", low=0), length=scaling.integer("original_max_position_embeddings")
    )


def _rope_section(hf: HfConfig) -> HfConfig:
    return hf.section("rope_parameters" if hf.get("rope_parameters") else "rope_scaling")


def _scaling(hf: HfConfig, scaling: HfConfig, pairs: int) -> Yarn | Llama3 | LinearScaling | LongRope | None:
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    match kind:
        case "default":
            return None
        case "linear":
            return LinearScaling(factor=scaling.number("factor"))
        case "llama3":
            return _llama3(scaling)
        case "yarn":
            return _yarn(scaling)
        case "longrope" | "su":
            return _long_rope(hf, scaling, pairs)
    raise scaling.error(f"rope_type must be default, linear, llama3, yarn or longrope, got {kind!r}")


def _llama3(scaling: HfConfig) -> Llama3:
    low, high = scaling.number("low_freq_factor"), scaling.number("high_freq_factor")
    if low > high:  # Llama 4 Scout's are equal
        raise scaling.error(f"high_freq_factor ({high:g}) must be at least low_freq_factor ({low:g})")
    return Llama3(
        factor=scaling.number("factor"),
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position=scaling.integer("original_max_position_embeddings"),
    )


def _yarn(scaling: HfConfig) -> Yarn:
    return Yarn(
        factor=scaling.number("factor"),
        original_max_position=scaling.integer("original_max_position_embeddings"),
        beta_fast=scaling.number("beta_fast", default=32.0),
        beta_slow=scaling.number("beta_slow", default=1.0),
        mscale=scaling.number("mscale", low=0, default=None),
        mscale_all_dim=scaling.number("mscale_all_dim", low=0, default=None),
        attention_factor=scaling.number("attention_factor", default=None),
        truncate=scaling.flag("truncate", default=True),
    )


def _long_rope(hf: HfConfig, scaling: HfConfig, pairs: int) -> LongRope:
    owner = scaling if scaling.get("original_max_position_embeddings") is not None else hf
    return LongRope(
        short_factor=scaling.numbers("short_factor", pairs),
        long_factor=scaling.numbers("long_factor", pairs),
        original_max_position=owner.integer("original_max_position_embeddings"),
        max_position=hf.integer("max_position_embeddings"),
        attention_factor=scaling.number("attention_factor", default=None),
    )
