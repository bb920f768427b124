"""Compile cases of Mamba-2's ops: causal convolution, recurrence, gated norm.

H heads, G groups of heads, d head size, N state size.
"""

from __future__ import annotations

from typing import Any

import torch
import triton

from expertwire.bench.kernels.compile_check import Case
from expertwire.kernels.gpu import causal_conv1d, gated_rms_norm, mamba2
from expertwire.kernels.gpu.dependent_launch import PDL

_EVERY = 1024  # positions between snapshots
# Heads, groups, head size, state size.
_MODELS = {
    "nemotron-3-super": (128, 8, 64, 128),
    "nemotron-3-nano": (64, 8, 64, 128),
    "granite-4-h-small": (128, 1, 64, 128),
    "granite-4-h-tiny": (48, 1, 64, 128),
}


def _widths(heads: int, groups: int, dim: int, size: int) -> tuple[int, int]:
    """Return the widths of the convolution's rows and of those of the projection before it."""
    convolved = heads * dim + 2 * groups * size
    return convolved, heads * dim + convolved + heads


def _conv_cases_of(name: str, width: int, row: int) -> list[Case]:
    bf16, i32 = torch.bfloat16, torch.int32
    described = dict.fromkeys(("num_decodes", "cu_seqlens_q", "seq_lens", "block_table"), i32)
    tensors = dict.fromkeys(("x", "weight", "bias", "tail", "y"), bf16)
    sizes = {"every": _EVERY, "stride_x": row, "table_width": 33}
    strides = {"stride_channel": 4, "stride_tap": 1}
    # Weights of a channel are four numbers.
    common: dict[str, Any] = {"num_warps": 4, "blocks_per_sm": 4, "options": PDL, "wide": False}
    bounds = {"first_sequence": 0, "end_sequence": 7, "first_token": 0, "end_token": 2048}
    shapes = {"WIDTH": width, "TAPS": 4}
    cases = [
        Case(
            name=f"causal_conv1d.{form} {name}",
            kernel=causal_conv1d.causal_conv1d_kernel,
            args=tensors | described | bounds | sizes | strides,
            constexprs=shapes | {"ROWS": rows, "COLUMNS": columns, "BLOCKS_EACH": each},
            **common,
        )
        for form, rows, columns, each in (
            ("decode", 1, causal_conv1d.DECODE_COLUMNS, 1),
            ("prefill", causal_conv1d.ROWS, causal_conv1d.COLUMNS, 0),
        )
    ]
    tails = Case(
        name=f"causal_conv1d.tails {name}",
        kernel=causal_conv1d.conv_tails_kernel,
        args=dict.fromkeys(("x", "tail"), bf16) | described | sizes | {"num_sequences": 7},
        constexprs=shapes | {"COLUMNS": causal_conv1d.DECODE_COLUMNS},
        **common,
    )
    return [*cases, tails]


def _recurrence_cases_of(name: str, shape: tuple[int, int, int, int]) -> list[Case]:
    i32, (_, row) = torch.int32, _widths(*shape)
    limits: dict[str, Any] = {"dt_min": 0.0, "dt_max": float("inf"), "stride_raw": row}
    places = {"every": _EVERY, "table_width": 33}
    prefills: dict[str, Any] = dict.fromkeys(("num_decodes", "cu_seqlens_q", "seq_lens", "chunk_blocks"), i32)
    prefills["num_sequences"] = 7
    options = {**mamba2.OPTIONS, **PDL}
    products: dict[str, Any] = {"expect": {90: "HGMMA", 100: "UTC"}, "options": options}
    keep = Case(
        name=f"mamba2.keep_inputs {name}",
        kernel=mamba2.keep_inputs_kernel,
        args=dict.fromkeys(("xBC", "raw", "inputs"), torch.bfloat16)
        | dict.fromkeys(("dt_bias", "dts"), torch.float32)
        | prefills
        | limits,
        constexprs=mamba2.keep_constexprs(*shape),
        options=options,
        wide=False,  # dt is a number a token and head
    )
    sums = Case(
        name=f"mamba2.sums {name}",
        kernel=mamba2.chunk_sums_kernel,
        args={"raw": torch.bfloat16}
        | dict.fromkeys(("A", "dt_bias", "dts", "sums"), torch.float32)
        | prefills
        | limits,
        constexprs={"HEADS": shape[0], "CHUNK": mamba2.CHUNK, "PARTS": mamba2.SUMS_PARTS},
        num_warps=mamba2.SUMS_WARPS,
        options=options,
        wide=False,
    )
    decode = Case(
        name=f"mamba2.decode {name}",
        kernel=mamba2.mamba2_decode_kernel,
        args=dict.fromkeys(("xBC", "raw", "inputs", "y"), torch.bfloat16)
        | dict.fromkeys(("A", "D", "dt_bias", "state", "dts"), torch.float32)
        | dict.fromkeys(("num_decodes", "seq_lens", "block_table", "chunk_blocks"), i32)
        | limits
        | places,
        constexprs=mamba2.constexprs(*shape, mamba2.DECODE_COLUMNS),
        num_warps=mamba2.NUM_WARPS,
        blocks_per_sm=3,
        wide=False,
        **products,
    )
    prefill = Case(
        name=f"mamba2.prefill {name}",
        kernel=mamba2.mamba2_prefill_kernel,
        args=dict.fromkeys(("xBC", "inputs", "y"), torch.bfloat16)
        | dict.fromkeys(("sums", "D", "state"), torch.float32)
        | {"block_table": i32}
        | prefills
        | places,
        constexprs=mamba2.constexprs(*shape, mamba2.PREFILL_COLUMNS),
        num_warps=mamba2.NUM_WARPS,
        **products,
    )
    return [keep, sums, decode, prefill]


def gated_rms_norm_cases() -> list[Case]:
    """Return those of Mamba-2 and of the gated delta net."""
    shapes = [("nemotron-3-super", 8192, 1024, True), ("granite-4-h-small", 8192, 8192, True)]
    shapes += [("granite-4-h-tiny", 3072, 3072, True), ("qwen3-next", 4096, 128, False)]
    cases = []
    for name, width, group, gate_first in shapes:
        groups, columns, warps = gated_rms_norm.tile_of(group)
        cases.append(
            Case(
                name=f"gated_rms_norm {name}",
                kernel=gated_rms_norm.gated_rms_norm_kernel,
                args={
                    **dict.fromkeys(("x", "z", "weight", "y"), torch.bfloat16),
                    "num_groups": width // group,
                    "width": group,
                    "eps": 1e-5,
                    "stride_x": width,
                    "stride_z": triton.cdiv(3 * width, 64) * 64,
                },
                constexprs={"GROUPS": groups, "COLUMNS": columns, "GATE_FIRST": gate_first},
                num_warps=warps,
                blocks_per_sm=2,
                options=PDL,
            )
        )
    return cases


def cases() -> list[Case]:
    found = gated_rms_norm_cases()
    for name, shape in _MODELS.items():
        found += _conv_cases_of(name, *_widths(*shape))
        found += _recurrence_cases_of(name, shape)
    return found
