"""Compile cases of the NVLink dispatch and combine kernels."""

from __future__ import annotations

from typing import Any

import torch
import triton

from expertwire.bench.kernels.compile_check import Case
from expertwire.kernels.gpu import dispatch_combine, dispatch_low_latency, signals
from expertwire.kernels.gpu.dependent_launch import PDL
from expertwire.kernels.ops.quantize import packed_bytes


def dispatch_combine_cases() -> list[Case]:
    shapes = [
        ("EP8 T128 quantised", 8, 32, 128, 8, packed_bytes(7168), 7168),
        ("EP8 T4096 bf16", 8, 32, 4096, 8, 14336, 0),
        ("EP72 T128 bf16", 72, 4, 128, 8, 14336, 0),
        ("EP4 T2048 K22 bf16", 4, 128, 2048, 22, 4096, 0),
        ("EP16 T512 K22 quantised", 16, 32, 512, 22, packed_bytes(2048), 2048),
    ]
    return [case for shape in shapes for case in _dispatch_combine_cases_of(*shape)]


def _dispatch_combine_cases_of(
    name: str, ranks: int, experts: int, tokens: int, top_k: int, row_bytes: int, columns: int
) -> list[Case]:
    i32, i64, power = torch.int32, torch.int64, triton.next_power_of_2
    words, combine_words = row_bytes // 4, 3584 if top_k == 8 else 1024
    block, warps = (
        dispatch_combine.quantized_block(columns) if columns else dispatch_combine.row_block(max(words, combine_words))
    )
    combine_block, combine_warps = dispatch_combine.row_block(combine_words)
    pointers = {"epoch_ptr": i64, "done_ptr": i32, "peers_ptr": i64}
    sizes = {"me": 3, "num_ranks": ranks}
    k, chunk = {"K": top_k}, {"CHUNK": dispatch_combine.ids_chunk(tokens * top_k), "EXPERTS": power(experts + 1)}
    routes = {"me": 3, "max_tokens": tokens, "num_experts": experts, "dispatch_signals": 0, "routes_offset": 4096}
    found = {"peers_ptr": i64, "rank_offsets_ptr": i32, "counts_ptr": i32}

    def case(kernel: Any, args: dict[str, Any], constexprs: dict[str, Any], **options: Any) -> Case:
        return Case(
            name=f"dispatch_combine.{kernel.__name__.removesuffix('_kernel')} {name}",
            kernel=kernel,
            args=args,
            constexprs=constexprs,
            **({"options": PDL} | options),
        )

    plan = {"ids_ptr": i64, "rank_offsets_ptr": i32, "target_ptr": i32, "counts_ptr": i64, "valid_ptr": i32}
    x = torch.bfloat16 if columns else i32
    send: dict[str, Any] = {
        "x_ptr": x,
        "ids_ptr": i64,
        "target_ptr": i32,
        "counts_ptr": i64,
        "valid_ptr": i32,
        **pointers,
        **sizes,
    }
    regions = {"dispatch_signals": 0, "routes_offset": 4096, "rows_offset": 1 << 20, "combine_offset": 1 << 28}
    home = {"y_ptr": i32, "slot_ptr": i32, "expert_offsets_ptr": i32, **pointers, **sizes, "num_experts": experts}
    index = {**found, "expert_offsets_ptr": i32, "row_index_ptr": i32, "slot_ptr": i32, **routes, "num_ranks": ranks}
    tile = {"TOKENS": dispatch_combine.plan_tokens(tokens, top_k), "K_BLOCK": power(top_k), "LIMITED": True}
    rows = {
        "WORDS": words,
        "COLUMNS": columns,
        "COMBINE_WORDS": combine_words,
        "BLOCK": block,
        "K_BLOCK": power(top_k + 1),
    }
    back = {"WORDS": combine_words, "BLOCK": combine_block, "RANKS": power(ranks)}
    return [
        case(
            dispatch_combine.dispatch_plan_kernel,
            {**plan, "num_tokens": tokens, "max_tokens": tokens},
            k | tile,
            wide=False,
        ),
        case(
            dispatch_combine.dispatch_send_kernel,
            {**send, "num_tokens": tokens, "max_tokens": tokens, **regions},
            k | rows | {"RANKS": power(ranks), "LIMITED": True},
            num_warps=warps,
            options=dispatch_combine.SEND_OPTIONS,
        ),
        case(dispatch_combine.dispatch_count_kernel, {**found, **routes}, k | chunk, wide=False),
        case(dispatch_combine.dispatch_index_kernel, index, k | chunk | {"RANKS": power(ranks)}, wide=False),
        case(
            dispatch_combine.combine_send_kernel,
            {**home, "slots_per_rank": tokens * top_k, "combine_signals": 1024, "combine_offset": 1 << 28},
            back,
            num_warps=combine_warps,
        ),
    ]


