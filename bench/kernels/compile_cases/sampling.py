"""Compile cases of sampling, penalties, the look-up of a step's tokens, and copies of blocks."""

from __future__ import annotations

from typing import Any

import torch
import triton

from expertwire.bench.kernels.compile_check import Case
from expertwire.kernels.gpu import copy_blocks, penalties, prepare_inputs, sampling


def sampling_cases() -> list[Case]:
    i32, i64, fp32 = torch.int32, torch.int64, torch.float32
    types = {
        "logits_ptr": fp32,
        "largest_ptr": fp32,
        "first_ptr": i32,
        "temperature_ptr": fp32,
        "top_k_ptr": i64,
        "top_p_ptr": fp32,
        "min_p_ptr": fp32,
        "seed_ptr": i64,
        "branch_ptr": i64,
        "position_ptr": i64,
        "counts_ptr": i32,
        "masses_ptr": i64,
        "keys_ptr": i32,
        "tokens_ptr": i32,
        "token_ptr": i64,
    }
    drawn = {"DRAWN": True}
    kernels = [
        ("largest", sampling.largest_kernel, {}),
        ("weigh", sampling.weigh_kernel, {"FILTERED": True}),
        ("weigh all", sampling.weigh_kernel, {"FILTERED": False}),
        ("gather", sampling.gather_kernel, {}),
        ("choose", sampling.choose_kernel, {"FILTERED": True, **drawn}),
        ("choose of all", sampling.choose_kernel, {"FILTERED": False, **drawn}),
        ("choose greedy", sampling.choose_kernel, {"FILTERED": False, "DRAWN": False}),
    ]
    vocab = 201088  # 151936 compiles to the same
    num_chunks = triton.cdiv(vocab, sampling.CHUNK_TOKENS)
    found = []
    for name, kernel, flags in kernels:
        constexprs = {"CHUNK": sampling.CHUNK_TOKENS, **flags}
        if "CHUNKS_C" in kernel.arg_names:
            constexprs["CHUNKS_C"] = triton.next_power_of_2(num_chunks)
        args = {pointer: dtype for pointer, dtype in types.items() if pointer in kernel.arg_names}
        found.append(
            Case(
                name=f"sampling.{name} V{vocab}",
                kernel=kernel,
                args={**args, "vocab": vocab, "num_chunks": num_chunks},
                constexprs=constexprs,
                num_warps=8,
                wide=False,  # results are a few numbers, or lie anywhere
            )
        )
    return found


def penalties_cases() -> list[Case]:
    i32, fp32, vocab = torch.int32, torch.float32, 151936
    ids = dict.fromkeys(("tokens_ptr", "slot_ptr", "prompt_len_ptr", "known_ptr", "counts_ptr"), i32)
    parameters = dict.fromkeys(("repetition_ptr", "presence_ptr", "frequency_ptr"), fp32)
    common: dict[str, Any] = {"constexprs": {"CHUNK": penalties.CHUNK_TOKENS}, "num_warps": 8}
    return [
        Case(
            name="penalties.count",
            kernel=penalties.count_kernel,
            args={**ids, "tokens_stride": 32769, "vocab": vocab},
            wide=False,
            **common,
        ),
        Case(
            name="penalties.penalize",
            kernel=penalties.penalize_kernel,
            args={"logits_ptr": fp32, "row_ptr": i32, "counts_ptr": i32, **parameters, "vocab": vocab},
            options=penalties.EXACT,
            **common,
        ),
        Case(
            name="penalties.add",
            kernel=penalties.add_kernel,
            args={
                "logits_ptr": fp32,
                "row_ptr": i32,
                "token_ptr": i32,
                "value_ptr": fp32,
                "count": 300,
                "vocab": vocab,
            },
            wide=False,
            **common,
        ),
    ]


def prepare_inputs_cases() -> list[Case]:
    i32, i64 = torch.int32, torch.int64
    pointers = {"slot_ptr": i32, "position_ptr": i32, "tokens_ptr": i32, "blocks_ptr": i32}
    outputs = {"token_out_ptr": i64, "position_out_ptr": i64, "mapping_out_ptr": i64}
    sizes = {"num_tokens": 256, "tokens_stride": 32769, "cache_stride": 524288, "blocks_stride": 2048, "block_size": 16}
    return [
        Case(
            name="prepare_inputs",
            kernel=prepare_inputs.prepare_inputs_kernel,
            args=pointers | outputs | sizes,
            constexprs={"TOKENS": prepare_inputs.TOKENS_PER_PROGRAM},
            wide=False,  # a few numbers
        )
    ]


def copy_blocks_cases() -> list[Case]:
    return [
        Case(
            name="copy_blocks",
            kernel=copy_blocks.copy_blocks_kernel,
            args=dict.fromkeys(("address_ptr", "words_ptr", "source_ptr", "target_ptr"), torch.int64),
            constexprs={"CHUNK": copy_blocks.CHUNK_WORDS},
            wide=False,  # a warp's words lie side by side
        )
    ]


def cases() -> list[Case]:
    return [*sampling_cases(), *penalties_cases(), *prepare_inputs_cases(), *copy_blocks_cases()]
