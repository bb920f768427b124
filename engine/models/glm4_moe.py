"""GLM-4.5, 4.5-Air, 4.6 and 4.7: half of a head rotated, biases on query, key and value but not on the output, DeepSeek-V3's
experts."""

from __future__ import annotations

from expertwire.engine import readers
from expertwire.engine.family import Family
from expertwire.engine.fields import Fields
from expertwire.engine.model_config import Attention, Layer
from expertwire.engine.models import deepseek


def layers(fields: Fields) -> tuple[Layer, ...]:
    num_heads, num_kv_heads = readers.heads(fields)
    head_dim = readers.head_dim(fields, default=None)
    attention = Attention(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rope=readers.rope(fields, head_dim, partial=0.5),
        qkv_bias=fields.flag("attention_bias"),
        qk_norm="head" if fields.flag("use_qk_norm") else "none",
    )
    return deepseek.stack(fields, attention, deepseek.biased_experts(fields))


GLM4_MOE = Family(layers=layers, skipped=deepseek.predictors)
