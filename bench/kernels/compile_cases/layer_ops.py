"""Compile cases of the ops between GEMMs: norms, rope and cache write, routing, permutation, combine."""

from __future__ import annotations

from typing import Any

import torch
import triton

from expertwire.bench.kernels.compile_check import Case
from expertwire.kernels.gpu import combine, layer_norm, permute, rms_norm, rope_and_cache, routing, sigmoid_mul
from expertwire.kernels.gpu.dependent_launch import PDL
from expertwire.kernels.ops.attention import FP8
from expertwire.kernels.ops.variants import ExpertGroups, Routing


def rms_norm_cases() -> list[Case]:
    bf16 = torch.bfloat16
    return [
        Case(
            name=f"rms_norm.{form} D{width}",
            kernel=rms_norm.rms_norm_kernel,
            args={
                **dict.fromkeys(("x_ptr", "weight_ptr", "y_ptr"), bf16),
                **dict.fromkeys(("delta_ptr", "sum_ptr"), bf16 if form == "add" else None),
                "width": width,
                "eps": 1e-6,
            },
            constexprs={"COLUMNS": triton.next_power_of_2(width)},
            num_warps=rms_norm.warps_of(triton.next_power_of_2(width)),
            options=PDL,
            blocks_per_sm=2,
        )
        for form in ("norm", "add")
        for width in (2048, 2880, 7168)
    ]


def layer_norm_cases() -> list[Case]:
    """Return the shapes of Phi-4-mini-flash."""
    bf16, width = torch.bfloat16, 2560
    return [
        Case(
            name=f"layer_norm.{form} D{width}",
            kernel=layer_norm.layer_norm_kernel,
            args={
                **dict.fromkeys(("x_ptr", "weight_ptr", "bias_ptr", "y_ptr"), bf16),
                **dict.fromkeys(("delta_ptr", "sum_ptr"), bf16 if form == "add" else None),
                "width": width,
                "eps": 1e-5,
            },
            constexprs={"COLUMNS": triton.next_power_of_2(width)},
            num_warps=layer_norm.warps_of(triton.next_power_of_2(width)),
            options=PDL,
            blocks_per_sm=2,
        )
        for form in ("norm", "add")
    ]


def sigmoid_mul_cases() -> list[Case]:
    """Return the shapes of Qwen3-Next: heads of attention, and the shared expert."""
    return [
        Case(
            name=f"sigmoid_mul d{width}{' one gate' * one_gate}",
            kernel=sigmoid_mul.sigmoid_mul_kernel,
            args={
                **dict.fromkeys(("x_ptr", "gate_ptr", "y_ptr"), torch.bfloat16),
                "width": width,
                "stride_token": 1 if one_gate else 9216,
                "stride_head": 1 if one_gate else 2 * width,
            },
            constexprs={"ONE_GATE": one_gate, "COLUMNS": triton.next_power_of_2(width)},
            num_warps=sigmoid_mul.warps_of(width),
            options=PDL,
            blocks_per_sm=4,
        )
        for width, one_gate in ((256, False), (2048, True), (4096, True))
    ]


def _rope_and_cache_case(
    name: str,
    heads: int,
    num_kv: int,
    dim: int,
    rotated: int,
    *,
    norm: bool = False,
    interleaved: bool = False,
    fp8: bool = False,
) -> Case:
    block_size = 16
    return Case(
        name=f"rope_and_cache.{name} {'fp8' if fp8 else 'bf16'}",
        kernel=rope_and_cache.rope_and_cache_kernel,
        args={
            **dict.fromkeys(("qkv", "norm", "q_out"), torch.bfloat16),
            **dict.fromkeys(("k_cache", "v_cache"), FP8 if fp8 else torch.bfloat16),
            "kv_scales": torch.float32 if fp8 else None,
            **dict.fromkeys(("cos_table", "sin_table"), torch.float32),
            **dict.fromkeys(("positions", "slots"), torch.int64),
            "eps": 1e-6,
            "stride_token": (heads + 2 * num_kv) * dim,
            "stride_block": block_size * num_kv * dim,
            "stride_slot": num_kv * dim,
        },
        constexprs={
            **rope_and_cache.constexprs(heads, num_kv, dim, rotated, block_size),
            "HAS_NORM": norm,
            "INTERLEAVED": interleaved,
        },
        num_warps=rope_and_cache.warps_of(rotated),
        blocks_per_sm=8,
        options=PDL,
    )


def rope_and_cache_cases() -> list[Case]:
    """Return the shapes of Qwen3-30B-A3B, Mixtral 8x7B, gpt-oss-120b, Qwen3-Next (a quarter rotated)
    and Llama 4 (interleaved pairs).
    """
    return [
        _rope_and_cache_case("qwen3", 32, 4, 128, 128, norm=True),
        _rope_and_cache_case("mixtral", 32, 8, 128, 128),
        _rope_and_cache_case("gpt-oss", 64, 8, 64, 64),
        _rope_and_cache_case("qwen3-next", 16, 2, 256, 64, norm=True),
        _rope_and_cache_case("llama4", 40, 8, 128, 128, interleaved=True),
        _rope_and_cache_case("qwen3", 32, 4, 128, 128, norm=True, fp8=True),
        _rope_and_cache_case("qwen3-next", 16, 2, 256, 64, norm=True, fp8=True),
        _rope_and_cache_case("llama4", 40, 8, 128, 128, interleaved=True, fp8=True),
    ]


