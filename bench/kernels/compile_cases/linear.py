"""Compile cases of dense and per-head linear layers."""

from __future__ import annotations

from typing import Any

import torch

from expertwire.bench.kernels.compile_check import Case
from expertwire.kernels.formats import FP8
from expertwire.kernels.gpu import heads, linear
from expertwire.kernels.gpu.device import B200, H200, Device


def linear_cases() -> list[Case]:
    bf16, fp32 = torch.bfloat16, torch.float32
    shapes: dict[str, tuple[Any, ...]] = {  # format, output, input, terms, dtype of the result, bias, tokens
        "qwen3-30b qkv": ("dense", 5120, 2048, 1, bf16, False, (1, 32, 128)),
        "qwen3-30b o": ("dense", 2048, 4096, 1, bf16, False, (1, 64, 8192)),
        "qwen3-30b router": ("dense", 128, 2048, 1, fp32, False, (1, 8192)),
        "qwen3-30b lm_head": ("dense", 151936, 2048, 1, fp32, False, (1, 32, 64, 128, 256)),
        "gpt-oss-120b router": ("dense", 128, 2880, 1, bf16, True, (16, 4096)),
        "deepseek-v3 router": ("dense", 256, 7168, 3, fp32, False, (1, 8192)),
        "deepseek-v3 o": ("dense", 7168, 16384, 1, bf16, False, (1, 4096)),
        "qwen3-30b qkv fp8": ("fp8_block", 5120, 2048, 1, bf16, False, (1, 64, 8192)),
        "deepseek-v3 q_a": ("fp8_block", 1536, 7168, 1, bf16, False, (1, 32, 8192)),
        "deepseek-v3 kv_a": ("fp8_block", 576, 7168, 1, bf16, False, (1, 128, 8192)),
        "deepseek-v3 shared gate_up": ("fp8_block", 4096, 7168, 1, bf16, False, (1, 256)),
        "deepseek-v3 o fp8": ("fp8_block", 7168, 16384, 1, bf16, False, (1, 128, 4096)),
        "kimi-k2 q": ("fp8_block", 12288, 1536, 1, bf16, False, (1, 4096)),
        "mistral qkv": ("fp8_row", 6144, 4096, 1, bf16, False, (1, 64, 4096)),
    }
    return [
        _linear_case(f"{name} T{num_tokens}", device, num_tokens, *shape)
        for name, (*shape, counts) in shapes.items()
        for num_tokens in counts
        for device in (H200, B200)
    ]


def _linear_case(
    name: str,
    device: Device,
    num_tokens: int,
    format: str,
    num_rows: int,
    width: int,
    terms: int,
    out: torch.dtype,
    bias: bool,
) -> Case:
    bf16, fp32 = torch.bfloat16, torch.float32
    config = linear.tile_config(num_tokens, num_rows, terms * width, bf16, device)
    return Case(
        name=f"linear {name}{'' if format == 'dense' else f' {format}'} sm_{device.arch}",
        kernel=linear.linear_kernel,
        args={
            "x_ptr": bf16,
            "w_ptr": bf16 if format == "dense" else FP8,
            "scale_ptr": None if format == "dense" else fp32,
            "scale_row_ptr": torch.int32 if format == "fp8_block" else None,
            "bias_ptr": bf16,
            "y_ptr": out,
            "partials_ptr": fp32,
            "counters_ptr": torch.int32,
            "num_tokens": num_tokens,
            "num_rows": num_rows,
            "width": width,
            "stride_t": width,
            "num_splits": config.splits,
            "split_k": config.split_k,
            "num_programs": config.blocks_per_sm * device.num_sms,
        },
        constexprs=linear.constexprs(config, format, width, terms, bias),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        blocks_per_sm=config.blocks_per_sm,
        # Hopper's matrix instruction takes the left operand from registers, where FP8 comes by 8 bytes; scales by 4.
        narrow_copies=format != "dense",
        expect={device.arch: {90: "HGMMA", 100: "UTC"}[device.arch]},
        options=linear.OPTIONS,
    )


def _heads_case(
    name: str, shape: tuple[int, int, int], strides: tuple[int, int], num_tokens: int, device: Device
) -> Case:
    num_heads, num_outputs, num_inputs = shape
    config = heads.tile_config(num_tokens, torch.bfloat16)
    x_stride, y_stride = strides
    return Case(
        name=f"heads {name} T{num_tokens} sm_{device.arch}",
        kernel=heads.per_head_kernel,
        args={
            **dict.fromkeys(("x_ptr", "w_ptr", "y_ptr"), torch.bfloat16),
            "num_tokens": num_tokens,
            "num_outputs": num_outputs,
            "num_inputs": num_inputs,
            "x_stride_token": num_heads * x_stride,
            "x_stride_head": x_stride,
            "y_stride_token": num_heads * y_stride,
            "y_stride_head": y_stride,
        },
        constexprs={"ROWS": config.rows, "TOKENS": config.tokens, "BLOCK_K": config.block_k, "EVEN": True},
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        blocks_per_sm=2 if config.num_warps == 4 else 1,
        expect={device.arch: {90: "HGMMA", 100: "UTC"}[device.arch]},
        options=linear.OPTIONS,
    )


def heads_cases() -> list[Case]:
    """Return the two products of DeepSeek-V3: into the latent space, with strided rows on both sides, and back."""
    shapes = {"absorb": ((128, 512, 128), (192, 576)), "value": ((128, 128, 512), (512, 128))}
    return [
        _heads_case(f"deepseek-v3 {name}", shape, strides, num_tokens, device)
        for name, (shape, strides) in shapes.items()
        for num_tokens in (1, 32, 64, 2048)
        for device in (H200, B200)
    ]


def cases() -> list[Case]:
    return [*linear_cases(), *heads_cases()]
