"""How published checkpoints store quantised matrices: the names of their tensors and what their config calls it.

Formats are those of `kernels.formats`. Activations stay as they are: scales of theirs are known and not read.

Sources: DeepSeek-V3's README_WEIGHTS.md (fp8), the quantisers of transformers (fp8, mxfp4), compressed-tensors'
`pack_quantized` and `float_quantized` compressors, NVIDIA ModelOpt's unified checkpoint export.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from expertwire.engine.config.fields import Fields, read_json
from expertwire.engine.models.model_config import ITEM_SIZES, ModelConfig, Quantization

# What the data of quantised matrices is stored as.
PACKED_DTYPES = ("F8_E4M3", "I32", "U8", "I8")


@dataclass(frozen=True, kw_only=True)
class Method:
    """Names of the tensors of a matrix: the module's name and a suffix, or that of the fused experts of a layer and a suffix.

    `wide`: the scales are one number for a matrix or for a row, and are repeated for each row.
    """

    format: str
    data: str = ".weight"
    scales: str
    fused_data: str = ""
    fused_scales: str
    global_scales: str | None = None
    fused_global_scales: str | None = None
    wide: bool = False
    ignored: tuple[str, ...] = ()


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "fp8_block": Method(format="fp8_block", scales=".weight_scale_inv", fused_scales="_scale_inv"),
        "fp8_static": Method(
            format="fp8_row",
            scales=".weight_scale_inv",
            fused_scales="_scale_inv",
            wide=True,
            ignored=(".activation_scale", "_activation_scale"),
        ),
        "fp8_modelopt": Method(
            format="fp8_row",
            scales=".weight_scale",
            fused_scales="_weight_scale",
            wide=True,
            ignored=(".input_scale", "_input_scale", ".k_scale", ".v_scale"),
        ),
        "fp8_channel": Method(
            format="fp8_row",
            scales=".weight_scale",
            fused_scales="_weight_scale",
            wide=True,
            ignored=(".input_scale", "_input_scale"),
        ),
        "int4": Method(
            format="int4",
            data=".weight_packed",
            scales=".weight_scale",
            fused_data="_packed",
            fused_scales="_scale",
            ignored=(".weight_shape",),
        ),
        "mxfp4": Method(format="mxfp4", data=".weight", scales=".scale", fused_data="_blocks", fused_scales="_scales"),
        "fp8_ue8m0": Method(format="fp8_block", scales=".scale", fused_scales="_scale"),
        "nvfp4": Method(
            format="nvfp4",
            scales=".weight_scale",
            fused_scales="_weight_scale",
            global_scales=".weight_scale_2",
            fused_global_scales="_weight_scale_2",
            ignored=(".input_scale", "_input_scale", ".k_scale", ".v_scale"),
        ),
    }
)


def read(fields: Fields) -> Quantization | None:
    """Of config.json's `quantization_config`, or of ModelOpt's `hf_quant_config.json` beside it.

    Raises:
        ValueError: a method that is not supported: names the file, the field and what is allowed.
    """
    given = fields.get("quantization_config")
    beside = fields.file.with_name("hf_quant_config.json")
    if given is None and beside.exists():
        found = read_json(beside).get("quantization")
        if not isinstance(found, dict):
            raise ValueError(f"{beside}: quantization must be an object, got {found!r}")
        return _modelopt(Fields(beside, found, "quantization."))
    if given is None:
        return None
    if not isinstance(given, dict):
        raise ValueError(f"{fields.file}: quantization_config must be an object or null, got {given!r}")
    inner = fields.inner("quantization_config")
    match inner.get("quant_method"):
        case "fp8":
            return _fp8(inner, fields.get("expert_dtype"))
        case "mxfp4":
            return Quantization(linears=None, experts="mxfp4", skipped=_names(inner, "modules_to_not_convert"))
        case "compressed-tensors":
            return _compressed(inner)
        case "modelopt":
            return _modelopt(inner)
        case found:
            raise ValueError(
                f"{fields.file}: quantization_config.quant_method must be one of fp8, mxfp4, compressed-tensors, modelopt, "
                f"got {found!r}"
            )


def _fp8(fields: Fields, expert_dtype: object) -> Quantization:
    skipped = _names(fields, "modules_to_not_convert")
    match fields.get("weight_block_size"), fields.get("scale_fmt"):
        case [128, 128], "ue8m0" if expert_dtype is not None:
            return Quantization(
                linears="fp8_ue8m0", experts="mxfp4" if expert_dtype == "fp4" else "fp8_ue8m0", skipped=skipped
            )
        case [128, 128], _:
            return Quantization(linears="fp8_block", experts="fp8_block", skipped=skipped)
        case None, _:
            return Quantization(linears="fp8_static", experts="fp8_static", skipped=skipped)
        case found, _:
            raise ValueError(f"{fields.file}: {fields.path}weight_block_size must be [128, 128] or null, got {found!r}")


def _compressed(fields: Fields) -> Quantization:
    groups = fields.get("config_groups")
    schemes = list(groups.values()) if isinstance(groups, dict) else []
    weights = [scheme.get("weights") if isinstance(scheme, dict) else None for scheme in schemes]
    skipped = _names(fields, "ignore")
    match fields.get("format"), weights:
        case "pack-quantized", [{"num_bits": 4, "type": "int", "group_size": 32, "symmetric": True}]:
            return Quantization(linears="int4", experts="int4", skipped=skipped)
        case "float-quantized" | "naive-quantized", [
            {"num_bits": 8, "type": "float", "strategy": "channel" | "tensor"}
        ]:
            return Quantization(linears="fp8_channel", experts="fp8_channel", skipped=skipped)
        case found:
            raise ValueError(
                f"{fields.file}: {fields.path}format and config_groups must be pack-quantized with symmetric 4-bit integers in "
                f"groups of 32, or float-quantized with 8 bits a channel or a tensor, got {found!r}"
            )


def _modelopt(fields: Fields) -> Quantization:
    methods = {"FP8": "fp8_modelopt", "NVFP4": "nvfp4"}
    algorithm = fields.get("quant_algo")
    if algorithm not in methods:
        raise ValueError(
            f"{fields.file}: {fields.path}quant_algo must be one of {', '.join(methods)}, got {algorithm!r}"
        )
    method = methods[algorithm]
    names = "exclude_modules" if fields.get("exclude_modules") is not None else "ignore"
    return Quantization(linears=method, experts=method, skipped=_names(fields, names))


def _names(fields: Fields, name: str) -> tuple[str, ...]:
    names: Any = fields.get(name) or []
    if not isinstance(names, list) or not all(isinstance(pattern, str) for pattern in names):
        raise ValueError(f"{fields.file}: {fields.path}{name} must be a list of names, got {names!r}")
    for pattern in names:
        if pattern.startswith("re:"):
            _check_pattern(fields, name, pattern)
    return tuple(names)


def _check_pattern(fields: Fields, name: str, pattern: str) -> None:
    try:
        re.compile(pattern[3:])
    except re.error as error:
        raise ValueError(
            f"{fields.file}: {fields.path}{name} must be a list of names, but {pattern!r} is no regular expression: {error}"
        ) from None


def expert_bytes(model: ModelConfig, quantize: str | None) -> int:
    """About how many bytes an expert has in memory; `quantize`: `EngineConfig.quantization`."""
    assert model.moe is not None, f"{model.architecture} has no experts"
    stored = quantize or (model.quantization.experts if model.quantization is not None else None)
    bits = 8 * ITEM_SIZES[model.dtype] if stored is None else 8 if stored.startswith("fp8") else 4.5
    return int(3 * model.hidden_size * model.moe.size * bits / 8)


def expert_format(model: ModelConfig, quantize: str | None) -> str:
    """In which experts are held: one of `kernels.formats.FORMATS`, or "dense"; `quantize`: `EngineConfig.quantization`."""
    if quantize is not None:
        return "fp8_block" if quantize == "fp8" else quantize
    stored = model.quantization.experts if model.quantization is not None else None
    return METHODS[stored].format if stored is not None else "dense"


def is_skipped(module: str, patterns: tuple[str, ...]) -> bool:
    """Whether a list of modules that stay as they are names this one: by its name or a part of its path, with `*` for anything,
    or, behind "re:", by a regular expression of its name's beginning."""
    return any(
        re.match(pattern[3:], module) is not None
        if pattern.startswith("re:")
        else re.search(rf"(^|\.){re.escape(pattern).replace(re.escape('*'), '.*')}(\.|$)", module) is not None
        for pattern in patterns
    )
