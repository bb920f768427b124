"""Qwen2 and Qwen2.5, dense: biases of queries, keys and values; upper layers may have a sliding window."""

from __future__ import annotations

from dataclasses import replace

from expertwire.engine.models import config_readers
from expertwire.engine.models.hf_config import HfConfig
from expertwire.engine.models.mixer_configs import AttentionConfig
from expertwire.engine.models.model_config import LayerConfig, MlpConfig, ModelFamily


def layers(hf: HfConfig) -> tuple[LayerConfig, ...]:
    return layers_with(hf, replace(config_readers.attention(hf), qkv_bias=True))


def layers_with(hf: HfConfig, attention: AttentionConfig) -> tuple[LayerConfig, ...]:
    """Return dense layers with this attention, of which some have a sliding window."""
    num_layers = hf.integer("num_hidden_layers")
    mlp = MlpConfig(intermediate_size=hf.integer("intermediate_size"))
    slides = [False] * num_layers
    if hf.flag("use_sliding_window", default=False):
        types = hf.choices("layer_types", num_layers, "full_attention", "sliding_attention")
        # Without a list, the layers from max_window_layers on have a sliding window.
        first = hf.integer("max_window_layers", low=0) if types is None else num_layers
        slides = [i >= first if types is None else types[i] == "sliding_attention" for i in range(num_layers)]
    sliding = replace(attention, window=config_readers.window(hf)) if any(slides) else attention
    return tuple(LayerConfig(mixer=sliding if slide else attention, mlp=mlp) for slide in slides)


QWEN2 = ModelFamily(layers=layers)
