"""Multi-head latent attention in Triton, absorbed, for decode and prefill; `kernels.ops.mla` has the mathematics.

As in `attention`, blocks of 64 rows ((query, head) pairs of one sequence) meet tiles of keys and
splits at absolute positions, and another kernel merges partial results in order. Two things differ.
The tile of latents is read once and serves as keys and as values. And the sums of 64 rows, 64 x 512
fp32 numbers, fill half of the register file, so there is no room for the total of the earlier
splits beside them: every split goes through the workspace, in prefill too (4 KB written and read
per row and split, where a split's products take 2.2 MFLOP a row). Its slots are assigned on the
device (`mla_split_kv`): decodes and prefills share a launch of 1,024 (top-k positions) to 2,048
tokens with 128 heads, at any length.

With top-k positions (`chosen`) a token is a sequence of its own, of the positions in its list,
which the kernel reads.

With 128 heads a token's latents meet 128 rows: 240 FLOP a byte, so decode is nearly compute bound
and the rows are full. Padding matters only for models with few heads.

Tiles of an fp8 cache are converted to the queries' dtype, and the scale is applied as in
`attention`.

T tokens, H heads, c latent size, r rotated size, l = c + r. In the kernels M rows of a block and N
keys of a tile, as in FlashAttention.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from expertwire.kernels.gpu.attention import masked_online_softmax, rows_of_keys
from expertwire.kernels.gpu.dependent_launch import PDL, wait_for_previous_kernel
from expertwire.kernels.gpu.device import Device
from expertwire.kernels.gpu.mla_split_kv import FIELDS, Workspace, allocate, merge_into_slot, merge_workspace, plan
from expertwire.kernels.gpu.rope_and_cache import check_cache_scales
from expertwire.kernels.gpu.split_kv import LOG2_E, SPLIT
from expertwire.kernels.ops.attention import FP8, AttentionMetadata

WORKSPACE_ROWS = 1 << 18  # of partial results: 0.5 GB with 512 latent numbers
_PROGRAMS_PER_SM = 4


@triton.jit
def _latents_at(
    chosen,
    token,
    table,
    tile,
    end,
    stride_block,
    STRIDE_SLOT: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TOP_K: tl.constexpr,
):
    """Return the keys [N] of a tile, which lie before `end`, and their cache offsets; with TOP_K they
    are keys of a list.
    """
    if TOP_K == 0:
        return rows_of_keys(table, tile, end, stride_block, STRIDE_SLOT, KEYS, BLOCK_SIZE)
    else:
        key = tile + tl.arange(0, KEYS)
        known = key < end
        position = tl.load(chosen + token * TOP_K + key, mask=known, other=0).to(tl.int32)
        block = tl.load(table + position // BLOCK_SIZE, mask=known, other=0).to(tl.int64)
        return key, known, block * stride_block + position % BLOCK_SIZE * STRIDE_SLOT


@triton.jit
def _attend_split(
    q_Mr,
    q1_Mc,
    q2_Mc,
    position_M,
    cache,
    kv_scale,
    chosen,
    table,
    partials,
    statistics,
    unit,
    split,
    num_rows,
    scale,
    stride_block,
    STRIDE_SLOT: tl.constexpr,
    H: tl.constexpr,
    RANK: tl.constexpr,
    ROTATED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SPLIT_KEYS: tl.constexpr,
    TOP_K: tl.constexpr,
    COLUMN_SPLITS: tl.constexpr,
):
    """Compute one split of a work unit into its slot. What only the end needs is read again there, to
    save registers.
    """
    column_split = tl.program_id(1)
    HALF: tl.constexpr = RANK // 2
    latent, rotated = tl.arange(0, HALF), RANK + tl.arange(0, ROTATED)
    token = tl.load(unit) // H  # the owner of the list
    stop = tl.minimum(tl.load(unit + 5), (split + 1) * SPLIT_KEYS)
    acc_1 = tl.zeros([ROWS, HALF], tl.float32)
    acc_2 = tl.zeros([ROWS, HALF], tl.float32)
    row_max = tl.full([ROWS], float("-inf"), tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    for tile in tl.range(split * SPLIT_KEYS, stop, KEYS, disable_licm=True):
        key, known, offset = _latents_at(
            chosen, token, table, tile, stop, stride_block, STRIDE_SLOT, KEYS, BLOCK_SIZE, TOP_K
        )
        row = cache + offset[:, None]
        k_Nr = tl.load(row + rotated, mask=known[:, None], other=0.0).to(q_Mr.dtype)
        c1_Nc = tl.load(row + latent, mask=known[:, None], other=0.0).to(q_Mr.dtype)
        c2_Nc = tl.load(row + HALF + latent, mask=known[:, None], other=0.0).to(q_Mr.dtype)
        scores = tl.dot(q_Mr, tl.trans(k_Nr), input_precision="ieee")
        scores = tl.dot(q1_Mc, tl.trans(c1_Nc), scores, input_precision="ieee")
        scores = tl.dot(q2_Mc, tl.trans(c2_Nc), scores, input_precision="ieee")
        visible = known[None, :] if TOP_K > 0 else key[None, :] <= position_M[:, None]
        p, old, row_max, row_sum = masked_online_softmax(row_max, row_sum, scores, scale, visible)
        p = p.to(c1_Nc.dtype)
        if COLUMN_SPLITS == 1:
            acc_1 = tl.dot(p, c1_Nc, acc_1 * old[:, None], input_precision="ieee")
            acc_2 = tl.dot(p, c2_Nc, acc_2 * old[:, None], input_precision="ieee")
        else:
            c_Nc = tl.load(row + column_split * HALF + latent, mask=known[:, None], other=0.0).to(q_Mr.dtype)
            acc_1 = tl.dot(p, c_Nc, acc_1 * old[:, None], input_precision="ieee")
    if kv_scale is not None:
        acc_1, acc_2 = acc_1 * tl.load(kv_scale), acc_2 * tl.load(kv_scale)
    first_row, place = tl.load(unit), tl.load(unit + 2)
    row_M = first_row + tl.arange(0, ROWS)
    live_M = row_M < tl.load(unit + 1)
    at, folds = place, False
    if TOP_K == 0:
        folds = split > tl.load(unit + 3)
        at += folds.to(tl.int32) * (num_rows + tl.program_id(0) * ROWS - first_row - place)
    target = partials + at * RANK + row_M[:, None] * RANK + column_split * HALF + latent
    tl.store(target, acc_1, mask=live_M[:, None])
    if COLUMN_SPLITS == 1:
        tl.store(target + HALF, acc_2, mask=live_M[:, None])
    notes = statistics + (column_split * num_rows + place + row_M) * 2
    if folds:
        values = partials + column_split * HALF
        merge_into_slot(values, notes, at + row_M, place + row_M, live_M, row_max, row_sum, RANK, RANK // COLUMN_SPLITS)
    else:
        tl.store(notes, row_max, mask=live_M)
        tl.store(notes + 1, row_sum, mask=live_M)


@triton.jit(do_not_specialize=["num_rows", "table_width"])
def mla_kernel(
    q,
    cache,
    kv_scale,
    chosen,
    partials,
    statistics,
    units,
    block_table,
    num_rows,
    scale,
    stride_token,
    stride_head,
    stride_block,
    table_width,
    STRIDE_SLOT: tl.constexpr,
    H: tl.constexpr,
    RANK: tl.constexpr,
    ROTATED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SPLIT_KEYS: tl.constexpr,
    TOP_K: tl.constexpr,
    COLUMN_SPLITS: tl.constexpr,
):
    """Grid (programs that share the work units, COLUMN_SPLITS).

    The sums are two halves of the columns, so that not all of them are in registers for storing at
    once; with two COLUMN_SPLITS each program has one half. TOP_K: positions in a token's list, 0 if
    it sees all.
    """
    wait_for_previous_kernel()
    HALF: tl.constexpr = RANK // 2
    latent, rotated = tl.arange(0, HALF), RANK + tl.arange(0, ROTATED)
    if kv_scale is not None:
        scale *= tl.load(kv_scale)
    # What only the end of a split needs must not occupy registers during the loop: it is not hoisted, and is read again.
    for i in tl.range(tl.program_id(0), tl.load(units), tl.num_programs(0), disable_licm=True):
        unit = units + (i + 1) * FIELDS
        row_M = tl.load(unit) + tl.arange(0, ROWS)
        live_M, position_M = row_M < tl.load(unit + 1), row_M // H + tl.load(unit + 7)
        query = q + ((row_M // H).to(tl.int64) * stride_token + row_M % H * stride_head)[:, None]
        q_Mr = tl.load(query + rotated, mask=live_M[:, None], other=0.0)
        q1_Mc = tl.load(query + latent, mask=live_M[:, None], other=0.0)
        q2_Mc = tl.load(query + HALF + latent, mask=live_M[:, None], other=0.0)
        table = block_table + tl.load(unit + 6).to(tl.int64) * table_width
        if TOP_K == 0:
            for split in tl.range(tl.load(unit + 3), tl.load(unit + 4), disable_licm=True):
                _attend_split(
                    q_Mr, q1_Mc, q2_Mc, position_M, cache, kv_scale, chosen, table, partials, statistics, unit, split,
                    num_rows, scale, stride_block, STRIDE_SLOT, H, RANK, ROTATED, BLOCK_SIZE, ROWS, KEYS,
                    SPLIT_KEYS, TOP_K, COLUMN_SPLITS
                )  # fmt: skip
        else:  # a slot for each split of a list
            split = tl.load(unit + 3)
            if split < tl.load(unit + 4):
                _attend_split(
                    q_Mr, q1_Mc, q2_Mc, position_M, cache, kv_scale, chosen, table, partials, statistics, unit, split,
                    num_rows, scale, stride_block, STRIDE_SLOT, H, RANK, ROTATED, BLOCK_SIZE, ROWS, KEYS,
                    SPLIT_KEYS, TOP_K, COLUMN_SPLITS
                )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class MlaTileConfig:
    """Tile sizes and launch options, the same for all steps."""

    rows: int
    keys: int
    split: int  # keys, a multiple of `keys`
    column_splits: int  # programs, each with a part of the latent columns
    num_warps: int
    num_stages: int


def tile_config(*, rank: int, element_size: int, arch: int, fp8: bool = False) -> MlaTileConfig:
    """Return the configuration for the shapes, the size of the queries' dtype in bytes, the
    architecture and the cache.
    """
    # Tensor memory, 512 columns, holds half of the sums beside the scores; so do registers beside a tile being converted.
    blackwell = arch >= 100
    keys = 32 if blackwell or rank * element_size > 1024 else 64
    column_splits = 2 if blackwell or fp8 else 1
    return MlaTileConfig(rows=64, keys=keys, split=SPLIT, column_splits=column_splits, num_warps=8, num_stages=2)


def attend(
    q_THl: Tensor,
    cache: Tensor,
    seqs: AttentionMetadata,
    device: Device,
    *,
    rank: int,
    scale: float,
    chosen: Tensor | None = None,
    kv_scale: Tensor | None = None,
    out: Tensor | None = None,
    config: MlaTileConfig | None = None,
    workspace_rows: int = WORKSPACE_ROWS,
) -> Tensor:
    """Run attention as `kernels.ops.mla.reference` does, into [T, H, c] of q's dtype.

    Rows that belong to no sequence are left as they are. q_THl: tokens and heads may be strided.
    `chosen`: contiguous lists of ascending positions, all that the token sees where those are at
    most k. `config` defaults to `tile_config` of the shapes. Three launches (plan, attend, merge)
    handle as many tokens as `workspace_rows` has slots for, however long the sequences are.
    """
    num_tokens, num_heads, width = q_THl.shape
    assert cache.shape[2] == width, f"rows of {cache.shape[2]} numbers, queries of {width}"
    assert cache.stride(2) == q_THl.stride(2) == 1, f"strides {cache.stride()} and {q_THl.stride()}"
    assert scale > 0, f"scale {scale}: maxima are taken before it is applied"
    check_cache_scales(kv_scale, cache, 1)
    assert seqs.max_decodes <= num_tokens, f"{seqs.max_decodes} decodes in {num_tokens} rows"
    for size in (rank, width - rank):
        assert size == triton.next_power_of_2(size) >= 16, f"{rank} latent numbers and {width - rank} rotated ones"
    out = q_THl.new_empty(num_tokens, num_heads, rank) if out is None else out
    assert out.is_contiguous(), f"output strides {out.stride()}"
    fp8 = cache.dtype == FP8
    config = config or tile_config(rank=rank, element_size=q_THl.element_size(), arch=device.arch, fp8=fp8)
    top_k = 0
    if chosen is not None:
        top_k = chosen.shape[1]
        assert chosen.shape == (num_tokens, top_k), f"lists {tuple(chosen.shape)} of {num_tokens} tokens"
        assert chosen.is_contiguous(), f"lists with strides {chosen.stride()}"
    # One slot of partial results a token and split of its list of keys, and at least one a token.
    splits = triton.cdiv(top_k or seqs.max_seq_len, config.split)
    least = splits if top_k else 1
    num_slots = max(least, min(workspace_rows // num_heads, num_tokens * splits))
    step = num_slots // least
    num_programs = min(_PROGRAMS_PER_SM * device.num_sms, num_slots * triton.cdiv(num_heads, config.rows))
    workspace = allocate(out, seqs, num_slots, num_programs, rows=config.rows, column_splits=config.column_splits)
    for first in range(0, num_tokens, step):
        tokens = first, min(first + step, num_tokens)
        plan(workspace, num_heads, seqs, tokens, rows=config.rows, split=config.split, top_k=top_k)
        _launch(q_THl, cache, kv_scale, chosen, workspace, seqs, device, config, scale)
        merge_workspace(workspace, out, seqs, tokens, split=config.split, top_k=top_k)
    return out


def launch_options(arch: int) -> Mapping[str, int | bool]:
    """Return launch options.

    As in `linear`, ptxas for Blackwell spills a few registers without `maxnreg`; for Hopper, with
    Triton 3.6.0, with it.
    """
    return {"maxnreg": 255, **PDL} if arch >= 100 else PDL


def _launch(
    q_THl: Tensor,
    cache: Tensor,
    kv_scale: Tensor | None,
    chosen: Tensor | None,
    workspace: Workspace,
    seqs: AttentionMetadata,
    device: Device,
    config: MlaTileConfig,
    scale: float,
) -> None:
    num_heads, rank = q_THl.shape[1], workspace.values.shape[1]
    mla_kernel[workspace.num_programs, config.column_splits](
        q_THl, cache, kv_scale, chosen, workspace.values, workspace.statistics, workspace.units, seqs.block_table,
        workspace.num_slots * num_heads,
        scale * LOG2_E.value, q_THl.stride(0), q_THl.stride(1), cache.stride(0), seqs.block_table.stride(0),
        STRIDE_SLOT=cache.stride(1), H=num_heads, RANK=rank, ROTATED=q_THl.shape[2] - rank, BLOCK_SIZE=cache.shape[1],
        ROWS=config.rows, KEYS=config.keys, SPLIT_KEYS=config.split, COLUMN_SPLITS=config.column_splits,
        TOP_K=0 if chosen is None else chosen.shape[1],
        num_warps=config.num_warps, num_stages=config.num_stages, **launch_options(device.arch),
    )  # fmt: skip
