"""Scales of a layer's fp8 KV cache from the checkpoint, if it has any: one a tensor, or one a key/value head.

Names, by the tools that write them, as vLLM's `maybe_remap_kv_scale_name` (model_loader/weight_utils.py) and
`get_cache_scale` know them: `self_attn.k_scale` (compressed-tensors; per head [G, 1, 1], vLLM's pull request
30141), `self_attn.k_proj.k_scale` (ModelOpt), `self_attn.k_proj.output_scale` (Quark, older compressed-tensors),
`self_attn.kv_scale` (AutoFP8: of both). A latent takes the keys' scale, which SGLang also finds as
`kv_a_proj_with_mqa.k_scale`. Scales of queries, and zero points, which are zeros, are not read.

G key/value heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from expertwire.engine.loader.param_specs import ParamSpec
from expertwire.engine.loader.parameters import Destination, LoadedParameters, ParameterLayout

_NAMES = {
    "k": ("attn.k_scale", "k_scale", "k_proj.k_scale", "qkv_proj.k_scale", "k_proj.output_scale", "kv_scale"),
    "v": ("attn.v_scale", "v_scale", "v_proj.v_scale", "qkv_proj.v_scale", "v_proj.output_scale", "kv_scale"),
}
_LATENT = ("kv_a_proj_with_mqa.k_scale",)
_UNREAD = ("attn.q_scale", "q_scale", "q_proj.output_scale", "q_zero_point", "k_zero_point", "v_zero_point")


def declare(layout: ParameterLayout, param: str, source: str, num_heads: int, *, is_latent: bool, fp8: bool) -> None:
    """Declare the scales of a layer whose tensors begin with `source`; `fp8`: whether its cache is fp8."""
    for which, names in _NAMES.items():
        candidates = [source + name for name in (*names, *(_LATENT if is_latent else ()))]
        layout.ignore(*candidates)
        found = next((name for name in candidates if layout.has(name)), None)
        if found is None or not fp8 or (is_latent and which == "v"):
            continue
        scale = f"{param}{which}_scale"
        layout.specs[scale] = ParamSpec(shape=(num_heads,), fan_in=None, dtype=torch.float32)
        region = (slice(0, num_heads),)
        shapes = [(), (1,), (1, 1), (num_heads, 1), (num_heads, 1, 1)]
        layout.assign(found, Destination(param=scale, region=region, repeated=True), shapes=shapes)
    layout.ignore(*(source + name for name in _UNREAD))


def bind(p: LoadedParameters, num_heads: int, like: Tensor) -> Tensor:
    """Return fp32 [2, G], scales of keys and values on the device of `like`; 1.0 where the checkpoint has none.

    Raises:
        ValueError: a scale is not a positive number.
    """
    ones_G = like.new_ones(num_heads, dtype=torch.float32)
    scales_G = {name: p.maybe(name) for name in ("k_scale", "v_scale")}
    for name, scale_G in scales_G.items():
        if scale_G is not None and not (scale_G.isfinite() & (scale_G > 0)).all():
            raise ValueError(
                f"{p.name(name)} must be positive and finite for kv_cache_dtype 'fp8', the checkpoint has "
                f"{scale_G.tolist()}; use kv_cache_dtype 'auto'"
            )
    return torch.stack([ones_G if scale_G is None else scale_G for scale_G in scales_G.values()])
