"""Compile cases of the gated delta rule, at the heads of Qwen3-Next and Qwen3.5-35B, of Qwen3.5-397B and of small Qwen3.5."""

from __future__ import annotations

from typing import Any

import torch

from expertwire.bench.kernels.compile_check import Case
from expertwire.kernels.gpu import gated_delta_rule as gpu
from expertwire.kernels.gpu.dependent_launch import PDL
from expertwire.kernels.ops.gated_delta_rule import CHUNK, DeltaCache


def _cases_of(num_keys: int, num_heads: int, dim: int, size: int) -> list[Case]:
    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device="meta")

    of_chunk = [(num_keys, dim), (num_heads, size), (num_heads,)]
    cache = DeltaCache(empty(9, num_heads, dim, size), *(empty(9, CHUNK, *shape) for shape in of_chunk))
    f32, i32, bf16 = torch.float32, torch.int32, torch.bfloat16
    width, constexprs = 2 * num_keys * dim + num_heads * size, gpu.constexprs(cache, bf16)
    common: dict[str, Any] = {
        **dict.fromkeys(("qkv", "a", "b", "out"), bf16),
        **dict.fromkeys(("A", "dt_bias", "state_cache", "k_cache", "u_cache", "g_cache"), f32),
        **dict.fromkeys(("num_decodes", "seq_lens", "state_table", "chunk_blocks"), i32),
        "stride_token": width,
        **dict.fromkeys(("stride_a", "stride_b"), 2 * num_heads),
        "every": 512,
        "state_width": 512,
    }
    name, expect = f"G{num_keys} H{num_heads} d{dim} v{size}", {90: "HGMMA", 100: "UTC"}
    prefill = {**common, "cu_seqlens_q": i32}
    inverse, store = gpu.inverse_kernel.arg_names, gpu.store_kernel.arg_names
    return [
        *(
            Case(
                name=f"gated_delta_rule.{'prefill' if fast else 'any'} {name}",
                kernel=gpu.gated_delta_rule_kernel,
                args={**prefill, "inverse": f32} if fast else prefill,
                constexprs={**constexprs, "WITH_DECODES": not fast} | ({} if fast else {"inverse": None}),
                num_warps=gpu.NUM_WARPS,
                expect=expect,
                options=PDL,
            )
            for fast in (False, True)
        ),
        Case(
            name=f"gated_delta_rule.decode {name}",
            kernel=gpu.decode_kernel,
            args=common,
            constexprs=constexprs,
            num_warps=gpu.DECODE_WARPS,
            expect=expect,
            options=PDL,
        ),
        Case(
            name=f"gated_delta_rule.inverse {name}",
            kernel=gpu.inverse_kernel,
            args={key: kind for key, kind in {**prefill, "inverse": f32}.items() if key in inverse},
            constexprs={**{key: value for key, value in constexprs.items() if key in inverse}, "PARTS": gpu.PARTS},
            num_warps=gpu.NUM_WARPS,
            expect=expect,
            options=PDL,
        ),
        Case(
            name=f"gated_delta_rule.store {name}",
            kernel=gpu.store_kernel,
            args={name: kind for name, kind in prefill.items() if name in store},
            constexprs={name: value for name, value in constexprs.items() if name in store},
            num_warps=gpu.NUM_WARPS,
            options=PDL,
        ),
    ]


def cases() -> list[Case]:
    return [case for heads in (32, 64, 16) for case in _cases_of(16, heads, 128, 128)]
