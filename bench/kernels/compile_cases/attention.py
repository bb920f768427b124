"""Compile cases of attention over keys and values: decode, prefill, and merging of split-KV partial results."""

from __future__ import annotations

from typing import Any

import torch
import triton

from expertwire.bench.kernels.compile_check import Case
from expertwire.kernels.gpu import attention, prefill, prefill_split_kv, split_kv
from expertwire.kernels.gpu.dependent_launch import PDL
from expertwire.kernels.ops.attention import FP8


def _attention_case(
    name: str,
    heads: int,
    num_kv: int,
    dim: int,
    arch: int,
    *,
    decode: bool,
    block_size: int = 16,
    window: int = 0,
    chunk: int = 0,
    sinks: bool = False,
    invariant: bool = True,
    with_splits: bool = False,
    fp8: bool = False,
) -> Case:
    config = attention.tile_config(head_dim=dim, element_size=2, arch=arch, invariant=invariant)
    rows = config.decode_rows if decode else config.rows
    constexprs = {"GROUP": heads // num_kv, "DIM": dim, "PADDED": triton.next_power_of_2(dim), "BLOCK_SIZE": block_size}
    constexprs |= {
        "WINDOW": window,
        "CHUNK": chunk,
        "HAS_SINKS": sinks,
        "ROWS": rows,
        "KEYS": config.keys,
        "SPLIT_KEYS": config.split,
    }
    strides = {"stride_token": (heads + 2 * num_kv) * dim, "stride_block": block_size * num_kv * dim}
    mode = "invariant" if invariant else "fast"
    wanted = "HMMA" if rows < 64 else "HGMMA" if arch == 90 else "UTC"
    return Case(
        name=f"attention.{name}{' fp8' * fp8} {'decode' if decode else 'prefill'} {mode} sm_{arch}",
        kernel=attention.attend_kernel,
        args={
            **dict.fromkeys(("q", "out", "sinks"), torch.bfloat16),
            **dict.fromkeys(("k_cache", "v_cache"), FP8 if fp8 else torch.bfloat16),
            "kv_scales": torch.float32 if fp8 else None,
            **dict.fromkeys(("partials", "statistics"), torch.float32),
            **dict.fromkeys(("num_decodes", "cu_seqlens_q", "seq_lens", "block_table"), torch.int32),
            **dict.fromkeys(split_kv.BOUNDS, 64),
            **strides,
            "scale": 0.1,
            "table_width": 2048,
            "num_slots": 32,
        },
        constexprs={**constexprs, "STRIDE_SLOT": num_kv * dim, "BLOCKS_EACH": int(decode), "SPLIT_KV": with_splits},
        num_warps=config.num_warps(rows),
        num_stages=config.num_stages,
        blocks_per_sm=2 if config.num_warps(rows) == 4 else 1,
        expect={arch: wanted},
        options=PDL,
    )


def attention_cases() -> list[Case]:
    """Return the shapes of Qwen3-30B-A3B, Mixtral 8x7B, gpt-oss-120b, Qwen3-Next, Phi-3 and Llama 4."""
    oss: dict[str, Any] = {"window": 128, "sinks": True}
    found = []
    for arch in (90, 100):
        found += [
            _attention_case("qwen3 blocks of 16", 32, 4, 128, arch, decode=True, with_splits=True),
            _attention_case("qwen3 blocks of 16", 32, 4, 128, arch, decode=False),
            _attention_case("qwen3 blocks of 16", 32, 4, 128, arch, decode=True, with_splits=True, invariant=False),
            _attention_case("qwen3 short", 32, 4, 128, arch, decode=True),
            _attention_case("qwen3 blocks of 64", 32, 4, 128, arch, decode=True, block_size=64, with_splits=True),
            _attention_case("mixtral", 32, 8, 128, arch, decode=True, with_splits=True),
            _attention_case("mixtral", 32, 8, 128, arch, decode=False, block_size=64),
            _attention_case("gpt-oss window", 64, 8, 64, arch, decode=True, with_splits=True, **oss),
            _attention_case("gpt-oss window", 64, 8, 64, arch, decode=False, **oss),
            _attention_case("qwen3-next", 16, 2, 256, arch, decode=True, with_splits=True),
            _attention_case("qwen3-next", 16, 2, 256, arch, decode=False),
            _attention_case("phi", 32, 8, 96, arch, decode=False),
            _attention_case("llama4 chunk", 40, 8, 128, arch, decode=False, chunk=8192),
            _attention_case("qwen3", 32, 4, 128, arch, decode=True, with_splits=True, fp8=True),
            _attention_case("qwen3", 32, 4, 128, arch, decode=False, fp8=True),
            _attention_case("gpt-oss window", 64, 8, 64, arch, decode=True, with_splits=True, fp8=True, **oss),
            _attention_case("gpt-oss window", 64, 8, 64, arch, decode=False, fp8=True, **oss),
            _attention_case("qwen3-next", 16, 2, 256, arch, decode=True, with_splits=True, fp8=True),
            _attention_case("qwen3-next", 16, 2, 256, arch, decode=False, fp8=True),
        ]
    return found


def _merge_splits_case(group: int, dim: int, *, decode: bool, window: int = 0, sinks: bool = False) -> Case:
    return Case(
        name=f"split_kv.merge {group}x{dim} {'decode' if decode else 'prefill'} window {window}",
        kernel=split_kv.merge_splits_kernel,
        args={
            **dict.fromkeys(("partials", "statistics"), torch.float32),
            **dict.fromkeys(("out", "sinks"), torch.bfloat16),
            **dict.fromkeys(("num_decodes", "cu_seqlens_q", "seq_lens"), torch.int32),
            "first_sequence": 0,
            "end_sequence": 64,
            "first_token": 0,
            "end_token": 64,
            "num_slots": 32,
        },
        constexprs={
            **split_kv.merge_constexprs(group, dim, split_kv.SPLIT, window, 0, sinks),
            "BLOCKS_EACH": -(-group // split_kv.MERGED_ROWS) if decode else 0,
        },
        blocks_per_sm=2 if dim > 256 else 4,
        wide=False,  # the statistics are a number a row
        options=PDL,
    )


def merge_splits_cases() -> list[Case]:
    """Return the shapes of Qwen3-30B-A3B and gpt-oss-120b."""
    return [
        _merge_splits_case(8, 128, decode=True),
        _merge_splits_case(8, 64, decode=True, window=128, sinks=True),
    ]


def _prefill_case(
    name: str,
    heads: int,
    num_kv: int,
    dim: int,
    arch: int,
    *,
    value_dim: int | None = None,
    window: int = 0,
    chunk: int = 0,
    sinks: bool = False,
    with_splits: bool = False,
) -> Case:
    value_dim, block_size = value_dim or dim, 16
    config = prefill.tile_config(dim=dim, value_dim=value_dim, element_size=2, arch=arch)
    (dim_1, dim_2), (value_1, value_2) = prefill.split_head_dim(dim), prefill.split_head_dim(value_dim)
    return Case(
        name=f"prefill.{name}{' split_kv' if with_splits else ''} sm_{arch}",
        kernel=prefill.prefill_kernel,
        args={
            **dict.fromkeys(("q", "k_cache", "v_cache", "out", "sinks"), torch.bfloat16),
            **dict.fromkeys(("partials", "statistics"), torch.float32),
            **dict.fromkeys(("num_decodes", "cu_seqlens_q", "seq_lens", "block_table"), torch.int32),
            **dict.fromkeys(prefill_split_kv.BOUNDS, 64),
            "scale": 0.1,
            "stride_token": (heads + 2 * num_kv) * dim,
            "table_width": 2048,
            "num_splits": 4,
        },
        constexprs={
            **prefill.constexprs(heads // num_kv, dim, block_size, config, window, chunk, sinks),
            "DIM_1": dim_1,
            "DIM_2": dim_2,
            "DIM_V": value_dim,
            "DIM_V1": value_1,
            "DIM_V2": value_2,
            "STRIDE_SLOT": num_kv * dim,
            "STRIDE_SLOT_V": num_kv * value_dim,
            "ALIGNED": block_size,
            "SPLIT_KV": with_splits,
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        blocks_per_sm=config.blocks_per_sm,
        narrow_copies=True,  # of the block table
        expect={arch: "HGMMA" if arch == 90 else "UTC"},
        options=PDL,
    )


def prefill_cases() -> list[Case]:
    """Return the shapes of Qwen3-30B-A3B, gpt-oss-120b, Llama, Llama 4, Qwen3-Next, Phi-3, a head of
    80 and DeepSeek-V3.
    """
    found = []
    for arch in (90, 100):
        found += [
            _prefill_case("qwen3", 32, 4, 128, arch),
            _prefill_case("qwen3", 32, 4, 128, arch, with_splits=True),
            _prefill_case("gpt-oss", 64, 8, 64, arch, sinks=True, with_splits=True),
            _prefill_case("gpt-oss window", 64, 8, 64, arch, window=128, sinks=True),
            _prefill_case("llama", 32, 8, 128, arch),
            _prefill_case("llama4 chunk", 40, 8, 128, arch, chunk=8192, with_splits=True),
            _prefill_case("qwen3-next", 16, 2, 256, arch, with_splits=True),
            _prefill_case("phi", 32, 8, 96, arch),
            _prefill_case("head of 80", 32, 32, 80, arch),
            _prefill_case("deepseek expanded", 128, 128, 192, arch, value_dim=128),
            _prefill_case("deepseek expanded", 128, 128, 192, arch, value_dim=128, with_splits=True),
        ]
    return found


def _merge_prefill_case(group: int, dim: int, *, window: int = 0, sinks: bool = False) -> Case:
    return Case(
        name=f"prefill_split_kv.merge {group}x{dim}",
        kernel=prefill_split_kv.merge_prefill_kernel,
        args={
            **dict.fromkeys(("partials", "statistics"), torch.float32),
            **dict.fromkeys(("out", "sinks"), torch.bfloat16),
            **dict.fromkeys(("num_decodes", "cu_seqlens_q", "seq_lens"), torch.int32),
            **dict.fromkeys((*prefill_split_kv.BOUNDS, "num_splits"), 64),
        },
        constexprs={
            "GROUP": group,
            "DIM": dim,
            "PADDED": triton.next_power_of_2(dim),
            "BLOCK_SIZE": 16,
            "WINDOW": window,
            "CHUNK": 0,
            "HAS_SINKS": sinks,
            "ROWS": 128,
            "KEYS": 64,
            "MIN_SPLIT_KEYS": 1024,
            "MERGED_ROWS": prefill_split_kv.MERGED_ROWS,
        },
        blocks_per_sm=4,
        wide=False,  # the statistics are a number a row
        options=PDL,
    )


def merge_prefill_cases() -> list[Case]:
    """Return the shapes of Qwen3-30B-A3B, gpt-oss-120b and DeepSeek-V3's expanded keys and values."""
    return [
        _merge_prefill_case(8, 128),
        _merge_prefill_case(8, 64, window=128, sinks=True),
        _merge_prefill_case(1, 128),
    ]


def cases() -> list[Case]:
    return [*attention_cases(), *prefill_cases(), *merge_splits_cases(), *merge_prefill_cases()]
