"""Quantization methods of published checkpoints: the names of their tensors, and the configs that select them.

The formats are those of `kernels.formats`. Activations are not quantized: scales for them are ignored.

Sources: DeepSeek-V3's README_WEIGHTS.md (fp8), the quantizers of transformers (fp8, mxfp4), compressed-tensors'
`pack_quantized` and `float_quantized` compressors, NVIDIA ModelOpt's unified checkpoint export.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from expertwire.engine.models.hf_config import HfConfig
from expertwire.engine.models.model_config import ITEM_SIZES, ModelConfig, QuantizationConfig

PACKED_DTYPES = ("F8_E4M3", "I32", "U8", "I8")  # stored types of quantized matrices


@dataclass(frozen=True, kw_only=True)
class QuantMethod:
    """The tensors of a quantized matrix: suffixes of the module's name, and of the name of a layer's fused experts.

    Attributes:
        format: one of `kernels.formats.FORMATS`.
        data, scales, global_scales: the two suffixes of each of the format's tensors.
        repeated_scales: whether a matrix or a row has one scale, which is repeated for each row.
        ignored: suffixes of tensors that are not needed.
    """

    format: str
    data: tuple[str, str] = (".weight", "")
    scales: tuple[str, str]
    global_scales: tuple[str, str] = ("", "")
    repeated_scales: bool = False
    ignored: tuple[str, ...] = ()

    def suffix(self, tensor: str, *, fused: bool) -> str:
        """Return the suffix of a tensor: "data", "scales" or "global_scales"."""
        return {"data": self.data, "scales": self.scales, "global_scales": self.global_scales}[tensor][fused]


_MODELOPT_IGNORED = (".input_scale", "_input_scale", ".k_scale", ".v_scale")
METHODS: Mapping[str, QuantMethod] = MappingProxyType(
    {
        "fp8_block": QuantMethod(format="fp8_block", scales=(".weight_scale_inv", "_scale_inv")),
        "fp8_static": QuantMethod(
            format="fp8_row",
            scales=(".weight_scale_inv", "_scale_inv"),
            repeated_scales=True,
            ignored=(".activation_scale", "_activation_scale"),
        ),
        "fp8_modelopt": QuantMethod(
            format="fp8_row",
            scales=(".weight_scale", "_weight_scale"),
            repeated_scales=True,
            ignored=_MODELOPT_IGNORED,
        ),
        "fp8_channel": QuantMethod(
            format="fp8_row",
            scales=(".weight_scale", "_weight_scale"),
            repeated_scales=True,
            ignored=(".input_scale", "_input_scale"),
        ),
        "int4": QuantMethod(
            format="int4",
            data=(".weight_packed", "_packed"),
            scales=(".weight_scale", "_scale"),
            ignored=(".weight_shape",),
        ),
        "mxfp4": QuantMethod(format="mxfp4", data=(".weight", "_blocks"), scales=(".scale", "_scales")),
        "fp8_ue8m0": QuantMethod(format="fp8_block", scales=(".scale", "_scale")),
        "nvfp4": QuantMethod(
            format="nvfp4",
            scales=(".weight_scale", "_weight_scale"),
            global_scales=(".weight_scale_2", "_weight_scale_2"),
            ignored=_MODELOPT_IGNORED,
        ),
    }
)


def read(hf: HfConfig) -> QuantizationConfig | None:
    """Return what config.json's `quantization_config` says, or ModelOpt's `hf_quant_config.json` beside it.

    Raises:
        ValueError: the method is not supported. The message names the file, the field and the allowed values.
    """
    quantization = hf.section("quantization_config")
    if hf.get("quantization_config") is None:
        beside = hf.file.with_name("hf_quant_config.json")
        return _modelopt(HfConfig(beside).section("quantization")) if beside.exists() else None
    match quantization.get("quant_method"):
        case "fp8":
            return _fp8(quantization, hf.get("expert_dtype"))
        case "mxfp4":
            ignored = _ignored_modules(quantization, "modules_to_not_convert")
            return QuantizationConfig(linear_method=None, expert_method="mxfp4", ignored_modules=ignored)
        case "compressed-tensors":
            return _compressed(quantization)
        case "modelopt":
            return _modelopt(quantization)
        case found:
            raise quantization.error(
                f"quant_method must be one of fp8, mxfp4, compressed-tensors, modelopt, got {found!r}"
            )


def _fp8(hf: HfConfig, expert_dtype: object) -> QuantizationConfig:
    ignored = _ignored_modules(hf, "modules_to_not_convert")
    match hf.get("weight_block_size"), hf.get("scale_fmt"):
        case [128, 128], "ue8m0" if expert_dtype is not None:
            return QuantizationConfig(
                linear_method="fp8_ue8m0",
                expert_method="mxfp4" if expert_dtype == "fp4" else "fp8_ue8m0",
                ignored_modules=ignored,
            )
        case [128, 128], _:
            return QuantizationConfig(linear_method="fp8_block", expert_method="fp8_block", ignored_modules=ignored)
        case None, _:
            return QuantizationConfig(linear_method="fp8_static", expert_method="fp8_static", ignored_modules=ignored)
        case found, _:
            raise hf.error(f"weight_block_size must be [128, 128] or null, got {found!r}")


def _compressed(hf: HfConfig) -> QuantizationConfig:
    groups = hf.get("config_groups")
    schemes = list(groups.values()) if isinstance(groups, dict) else []
    weights = [scheme.get("weights") if isinstance(scheme, dict) else None for scheme in schemes]
    ignored = _ignored_modules(hf, "ignore")
    match hf.get("format"), weights:
        case "pack-quantized", [{"num_bits": 4, "type": "int", "group_size": 32, "symmetric": True}]:
            return QuantizationConfig(linear_method="int4", expert_method="int4", ignored_modules=ignored)
        case "float-quantized" | "naive-quantized", [
            {"num_bits": 8, "type": "float", "strategy": "channel" | "tensor"}
        ]:
            return QuantizationConfig(linear_method="fp8_channel", expert_method="fp8_channel", ignored_modules=ignored)
        case found:
            raise hf.error(
                f"format and config_groups must be pack-quantized with symmetric 4-bit integers in "
                f"groups of 32, or float-quantized with 8 bits a channel or a tensor, got {found!r}"
            )


def _modelopt(hf: HfConfig) -> QuantizationConfig:
    methods = {"FP8": "fp8_modelopt", "NVFP4": "nvfp4"}
    algorithm = hf.get("quant_algo")
    if algorithm not in methods:
        raise hf.error(f"quant_algo must be one of {', '.join(methods)}, got {algorithm!r}")
    method = methods[algorithm]
    names = "exclude_modules" if hf.get("exclude_modules") is not None else "ignore"
    return QuantizationConfig(linear_method=method, expert_method=method, ignored_modules=_ignored_modules(hf, names))


def _ignored_modules(hf: HfConfig, name: str) -> tuple[str, ...]:
    patterns: Any = hf.get(name) or []
    if not isinstance(patterns, list) or not all(isinstance(pattern, str) for pattern in patterns):
        raise hf.error(f"{name} must be a list of names, got {patterns!r}")
    for pattern in patterns:
        try:
            re.compile(pattern[3:] if pattern.startswith("re:") else "")
        except re.error as error:
            raise hf.error(
                f"{name} must be a list of names, but {pattern!r} is no regular expression: {error}"
            ) from None
    return tuple(patterns)


def expert_bytes(model: ModelConfig, quantize: str | None) -> int:
    """Return about how many bytes an expert takes in memory; `quantize`: `EngineConfig.quantization`."""
    assert model.moe is not None, f"{model.architecture} has no experts"
    format = expert_format(model, quantize)
    bits = 8 * ITEM_SIZES[model.dtype] if format == "dense" else 8 if format.startswith("fp8") else 4.5
    matrices = len(model.moe.w13_parts) + 1
    return int(matrices * model.dispatch_size * model.moe.intermediate_size * bits / 8)


def expert_format(model: ModelConfig, quantize: str | None) -> str:
    """Return the format of experts in memory: a name in `kernels.formats.FORMATS` or "dense"; `quantize` as above."""
    if quantize is not None:
        return "fp8_block" if quantize == "fp8" else quantize
    method = model.quantization.expert_method if model.quantization is not None else None
    return METHODS[method].format if method is not None else "dense"


def is_ignored(module: str, patterns: tuple[str, ...]) -> bool:
    """Return whether a list of modules that are not quantized contains this one.

    An entry is a name or a part of a path, in which `*` stands for anything, or, after "re:", a regular expression for the
    beginning of the name.
    """
    return any(
        re.match(pattern[3:], module) is not None
        if pattern.startswith("re:")
        else re.search(rf"(^|\.){re.escape(pattern).replace(re.escape('*'), '.*')}(\.|$)", module) is not None
        for pattern in patterns
    )
