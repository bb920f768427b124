"""The text model of Kimi K2.5: Kimi K2 in a multimodal checkpoint like Mistral's."""

from __future__ import annotations

from expertwire.engine.models import deepseek, mistral
from expertwire.engine.models.model_config import ModelFamily

KIMI_K25 = ModelFamily(
    layers=deepseek.v3_layers, names=mistral.MULTIMODAL_NAMES, ignored_tensors=mistral.VISION_TENSORS
)
