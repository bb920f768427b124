"""Order of the routed rows: `kernels.permute` in Triton, a counting sort without atomics.

A program a (expert, chunk of ids) finds how many ids come before its own, counts off its expert's ids in its chunk, and
writes their places. Up to `_ONE_LAUNCH` ids a program reads all of them itself; above, a first launch counts the ids of
each expert in each chunk. One more "expert" stands behind the last: before it are all routed rows, and its own are the
places that no row takes.

N = T * K ids, e local experts, C chunks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertwire.kernels.gpu.compile import Case
from expertwire.kernels.permute import Permuted

_ONE_LAUNCH = 16384  # ids


@triton.jit
def _num_valid(valid_ptr, num_ids, K: tl.constexpr, LIMITED: tl.constexpr):
    """How many ids belong to tokens that count."""
    if LIMITED:
        num_ids = tl.minimum(num_ids, tl.load(valid_ptr) * K)
    return num_ids


@triton.jit
def count_kernel(
    ids_ptr,
    counts_ptr,
    valid_ptr,
    num_ids,
    num_experts,
    num_chunks,
    K: tl.constexpr,
    CHUNK: tl.constexpr,
    EXPERTS_C: tl.constexpr,
    LIMITED: tl.constexpr,
):
    """counts i32 [e, C]."""
    chunk = tl.program_id(0)
    n = chunk * CHUNK + tl.arange(0, CHUNK)
    ids = tl.load(ids_ptr + n, mask=n < _num_valid(valid_ptr, num_ids, K, LIMITED), other=-1).to(tl.int32)
    here = (ids >= 0) & (ids < num_experts)
    # One bin more than experts takes what is none of them.
    counts = tl.histogram(tl.where(here, ids, EXPERTS_C - 1), EXPERTS_C)
    expert = tl.arange(0, EXPERTS_C)
    tl.store(counts_ptr + expert * num_chunks + chunk, counts, mask=expert < num_experts)


@triton.jit
def _before(
    ids_ptr, counts_ptr, num_ids, num_valid, num_experts, num_chunks, expert, chunk, CHUNK: tl.constexpr,
    COUNTED: tl.constexpr,
):  # fmt: skip
    """How many rows come before those of this expert in this chunk."""
    found = tl.zeros([CHUNK], tl.int32)
    if COUNTED:
        for start in range(0, expert * num_chunks + chunk, CHUNK):
            at = start + tl.arange(0, CHUNK)
            counted = at < tl.minimum(expert, num_experts) * num_chunks + tl.where(expert < num_experts, chunk, 0)
            found += tl.load(counts_ptr + at, mask=counted, other=0)
    else:
        for start in range(0, num_ids, CHUNK):
            n = start + tl.arange(0, CHUNK)
            ids = tl.load(ids_ptr + n, mask=n < num_valid, other=-1)
            found += ((ids >= 0) & (ids < expert)).to(tl.int32)
    return tl.sum(found, axis=0)


@triton.jit
def place_kernel(
    ids_ptr,
    counts_ptr,
    offsets_ptr,
    row_index_ptr,
    home_ptr,
    valid_ptr,
    num_ids,
    num_experts,
    num_chunks,
    K: tl.constexpr,
    CHUNK: tl.constexpr,
    COUNTED: tl.constexpr,
    LIMITED: tl.constexpr,
):
    expert, chunk = tl.program_id(0), tl.program_id(1)
    num_valid = _num_valid(valid_ptr, num_ids, K, LIMITED)
    before = _before(ids_ptr, counts_ptr, num_ids, num_valid, num_experts, num_chunks, expert, chunk, CHUNK, COUNTED)
    if chunk == 0:
        tl.store(offsets_ptr + expert, before)
    first, end = 0, num_ids
    if COUNTED:
        first, end = chunk * CHUNK, tl.minimum(num_ids, (chunk + 1) * CHUNK)
    for start in range(first, end, CHUNK):
        n = start + tl.arange(0, CHUNK)
        if expert < num_experts:
            own = tl.load(ids_ptr + n, mask=n < tl.minimum(end, num_valid), other=-1).to(tl.int32) == expert
            ranks = tl.cumsum(own.to(tl.int32), axis=0)
            at = before + ranks - 1
            tl.store(home_ptr + at, n, mask=own)
            tl.store(row_index_ptr + at, n // K, mask=own)
            before += tl.max(ranks, axis=0)
        else:
            none = tl.full([CHUNK], -1, tl.int32)
            tl.store(home_ptr + n, none, mask=(n >= before) & (n < end))
            tl.store(row_index_ptr + n, none, mask=(n >= before) & (n < end))


def _plan(num_ids: int) -> tuple[int, bool]:
    """How many ids a program takes at a time, and whether they are counted beforehand."""
    counted = num_ids > _ONE_LAUNCH
    return (4096 if counted else min(2048, max(128, triton.next_power_of_2(num_ids)))), counted


def permute(ids_TK: Tensor, num_experts: int, num_valid: Tensor | None = None) -> Permuted:
    """As `kernels.permute.reference`; ids contiguous, i32 or i64."""
    assert ids_TK.is_contiguous(), f"strides {ids_TK.stride()} of shape {tuple(ids_TK.shape)}"
    num_ids, device = ids_TK.numel(), ids_TK.device
    offsets = torch.empty(num_experts + 1, dtype=torch.int32, device=device)
    row_index_N, home_N = (torch.empty(num_ids, dtype=torch.int32, device=device) for _ in range(2))
    chunk, counted = _plan(num_ids)
    num_chunks = triton.cdiv(num_ids, chunk) if counted else 1
    counts = offsets
    limited, valid, top_k = num_valid is not None, offsets if num_valid is None else num_valid, ids_TK.shape[1]
    if counted:
        counts = torch.empty(num_experts, num_chunks, dtype=torch.int32, device=device)
        experts_c = triton.next_power_of_2(num_experts + 1)
        count_kernel[(num_chunks,)](
            ids_TK, counts, valid, num_ids, num_experts, num_chunks, top_k, chunk, experts_c, limited, num_warps=8
        )
    place_kernel[(num_experts + 1, num_chunks)](
        ids_TK,
        counts,
        offsets,
        row_index_N,
        home_N,
        valid,
        num_ids,
        num_experts,
        num_chunks,
        K=top_k,
        CHUNK=chunk,
        COUNTED=counted,
        LIMITED=limited,
        num_warps=_warps(chunk),
    )
    return Permuted(expert_offsets=offsets, row_index_N=row_index_N, home_N=home_N)


def _warps(chunk: int) -> int:
    return max(1, min(8, chunk // 256))


def cases() -> list[Case]:
    i32, i64 = torch.int32, torch.int64
    shapes = [(1, 8, 128), (128, 8, 256), (128, 2, 8), (1024, 4, 128), (2048, 8, 384), (8192, 8, 256), (262144, 8, 4)]
    found = []
    for num_tokens, top_k, num_experts in shapes:
        num_ids = num_tokens * top_k
        chunk, counted = _plan(num_ids)
        sizes = {
            "num_ids": num_ids,
            "num_experts": num_experts,
            "num_chunks": triton.cdiv(num_ids, chunk) if counted else 1,
        }
        pointers = dict.fromkeys(("counts_ptr", "offsets_ptr", "row_index_ptr", "home_ptr", "valid_ptr"), i32)
        common = {"expect": {90: "", 100: ""}, "wide": False}
        place = {"K": top_k, "CHUNK": chunk, "COUNTED": counted, "LIMITED": True}
        name = f"T{num_tokens} K{top_k} e{num_experts}"
        found.append(
            Case(
                name=f"permute.place {name}",
                kernel=place_kernel,
                args={"ids_ptr": i64, **pointers, **sizes},
                constexprs=place,
                num_warps=_warps(chunk),
                **common,
            )
        )
        if counted:
            experts_c = triton.next_power_of_2(num_experts + 1)
            found.append(
                Case(
                    name=f"permute.count {name}",
                    kernel=count_kernel,
                    args={"ids_ptr": i64, "counts_ptr": i32, "valid_ptr": i32, **sizes},
                    constexprs={"K": top_k, "CHUNK": chunk, "EXPERTS_C": experts_c, "LIMITED": True},
                    num_warps=8,
                    **common,
                )
            )
    return found
