"""The text part of Mistral's multimodal models; `text_config.model_type` says what it is. The vision tower is skipped."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from expertwire.engine.config.fields import Fields
from expertwire.engine.models import mistral, mistral4
from expertwire.engine.models.family import Family, Names
from expertwire.engine.models.model_config import Layer, Skipped

_TEXT: Mapping[str, Callable[[Fields], tuple[Layer, ...]]] = MappingProxyType(
    {"mistral": mistral.mistral_layers, "ministral3": mistral.ministral3_layers, "mistral4": mistral4.layers}
)


def _layers(fields: Fields) -> tuple[Layer, ...]:
    return _TEXT[fields.one_of("model_type", *_TEXT)](fields)


def without_vision(fields: Fields) -> tuple[Skipped, ...]:
    why = "images are not read: only the text model runs"
    return (Skipped(pattern=r"(model\.)?(vision_tower|multi_modal_projector|mm_projector)\..*", why=why),)


WRAPPED = Names(
    prefixes=("language_model.model.", "model.language_model."), heads=("language_model.lm_head", "lm_head")
)
MISTRAL3 = Family(layers=_layers, names=WRAPPED, skipped=without_vision)
