"""Mistral and Ministral.

Mistral 7B, Nemo and Small are Llama with a sliding window; Ministral 3 scales queries by position. Mistral Small 4 has latent
attention with queries scaled by position, and experts with a shared one. Of multimodal models the text model is loaded, of
the kind in `text_config.model_type`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType

from expertwire.engine.models import config_readers, deepseek
from expertwire.engine.models.hf_config import HfConfig
from expertwire.engine.models.model_config import IgnoredTensors, LayerConfig, ModelFamily, TensorNames


def _mistral_layers(hf: HfConfig) -> tuple[LayerConfig, ...]:
    return config_readers.dense(hf, replace(config_readers.attention(hf), window=config_readers.window(hf)))


def _ministral3_layers(hf: HfConfig) -> tuple[LayerConfig, ...]:
    attention = replace(
        config_readers.attention(hf),
        window=config_readers.window(hf),
        query_scaling=config_readers.query_scaling(hf),
    )
    return config_readers.dense(hf, attention)


def _mistral4_layers(hf: HfConfig) -> tuple[LayerConfig, ...]:
    attention = deepseek.latent_attention(hf, query_scaling=config_readers.query_scaling(hf))
    renormalize = hf.flag("norm_topk_prob")
    moe = deepseek.experts(hf, "num_local_experts", by="two_best", renormalize=renormalize)
    return deepseek.stack(hf, attention, moe)


_TEXT_MODELS: Mapping[str, Callable[[HfConfig], tuple[LayerConfig, ...]]] = MappingProxyType(
    {"mistral": _mistral_layers, "ministral3": _ministral3_layers, "mistral4": _mistral4_layers}
)


def _text_layers(hf: HfConfig) -> tuple[LayerConfig, ...]:
    return _TEXT_MODELS[hf.one_of("model_type", *_TEXT_MODELS)](hf)


MULTIMODAL_NAMES = TensorNames(
    prefixes=("language_model.model.", "model.language_model."), heads=("language_model.lm_head", "lm_head")
)
VISION_TENSORS = (
    IgnoredTensors(
        pattern=r"(model\.)?(vision_tower|multi_modal_projector|mm_projector)\..*",
        why="images are not read: only the text model runs",
    ),
)
MISTRAL = ModelFamily(layers=_mistral_layers)
MINISTRAL3 = ModelFamily(layers=_ministral3_layers)
MISTRAL3 = ModelFamily(layers=_text_layers, names=MULTIMODAL_NAMES, ignored_tensors=VISION_TENSORS)
MISTRAL4 = ModelFamily(layers=_mistral4_layers)
