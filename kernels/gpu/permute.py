"""Order of the routed rows, and their tiles: `kernels.ops.permute` in Triton, a counting sort without atomics.

A program per (expert, chunk of ids) finds how many ids each expert has, hence where its own begin,
ranks its expert's ids in its chunk, and writes their places. Up to `_ONE_LAUNCH` ids a program
reads all of them itself; above, a first launch counts the ids of each expert in each chunk. One
more "expert" follows the last: all routed rows come before it, and its own places are those that no
row takes.

N = T * K ids, e local experts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertwire.kernels.gpu.dependent_launch import PDL, wait_for_previous_kernel
from expertwire.kernels.gpu.grouped_gemm_tiles import token_tile
from expertwire.kernels.ops.permute import Permuted, TileMap, max_tiles

_ONE_LAUNCH = 8192  # ids
_STORED = tl.constexpr(128)  # tiles at a time
# Without it, ptxas for Blackwell spills a register or two where hundreds are left.
OPTIONS = {"maxnreg": 255, **PDL}


@triton.jit
def _num_valid(valid_ptr, num_ids, K: tl.constexpr):
    """Return the number of ids of valid tokens."""
    if valid_ptr is not None:
        num_ids = tl.minimum(num_ids, tl.load(valid_ptr) * K)
    return num_ids


@triton.jit
def _histogram(ids_ptr, n, end, num_experts, EXPERTS: tl.constexpr):
    """Return how many of the ids `n` before `end` each expert has: i32 [EXPERTS]."""
    ids = tl.load(ids_ptr + n, mask=n < end, other=-1).to(tl.int32)
    here = (ids >= 0) & (ids < num_experts)
    return tl.histogram(tl.where(here, ids, 0), EXPERTS, mask=here)


@triton.jit(do_not_specialize=["num_ids"])
def count_kernel(
    ids_ptr, counts_ptr, valid_ptr, num_ids, num_experts, K: tl.constexpr, CHUNK: tl.constexpr, EXPERTS: tl.constexpr
):
    """Grid (chunks,): write counts i32 [chunks, e]."""
    wait_for_previous_kernel()
    n = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    counts = _histogram(ids_ptr, n, _num_valid(valid_ptr, num_ids, K), num_experts, EXPERTS)
    expert = tl.arange(0, EXPERTS)
    tl.store(counts_ptr + tl.program_id(0) * num_experts + expert, counts, mask=expert < num_experts)


@triton.jit
def _count(
    ids_ptr, counts_ptr, num_ids, num_valid, num_experts, num_chunks, chunk, CHUNK: tl.constexpr, EXPERTS: tl.constexpr
):
    """Return each expert's ids, and how many of them come in earlier chunks: both i32 [EXPERTS]."""
    every, earlier = tl.zeros([EXPERTS], tl.int32), tl.zeros([EXPERTS], tl.int32)
    if counts_ptr is not None:
        CHUNKS: tl.constexpr = CHUNK // EXPERTS if CHUNK > EXPERTS else 1
        expert = tl.arange(0, EXPERTS)
        for start in range(0, num_chunks, CHUNKS):
            at = start + tl.arange(0, CHUNKS)
            mask = (at < num_chunks)[:, None] & (expert < num_experts)[None, :]
            counts = tl.load(counts_ptr + at[:, None] * num_experts + expert[None, :], mask=mask, other=0)
            every += tl.sum(counts, axis=0)
            earlier += tl.sum(tl.where((at < chunk)[:, None], counts, 0), axis=0)
    else:
        for start in range(0, num_ids, CHUNK):
            every += _histogram(ids_ptr, start + tl.arange(0, CHUNK), num_valid, num_experts, EXPERTS)
    return every, earlier


@triton.jit
def _describe(every, expert, before, num_experts, offsets_ptr, first_tile_ptr, tile_expert_ptr, tile_rows):
    """Store where an expert's rows and tiles begin."""
    tl.store(offsets_ptr + expert, before)
    index = tl.arange(0, every.shape[0])
    own = tl.sum(tl.where(index == expert, every, 0), axis=0)
    if first_tile_ptr is not None:
        tiles = (every + tile_rows - 1) // tile_rows
        first = tl.sum(tl.where(index < expert, tiles, 0), axis=0)
        tl.store(first_tile_ptr + expert, first)
        if expert < num_experts:
            num_tiles = (own + tile_rows - 1) // tile_rows
            for start in range(0, num_tiles, _STORED):
                tile = start + tl.arange(0, _STORED)
                tl.store(tile_expert_ptr + first + tile, tl.zeros([_STORED], tl.int32) + expert, mask=tile < num_tiles)


