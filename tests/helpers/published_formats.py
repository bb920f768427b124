"""Formats of published checkpoints (DeepSeek, Moonshot, Mistral): weights that they represent exactly, and the tensors."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from expertwire.kernels.formats import dequantize, quantize
from helpers.architectures import Tensors

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
Packed = tuple[Tensors, torch.Tensor]  # a matrix's tensors by suffix, and the matrix that they stand for


@dataclass(frozen=True, kw_only=True)
class Published:
    """Which matrices are stored how; `config` is config.json's `quantization_config`. `fused`: experts are."""

    applies: Callable[[str], bool]
    pack: Callable[[torch.Tensor], Packed]
    config: dict[str, Any]
    fused: bool = False

    def round(self, model: PreTrainedModel) -> None:
        """Round weights to the nearest that the format represents."""
        for name, values in model.named_parameters():
            if self.applies(name):
                for matrix in self._matrices(name, values):
                    matrix.copy_(self.pack(matrix)[1])

    def _matrices(self, name: str, values: torch.Tensor) -> list[torch.Tensor]:
        if values.dim() == 2:
            return [values]
        parts = 2 if "gate_up" in name and not self.fused else 1
        return [part for expert in values for part in expert.chunk(parts)]

    def tensors(self, tensors: Tensors) -> Tensors:
        """Return the hub's tensors for unquantized tensors with the hub's names."""
        found: Tensors = {}
        for name, values in tensors.items():
            if not self.applies(name):
                found[name] = values
            elif values.dim() == 2:
                packed = self.pack(values)[0]
                found |= {name.removesuffix(".weight") + suffix: tensor for suffix, tensor in packed.items()}
            else:
                found |= _fused(name, [self.pack(matrix)[0] for matrix in values])
        return found


def _fused(name: str, experts: list[Tensors]) -> Tensors:
    """The experts of a layer as Mistral has them: a scale for each, and one for all activations."""
    return {
        name: torch.stack([packed[".weight"] for packed in experts]),
        name + "_scale_inv": torch.stack([packed[".weight_scale_inv"] for packed in experts]).view(-1, 1, 1),
        name + "_activation_scale": experts[0][".activation_scale"],
    }


def _blocks(w: torch.Tensor) -> Packed:
    q = quantize("fp8_block", w)
    return {".weight": q.data, ".weight_scale_inv": q.scales}, dequantize(q, torch.float32)


def _int4(w: torch.Tensor) -> Packed:
    groups = w.unflatten(1, (-1, 32))
    scales = (groups.abs().amax(-1) / 7).bfloat16()
    codes = (groups / scales.float()[..., None]).round().clamp(-8, 7)
    low, high = (codes.flatten(1) + 8).to(torch.uint8).unflatten(1, (-1, 2)).unbind(-1)
    data = (low + 16 * high).view(torch.int32)
    tensors = {".weight_packed": data, ".weight_scale": scales, ".weight_shape": torch.tensor(w.shape)}
    return tensors, (codes * scales.float()[..., None]).flatten(1)


def _static(w: torch.Tensor) -> Packed:
    scale = (w.abs().max() / 448).bfloat16()
    data = (w / scale.float()).to(torch.float8_e4m3fn)
    tensors = {".weight": data, ".weight_scale_inv": scale, ".activation_scale": torch.tensor(0.02).bfloat16()}
    return tensors, data.float() * scale.float()


def whole(w: torch.Tensor, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a matrix in fp8, its scale, and what both stand for."""
    scale = (w.abs().max() / 448).to(dtype)
    data = (w / scale.float()).to(torch.float8_e4m3fn)
    return data, scale, data.float() * scale.float()


def fp8_modelopt(w: torch.Tensor) -> Packed:
    data, scale, right = whole(w)
    return {".weight": data, ".weight_scale": scale, ".input_scale": torch.tensor(0.02)}, right


def e2m1(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return packed codes of the nearest numbers, and these."""
    codes = (values[..., None] - E2M1).abs().argmin(-1)
    low, high = codes.unflatten(-1, (-1, 2)).unbind(-1)
    return (low + 16 * high).to(torch.uint8), E2M1[codes]


def nvfp4(w: torch.Tensor) -> Packed:
    groups = w.view(len(w), -1, 16)
    second = w.abs().max() / 6 / 448
    scales = (groups.abs().amax(-1) / 6 / second).to(torch.float8_e4m3fn)
    factors = (scales.float() * second)[..., None]
    packed, values = e2m1(groups / factors)
    names = {".weight_scale": scales, ".weight_scale_2": second, ".input_scale": torch.tensor(0.02)}
    return {".weight": packed.flatten(1), **names}, (values * factors).view(w.shape)


FP8 = {"quant_method": "fp8", "fmt": "e4m3"}
DEEPSEEK = Published(
    applies=lambda name: "_proj" in name and "eh_proj" not in name,
    pack=_blocks,
    config={**FP8, "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
)
QWEN = replace(DEEPSEEK, applies=lambda name: "_proj" in name and re.search(r"in_proj_(a|b|ba)\.", name) is None)
KIMI = Published(
    applies=lambda name: ".experts." in name,
    pack=_int4,
    config={
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 4, "type": "int", "group_size": 32, "symmetric": True, "strategy": "group"},
            }
        },
        "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*"],
    },
)
MISTRAL = Published(
    applies=lambda name: "_proj" in name,
    pack=_static,
    config={**FP8, "activation_scheme": "static", "weight_block_size": None, "modules_to_not_convert": ["lm_head"]},
    fused=True,
)
MODELOPT_FP8 = Published(
    applies=lambda name: "_proj" in name and "eh_proj" not in name and "latent" not in name,
    pack=fp8_modelopt,
    config={"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head", "*latent_proj*"]},
)
MODELOPT_NVFP4 = Published(
    applies=lambda name: ".experts." in name,
    pack=nvfp4,
    config={
        "quant_method": "modelopt",
        "quant_algo": "NVFP4",
        "ignore": [
            "lm_head",
            "*in_proj*",
            "*out_proj*",
            "*q_proj*",
            "*k_proj*",
            "*v_proj*",
            "*o_proj*",
            "*shared_experts*",
            "*latent_proj*",
        ],
    },
)
