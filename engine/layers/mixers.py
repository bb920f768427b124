"""The layers of mixers, by their configurations.

T tokens, D model width.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType, ModuleType
from typing import Protocol, cast

from torch import Tensor

from expertwire.engine.layers import (
    attention,
    differential_attention,
    gated_delta_net,
    gated_memory,
    latent,
    mamba,
    mamba2,
)
from expertwire.engine.layers.step import LayerContext, Step
from expertwire.engine.loader.parameters import LoadedParameters, ParameterLayout
from expertwire.engine.models.mixer_configs import (
    AttentionConfig,
    DifferentialAttentionConfig,
    GatedDeltaNetConfig,
    GatedMemoryConfig,
    LatentAttentionConfig,
    Mamba2Config,
    MambaConfig,
    Mixer,
)
from expertwire.engine.models.model_config import TensorNames

# Each module has `declare`, for the parameters, and `bind`, which returns an object with `forward`, a `MixerLayer`.
_MODULES: Mapping[type[Mixer], ModuleType] = MappingProxyType(
    {
        AttentionConfig: attention,
        LatentAttentionConfig: latent,
        DifferentialAttentionConfig: differential_attention,
        Mamba2Config: mamba2,
        GatedDeltaNetConfig: gated_delta_net,
        MambaConfig: mamba,
        GatedMemoryConfig: gated_memory,
    }
)


class MixerLayer(Protocol):
    """A layer's first half: attention or a recurrent mixer."""

    def __call__(self, x_TD: Tensor, normed_TD: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """Return the residual sum `x + mixer(normed)` and its norm."""
        ...


def declare(layout: ParameterLayout, param: str, source: str, config: Mixer, names: TensorNames, width: int) -> None:
    """Declare the parameters of a layer whose tensors begin with `source`."""
    _MODULES[type(config)].declare(layout, param, source, config, names, width)


def bind(p: LoadedParameters, config: Mixer, context: LayerContext) -> MixerLayer:
    """Return the layer of the parameters that `declare` declared."""
    return cast(MixerLayer, _MODULES[type(config)].bind(p, config, context).forward)
