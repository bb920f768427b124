"""The parameters of a decoder on one rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from expertwire.engine.layers import experts, head, kv_scales, mixers, mlp
from expertwire.engine.loader.checkpoint import StoredTensor
from expertwire.engine.loader.parameters import ParameterLayout
from expertwire.engine.models.mixer_configs import (
    AttentionConfig,
    DifferentialAttentionConfig,
    LatentAttentionConfig,
)
from expertwire.engine.models.model_config import MlpConfig, ModelConfig, MoeConfig, TensorNames


def norm_names(config: ModelConfig) -> list[str]:
    """Return the parameters of the norms before each half of each layer, and of the last one."""
    names = []
    for i, layer in enumerate(config.layers):
        names += [f"layers.{i}.input_norm"] * (layer.mixer is not None)
        names += [f"layers.{i}.post_norm"] * (layer.mlp is not None)
    return [*names, "norm"]


def declare_parameters(
    config: ModelConfig, stored: Mapping[str, StoredTensor] | None, experts_of: Callable[[int], Sequence[int]]
) -> ParameterLayout:
    """Return the parameters of a rank.

    Args:
        config: the model.
        stored: the checkpoint's tensors; None: there is no checkpoint, and the config names the formats.
        experts_of: returns the logical experts of a layer that the rank holds, in order.
    """
    layout = ParameterLayout(
        stored=stored, quantization=config.quantization, zero_centred_norms=config.zero_centred_norms
    )
    names, width = config.tensor_names, config.hidden_size
    prefix = layout.first_stored(names.prefixes, names.embed + ".weight")
    layout.matrix("embed", (prefix + names.embed, config.vocab_size), columns=width, quantized=False)
    for i, layer in enumerate(config.layers):
        source, param = f"{prefix}layers.{i}.", f"layers.{i}."
        if layer.mixer is not None:
            _declare_norm(layout, param + "input_norm", source + names.input_norm, config)
            mixers.declare(layout, param, source, layer.mixer, names, width)
            _declare_kv_scales(layout, i, prefix, config)
        if layer.mlp is not None:
            _declare_norm(layout, param + "post_norm", source + names.post_norm, config)
        if isinstance(layer.mlp, MlpConfig):
            mlp.declare(layout, param, source + names.mlp, layer.mlp, names, width)
        elif layer.mlp is not None:
            _declare_moe(layout, param, source + names.moe, layer.mlp, names, width, experts_of(i))
    _declare_norm(layout, "norm", prefix + names.norm, config)
    head.declare(layout, config)
    return layout


def _declare_norm(layout: ParameterLayout, param: str, module: str, config: ModelConfig) -> None:
    width = config.hidden_size
    layout.norm(param, (module + ".weight", width))
    if config.norm == "layer":
        layout.vector(param + "_bias", (module + ".bias", width), fan_in=width)


def _declare_kv_scales(layout: ParameterLayout, i: int, prefix: str, config: ModelConfig) -> None:
    """Declare the scales of the fp8 cache that layer i reads."""
    mixer, owner = config.layers[i].mixer, i
    if isinstance(mixer, DifferentialAttentionConfig):
        num_heads, owner = mixer.num_kv_heads // 2, i if mixer.kv_layer is None else mixer.kv_layer
    elif isinstance(mixer, AttentionConfig):
        num_heads = mixer.num_kv_heads
    elif isinstance(mixer, LatentAttentionConfig):
        num_heads = 1
    else:
        return
    source = f"{prefix}layers.{owner}.{config.tensor_names.attention}"
    is_latent, fp8 = isinstance(mixer, LatentAttentionConfig), config.kv_cache_dtype == "fp8"
    kv_scales.declare(layout, f"layers.{i}.", source, num_heads, is_latent=is_latent, fp8=fp8)


def _declare_moe(
    layout: ParameterLayout,
    param: str,
    source: str,
    moe: MoeConfig,
    names: TensorNames,
    width: int,
    here: Sequence[int],
) -> None:
    router, number = source + names.router, moe.num_experts
    dtype = torch.float32 if moe.router_fp32 else None
    layout.matrix(param + "router", (router, number), columns=width, dtype=dtype, quantized=False)
    if moe.router_bias:
        layout.vector(param + "router_bias", (router + ".bias", number), fan_in=width)
    if moe.choice_bias:
        bias = source + names.choice_bias, number
        layout.vector(param + "choice_bias", bias, fan_in=number, dtype=torch.float32)
    if moe.latent_size:
        into, out_of = (source + name for name in names.latent)
        layout.matrix(param + "latent_in", (into, moe.latent_size), columns=width)
        layout.matrix(param + "latent_out", (out_of, width), columns=moe.latent_size)
    experts.declare(layout, param, source, moe, names, moe.latent_size or width, here)
    if moe.shared_intermediate_size:
        shared = MlpConfig(intermediate_size=moe.shared_intermediate_size, activation=moe.activation)
        mlp.declare(layout, param + "shared.", source + names.shared, shared, names, width)
        if moe.shared_gate:
            gate = source + names.shared_gate, 1
            layout.matrix(param + "shared.gate", gate, columns=width, quantized=False)
