"""The text part of Kimi K2.5: Kimi K2, wrapped as Mistral's multimodal models are."""

from __future__ import annotations

from expertwire.engine.models import deepseek, mistral3
from expertwire.engine.models.family import Family

KIMI_K25 = Family(layers=deepseek.v3_layers, names=mistral3.WRAPPED, skipped=mistral3.without_vision)