def low_latency_cases() -> list[Case]:
    shapes = [  # ranks, experts, tokens, bytes of a row, columns that are quantised
        (8, 32, 128, packed_bytes(7168), 7168),
        (8, 32, 128, 14336, 0),
        (72, 4, 128, packed_bytes(7168), 7168),
    ]
    return [case for shape in shapes for case in _low_latency_cases_of(*shape)]


def _low_latency_cases_of(ranks: int, experts: int, tokens: int, row_bytes: int, columns: int) -> list[Case]:
    i32, i64, power, top_k = torch.int32, torch.int64, triton.next_power_of_2, 8
    words, combine_words = row_bytes // 4, 3584
    block, warps = dispatch_low_latency.row_block(columns or max(words, combine_words))
    name = f"EP{ranks} T{tokens}"
    pointers = {"rank_offsets_ptr": i32, "epoch_ptr": i64, "peers_ptr": i64}
    sizes = {"me": 3, "num_ranks": ranks, "max_tokens": tokens, "dispatch_signals": 0, "routes_offset": 4096}
    send: dict[str, Any] = {
        "x_ptr": torch.bfloat16 if columns else i32,
        "ids_ptr": i64,
        "valid_ptr": i32,
        "done_ptr": i32,
    }
    send |= {"num_tokens": tokens, "rows_offset": 1 << 20, "combine_offset": 1 << 28}
    arrive: dict[str, Any] = dict.fromkeys(("expert_offsets_ptr", "row_index_ptr", "slot_ptr"), i32)
    arrive |= {"num_experts": experts, "stall_offset": 2048, "limit": 10**11}
    tile = {"K": top_k, "K_BLOCK": power(top_k), "TOKENS": power(tokens), "LIMITED": True, "RANKS": power(ranks)}
    rows = {"WORDS": words, "COLUMNS": columns, "COMBINE_WORDS": combine_words, "BLOCK": block}
    found = {
        "K": top_k,
        "CHUNK": dispatch_low_latency.chunk_of(tokens, top_k, ranks),
        "RANKS": power(ranks),
        "CLOCK": True,
    }
    cases = [
        Case(
            name=f"dispatch_low_latency.send {name} {'quantised' if columns else 'bf16'}",
            kernel=dispatch_low_latency.low_latency_send_kernel,
            args={**pointers, **sizes, **send},
            constexprs=tile | rows,
            num_warps=warps,
            options=dispatch_combine.SEND_OPTIONS,
        )
    ]
    if columns:  # what has arrived is found alike
        arrival = {**pointers, **sizes, **arrive}
        cases.append(
            Case(
                name=f"dispatch_low_latency.receive {name}",
                kernel=dispatch_low_latency.low_latency_receive_kernel,
                args=arrival,
                constexprs=found,
                wide=False,
            )
        )
    return cases


def signals_cases() -> list[Case]:
    args = {
        "peers_ptr": torch.int64,
        "epoch_ptr": torch.int64,
        "me": 3,
        "signals_offset": 0,
        "stall_offset": 2048,
        "limit": 10**11,
    }
    return [
        Case(
            name=f"signals.wait EP{ranks}",
            kernel=signals.wait_for_signals_kernel,
            args=args | {"num_ranks": ranks},
            constexprs={"PHASE": 1, "RANKS": triton.next_power_of_2(ranks), "CLOCK": True},
            num_warps=1,
            wide=False,
        )
        for ranks in (8, 72)
    ]


def cases() -> list[Case]:
    return [*dispatch_combine_cases(), *low_latency_cases(), *signals_cases()]
