"""Phi-4-mini-flash (SambaY): Mamba and windows of differential attention, then layers that read one cache and one memory.

Of n layers the even ones are Mamba up to layer n/2, whose scan is the memory of the gated memory units behind it. The odd ones
are differential attention: in a window below n/2, to all tokens in layer n/2 + 1, whose keys and values those behind it read.
There are no positions. Ren et al., "Decoder-Hybrid-Decoder Architecture for Efficient Reasoning with Long Generation" (2025).

The published class's defaults hold for fields that the hub's config leaves out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from expertwire.engine.models import config_readers
from expertwire.engine.models.hf_config import HfConfig
from expertwire.engine.models.mixer_configs import DifferentialAttentionConfig, GatedMemoryConfig, MambaConfig
from expertwire.engine.models.model_config import LayerConfig, MlpConfig, ModelFamily, TensorNames
from expertwire.scheduler.config import is_int


def _layers(hf: HfConfig) -> tuple[LayerConfig, ...]:
    config_readers.no_biases(hf, "mlp_bias", "lm_head_bias", "mamba_proj_bias")
    hf.one_of("mb_per_layer", 2)
    hf.one_of("mamba_conv_bias", True, default=True)
    count = hf.integer("num_hidden_layers")
    if count % 4:
        raise hf.error(f"num_hidden_layers must be a multiple of 4, got {count}")
    mlp = MlpConfig(intermediate_size=hf.integer("intermediate_size"))
    mixers = [_attention(hf, i, count) if i % 2 else _recurrent(hf, i, count // 2) for i in range(count)]
    return tuple(LayerConfig(mixer=mixer, mlp=mlp) for mixer in mixers)


def _recurrent(hf: HfConfig, i: int, last: int) -> MambaConfig | GatedMemoryConfig:
    """Return an even layer's mixer; `last`: the last of Mamba."""
    width = hf.integer("hidden_size")
    inner = hf.integer("mamba_expand", default=2) * width
    if i > last:
        return GatedMemoryConfig(inner_size=inner, memory_layer=last)
    automatic = hf.get("mamba_dt_rank") in (None, "auto")
    return MambaConfig(
        inner_size=inner,
        state_size=hf.integer("mamba_d_state", default=16),
        dt_rank=-(-width // 16) if automatic else hf.integer("mamba_dt_rank"),
        conv_kernel=hf.integer("mamba_d_conv", low=2, default=4),
        gives_memory=i == last,
    )


def _attention(hf: HfConfig, i: int, count: int) -> DifferentialAttentionConfig:
    """Return an odd layer's attention."""
    num_heads, num_kv_heads = config_readers.head_counts(hf)
    width, full = hf.integer("hidden_size"), count // 2 + 1
    for name, number in (("num_attention_heads", num_heads), ("num_key_value_heads", num_kv_heads)):
        if number % 2:
            raise hf.error(f"{name} must be even, as heads are pairs, got {number}")
    if width % num_heads:
        raise hf.error(f"hidden_size ({width}) must be a multiple of num_attention_heads ({num_heads})")
    return DifferentialAttentionConfig(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=width // num_heads,
        lambda_init=0.8 - 0.6 * math.exp(-0.3 * i),
        window=_window(hf, i, count) if i < full else None,
        kv_layer=full if i > full else None,
    )


def _window(hf: HfConfig, i: int, count: int) -> int | None:
    """Return a layer's entry of `sliding_window`, which is a number or a list with an entry for each layer."""
    windows = hf.get("sliding_window")
    if not isinstance(windows, list):
        return hf.integer("sliding_window")
    valid = len(windows) == count and all(window is None or (is_int(window) and window > 0) for window in windows)
    if valid and not any(windows[count // 2 + 1 :: 2]):
        return windows[i]
    raise hf.error(
        f"sliding_window must be an integer >= 1, or a list of one for each of {count} layers, null for attention from layer "
        f"{count // 2} on, got {windows!r}"
    )


def _fields(hf: HfConfig) -> Mapping[str, Any]:
    return {
        "rms_norm_eps": hf.number("layer_norm_eps"),
        "norm": "layer",
        "tie_word_embeddings": hf.flag("tie_word_embeddings", default=True),
    }


PHI4_FLASH = ModelFamily(
    layers=_layers,
    names=TensorNames(
        norm="final_layernorm",
        attention="attn.",
        qkv=("attn.Wqkv",),
        output="attn.out_proj",
        mamba="attn.",
        gate_up="fc1",
        down="fc2",
    ),
    fields=_fields,
)
