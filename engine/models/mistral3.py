"""The text model of Mistral's multimodal models, of the kind in `text_config.model_type`; the vision tower is not loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from expertwire.engine.models import mistral, mistral4
from expertwire.engine.models.hf_config import HfConfig
from expertwire.engine.models.model_config import IgnoredTensors, LayerConfig, ModelFamily, TensorNames

_TEXT: Mapping[str, Callable[[HfConfig], tuple[LayerConfig, ...]]] = MappingProxyType(
    {"mistral": mistral.mistral_layers, "ministral3": mistral.ministral3_layers, "mistral4": mistral4.layers}
)


def _layers(hf: HfConfig) -> tuple[LayerConfig, ...]:
    return _TEXT[hf.one_of("model_type", *_TEXT)](hf)


VISION = (
    IgnoredTensors(
        pattern=r"(model\.)?(vision_tower|multi_modal_projector|mm_projector)\..*",
        why="images are not read: only the text model runs",
    ),
)
NAMES = TensorNames(
    prefixes=("language_model.model.", "model.language_model."), heads=("language_model.lm_head", "lm_head")
)
MISTRAL3 = ModelFamily(layers=_layers, names=NAMES, ignored_tensors=VISION)