@triton.jit(do_not_specialize=["num_ids", "num_chunks", "tile_rows"])
def place_kernel(
    ids_ptr,
    counts_ptr,  # None: ids are counted here
    offsets_ptr,
    row_index_ptr,
    home_ptr,
    valid_ptr,
    first_tile_ptr,  # None: no tiles are wanted
    tile_expert_ptr,
    num_ids,
    num_experts,
    num_chunks,
    tile_rows,
    K: tl.constexpr,
    CHUNK: tl.constexpr,
    EXPERTS: tl.constexpr,  # num_experts rounded up to a power of two
):
    """Grid (e + 1, chunks)."""
    wait_for_previous_kernel()
    expert, chunk = tl.program_id(0), tl.program_id(1)
    num_valid = _num_valid(valid_ptr, num_ids, K)
    every, earlier = _count(ids_ptr, counts_ptr, num_ids, num_valid, num_experts, num_chunks, chunk, CHUNK, EXPERTS)
    index = tl.arange(0, EXPERTS)
    before = tl.sum(tl.where(index < expert, every, tl.where(index == expert, earlier, 0)), axis=0)
    if chunk == 0:
        _describe(every, expert, before, num_experts, offsets_ptr, first_tile_ptr, tile_expert_ptr, tile_rows)
    first, end = 0, num_ids
    if counts_ptr is not None:
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


def permute(
    ids_TK: Tensor,
    num_experts: int,
    num_valid: Tensor | None = None,
    *,
    format: str | None = None,
) -> Permuted:
    """Run `kernels.ops.permute.reference`; ids contiguous, i32 or i64.

    `format`: of weights, for whose products rows are cut into tiles.
    """
    assert ids_TK.is_contiguous(), f"strides {ids_TK.stride()} of shape {tuple(ids_TK.shape)}"
    num_ids = ids_TK.numel()

    def empty(*size: int) -> Tensor:
        return torch.empty(size, dtype=torch.int32, device=ids_TK.device)

    tile_map = None
    if format is not None:
        tokens = token_tile(format, num_ids, num_experts)
        tile_map = TileMap(empty(num_experts + 1), empty(max_tiles(num_ids, num_experts, tokens)), tokens)
    offsets, row_index_N, home_N = empty(num_experts + 1), empty(num_ids), empty(num_ids)
    chunk, counted = chunk_of(num_ids)
    num_chunks = triton.cdiv(num_ids, chunk) if counted else 1
    counts = empty(num_chunks, num_experts) if counted else None
    constexprs = {"K": ids_TK.shape[1], "CHUNK": chunk, "EXPERTS": max(2, triton.next_power_of_2(num_experts))}
    if counted:
        count_kernel[(num_chunks,)](
            ids_TK, counts, num_valid, num_ids, num_experts, **constexprs, num_warps=8, **OPTIONS
        )
    place_kernel[(num_experts + 1, num_chunks)](
        ids_TK,
        counts,
        offsets,
        row_index_N,
        home_N,
        num_valid,
        tile_map and tile_map.first_tile,
        tile_map and tile_map.tile_expert,
        num_ids,
        num_experts,
        num_chunks,
        tile_map.token_tile if tile_map else 0,
        **constexprs,
        num_warps=warps_of(chunk),
        **OPTIONS,
    )
    return Permuted(expert_offsets=offsets, row_index_N=row_index_N, home_N=home_N, tile_map=tile_map)


def chunk_of(num_ids: int) -> tuple[int, bool]:
    """Return how many ids a program takes at a time, and whether they are counted by a launch before."""
    counted = num_ids > _ONE_LAUNCH
    return (4096 if counted else min(2048, max(128, triton.next_power_of_2(num_ids)))), counted


def warps_of(chunk: int) -> int:
    return max(1, min(8, chunk // 256))
