"""GLM-4.5, 4.5-Air, 4.6 and 4.7: half of a head rotated, biases on query, key and value but not on the output, DeepSeek-V3's
experts."""

from __future__ import annotations

from dataclasses import replace

from expertwire.engine.config.fields import Fields
from expertwire.engine.models import config_readers, deepseek
from expertwire.engine.models.family import Family
from expertwire.engine.models.model_config import Layer


def layers(fields: Fields) -> tuple[Layer, ...]:
    normed = fields.flag("use_qk_norm")
    attention = replace(
        config_readers.attention(fields, partial=0.5),
        qkv_bias=fields.flag("attention_bias"),
        qk_norm="head" if normed else "none",
    )
    return deepseek.stack(fields, attention, deepseek.biased_experts(fields))


GLM4_MOE = Family(layers=layers, skipped=deepseek.predictors)
