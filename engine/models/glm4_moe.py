"""GLM-4.5, 4.5-Air, 4.6 and 4.7: rotary embedding of half a head, biases of query, key and value but not of the output,
DeepSeek-V3's experts."""

from __future__ import annotations

from dataclasses import replace

from expertwire.engine.models import config_readers, deepseek
from expertwire.engine.models.hf_config import HfConfig
from expertwire.engine.models.model_config import LayerConfig, ModelFamily


def layers(hf: HfConfig) -> tuple[LayerConfig, ...]:
    normed = hf.flag("use_qk_norm")
    attention = replace(
        config_readers.attention(hf, partial=0.5),
        qkv_bias=hf.flag("attention_bias"),
        qk_norm="head" if normed else "none",
    )
    return deepseek.stack(hf, attention, deepseek.biased_experts(hf))


GLM4_MOE = ModelFamily(layers=layers, mtp_field=deepseek.MTP_FIELD)
