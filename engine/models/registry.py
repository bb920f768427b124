"""Which class runs which architecture: adding a model is a file beside this one and a line here."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from expertwire.engine.config import ModelConfig
from expertwire.engine.decoder import Decoder, RankContext
from expertwire.engine.models.mixtral import Mixtral
from expertwire.engine.models.qwen3 import Qwen3
from expertwire.engine.models.qwen3_moe import Qwen3Moe

_MODELS: Mapping[str, type[Decoder]] = MappingProxyType(
    {"MixtralForCausalLM": Mixtral, "Qwen3ForCausalLM": Qwen3, "Qwen3MoeForCausalLM": Qwen3Moe}
)


def build(config: ModelConfig, context: RankContext) -> Decoder:
    """The model, without parameters yet."""
    return _MODELS[config.architecture](config, context)