def routing_cases() -> list[Case]:
    v2 = ExpertGroups(number=8, kept=3, by="best")
    v3 = ExpertGroups(number=8, kept=4, by="two_best")
    models = {
        "qwen3-30b": (128, torch.bfloat16, False, Routing(top_k=8, renormalize=True)),
        "mixtral": (8, torch.bfloat16, False, Routing(top_k=2, renormalize=True)),
        "gpt-oss-120b": (128, torch.bfloat16, False, Routing(top_k=4, renormalize=True)),
        "deepseek-v2": (160, torch.float32, False, Routing(top_k=6, renormalize=False, groups=v2)),
        "deepseek-v3": (256, torch.float32, True, Routing(top_k=8, renormalize=True, score="sigmoid", groups=v3)),
        "kimi-k2": (384, torch.float32, True, Routing(top_k=8, renormalize=True, score="sigmoid")),
        "nemotron-3-super": (512, torch.float32, True, Routing(top_k=22, renormalize=True, score="sigmoid")),
        "deepseek-v4": (256, torch.float32, True, Routing(top_k=6, renormalize=True, score="sqrt_softplus")),
        "llama-4": (128, torch.bfloat16, False, Routing(top_k=1, renormalize=False, score="sigmoid")),
    }
    return [
        Case(
            name=f"routing.route {name}",
            kernel=routing.route_kernel,
            args={
                "logits_ptr": dtype,
                "bias_ptr": torch.float32,
                "ids_ptr": torch.int64,
                "weights_ptr": torch.float32,
                **dict.fromkeys(("physical_ptr", "table_ptr", "load_ptr"), torch.int64),
                "valid_ptr": torch.int32,
                "num_tokens": 100,
                "stride_t": num_experts,
                "num_replicas": 3,
                "scale": 2.5,
            },
            constexprs=routing.constexprs(num_experts, rule, has_bias=has_bias),
            num_warps=1,
            blocks_per_sm=16,
            options=PDL,
            wide=False,  # a token's ids and weights are a few bytes
        )
        for name, (num_experts, dtype, has_bias, rule) in models.items()
    ]


def _permute_cases_of(num_tokens: int, top_k: int, num_experts: int) -> list[Case]:
    i32, num_ids = torch.int32, num_tokens * top_k
    chunk, counted = permute.chunk_of(num_ids)
    sizes = {"num_ids": num_ids, "num_experts": num_experts}
    pointers = (
        "counts_ptr",
        "offsets_ptr",
        "row_index_ptr",
        "home_ptr",
        "valid_ptr",
        "first_tile_ptr",
        "tile_expert_ptr",
    )
    args = {"ids_ptr": torch.int64, **dict.fromkeys(pointers, i32), **sizes}
    constexprs = {"K": top_k, "CHUNK": chunk, "EXPERTS": max(2, triton.next_power_of_2(num_experts))}
    common: dict[str, Any] = {"wide": False, "options": permute.OPTIONS}
    name = f"T{num_tokens} K{top_k} e{num_experts}"
    place = Case(
        name=f"permute.place {name}",
        kernel=permute.place_kernel,
        args=args
        | {"num_chunks": triton.cdiv(num_ids, chunk) if counted else 1, "tile_rows": 16}
        | ({} if counted else {"counts_ptr": None}),
        constexprs=constexprs,
        num_warps=permute.warps_of(chunk),
        **common,
    )
    count = Case(
        name=f"permute.count {name}",
        kernel=permute.count_kernel,
        args={"ids_ptr": torch.int64, "counts_ptr": i32, "valid_ptr": i32, **sizes},
        constexprs=constexprs,
        num_warps=8,
        **common,
    )
    return [place, count] if counted else [place]


def permute_cases() -> list[Case]:
    shapes = [(1, 8, 128), (128, 8, 256), (128, 2, 8), (1024, 4, 128), (2048, 8, 384), (8192, 8, 256), (262144, 8, 4)]
    return [case for shape in shapes for case in _permute_cases_of(*shape)]


def combine_cases() -> list[Case]:
    shapes = [(2, 4096, False), (4, 2880, False), (8, 2048, False), (8, 7168, True), (22, 1024, True)]
    return [
        Case(
            name=f"combine K{top_k} D{width} {'shared' if shared else 'routed'}",
            kernel=combine.combine_kernel,
            args={
                **dict.fromkeys(("rows_ptr", "shared_ptr", "out_ptr"), torch.bfloat16),
                "weights_ptr": torch.float32,
                "width": width,
            },
            constexprs={"K": top_k, "HAS_SHARED": shared, "COLUMNS": combine.COLUMNS_PER_PROGRAM},
            blocks_per_sm=8,
            options=combine.OPTIONS,
        )
        for top_k, width, shared in shapes
    ]


def cases() -> list[Case]:
    return [
        *rms_norm_cases(),
        *layer_norm_cases(),
        *sigmoid_mul_cases(),
        *rope_and_cache_cases(),
        *routing_cases(),
        *permute_cases(),
        *combine_cases(),
    ]
