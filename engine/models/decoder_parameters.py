"""The parameters of a decoder on one rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from expertwire.engine.layers import attention, experts, kv_scales, latent, mlp
from expertwire.engine.loader.checkpoint import StoredTensor
from expertwire.engine.loader.parameters import ParameterLayout
from expertwire.engine.models.model_config import AttentionConfig, MlpConfig, ModelConfig, MoeConfig, TensorNames


def declare_parameters(
    config: ModelConfig, stored: Mapping[str, StoredTensor] | None, experts_of: Callable[[int], Sequence[int]]
) -> ParameterLayout:
    """Return the parameters of a rank.

    Args:
        config: the model.
        stored: the checkpoint's tensors; None: there is no checkpoint, and the config names the formats.
        experts_of: returns the logical experts of a layer that the rank holds, in order.
    """
    layout = ParameterLayout(stored=stored, quantization=config.quantization)
    names, width = config.tensor_names, config.hidden_size
    prefix = layout.first_stored(names.prefixes, "embed_tokens.weight")
    head = layout.first_stored(names.heads, ".weight")
    layout.matrix("embed", (prefix + "embed_tokens", config.vocab_size), columns=width, quantized=False)
    for i, layer in enumerate(config.layers):
        source, param = f"{prefix}layers.{i}.", f"layers.{i}."
        layout.vector(param + "input_norm", (source + "input_layernorm.weight", width))
        layout.vector(param + "post_norm", (source + "post_attention_layernorm.weight", width))
        if isinstance(layer.attention, AttentionConfig):
            attention.declare(layout, param, source, layer.attention, names, width)
            num_kv_heads, is_latent = layer.attention.num_kv_heads, False
        else:
            latent.declare(layout, param, source, layer.attention, names, width)
            num_kv_heads, is_latent = 1, True
        fp8 = config.kv_cache_dtype == "fp8"
        kv_scales.declare(layout, param, source + "self_attn.", num_kv_heads, is_latent=is_latent, fp8=fp8)
        if isinstance(layer.mlp, MlpConfig):
            mlp.declare(layout, param, source + names.mlp, layer.mlp.intermediate_size, names, width)
        else:
            _declare_moe(layout, param, source + names.moe, layer.mlp, names, width, experts_of(i))
    layout.vector("norm", (prefix + "norm.weight", width))
    if config.tie_word_embeddings:
        layout.ignore(head + ".weight")  # some checkpoints have it nevertheless
    else:
        layout.matrix("lm_head", (head, config.vocab_size), columns=width)
    return layout


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
    experts.declare(layout, param, source, moe, names, width, here)
    if moe.shared_intermediate_size:
        mlp.declare(layout, param + "shared.", source + names.shared, moe.shared_intermediate_size, names, width)
