"""Top-k positions of rows of scores in Triton, without a sort: the second half of `index`, one program a row.

Keys are the scores' bits, as integers of the same order. The row is read once, tile by tile.
Entries above the threshold, which is the k-th largest key read so far, are appended to a buffer.
When the buffer is full, its k largest entries are kept, and the threshold rises to the smallest of
them, which is found bit by bit in registers. Entries are appended and kept in the order of
positions, so a later position that only equals the threshold is dropped, and of equal scores the
first are kept: the reference's rule and its order. Scores in random order fill the buffer
O(log(length / k)) times; ascending ones, the worst case, with every tile.

T tokens, k positions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertwire.kernels.gpu.dependent_launch import PDL, wait_for_previous_kernel
from expertwire.kernels.ops.attention import AttentionMetadata

# As in `linear`: ptxas for Blackwell otherwise spills a few registers.
OPTIONS = {"maxnreg": 255, **PDL}
_LEAST = tl.constexpr(-0x80000000)  # below the key of any score


@triton.jit
def sequence_of(cu_seqlens_q, token, num_sequences):
    """Return the sequence that a token belongs to; `num_sequences` if it belongs to none."""
    low = 0
    high = num_sequences
    while low < high:
        middle = (low + high) // 2
        behind = tl.load(cu_seqlens_q + middle + 1) <= token
        low = tl.where(behind, middle + 1, low)
        high = tl.where(behind, high, middle)
    return low


@triton.jit
def position_of(cu_seqlens_q, seq_lens, token, num_sequences):
    """Return the sequence and the position of a token; position -1 if it belongs to none."""
    sequence = sequence_of(cu_seqlens_q, token, num_sequences)
    owned = sequence < num_sequences
    end_query = tl.load(cu_seqlens_q + sequence + 1, mask=owned, other=0)
    length = tl.load(seq_lens + sequence, mask=owned, other=0)
    return sequence, tl.where(owned, length - end_query + token, -1)


@triton.jit
def _key_of(score):
    """Return the bits of a score as an i32 of the same order; both zeros are equal."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _threshold(keys, k):
    """Return the k-th largest of a vector of keys: the largest number that at least k of them are not below."""
    found = tl.where(tl.sum((keys >= 0).to(tl.int32), 0) >= k, 0, _LEAST)
    for i in range(31):
        trial = found | (1 << (30 - i))
        found = tl.where(tl.sum((keys >= trial).to(tl.int32), 0) >= k, trial, found)
    return found


@triton.jit
def _keep_best(keys_ptr, positions_ptr, count, k, BUFFER: tl.constexpr):
    """Keep the k largest of the buffer's first `count` entries, in their order, of equals the first;
    return the k-th's key.
    """
    tl.debug_barrier()  # wait for what other threads have appended
    # Not masked by `count`: its alignment is unknown, which would make accesses narrow.
    i = tl.arange(0, BUFFER)
    keys = tl.where(i < count, tl.load(keys_ptr + i), _LEAST)
    threshold = _threshold(keys, k)
    room = k - tl.sum((keys > threshold).to(tl.int32), 0)
    ties = (keys == threshold).to(tl.int32)
    kept = (keys > threshold) | ((ties > 0) & (tl.cumsum(ties, 0) <= room))
    place = tl.cumsum(kept.to(tl.int32), 0) - 1
    positions = tl.load(positions_ptr + i)
    tl.debug_barrier()  # everything has been read
    tl.store(keys_ptr + place, keys, mask=kept)
    tl.store(positions_ptr + place, positions, mask=kept)
    return threshold


@triton.jit(do_not_specialize=["num_sequences", "first_token"])
def top_k_kernel(
    scores,
    cu_seqlens_q,
    seq_lens,
    keys_buffer,
    positions_buffer,
    chosen,
    num_sequences,
    first_token,
    width,
    K: tl.constexpr,
    PADDED: tl.constexpr,
    BUFFER: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid (T,): the positions [T, K] that the tokens from `first_token` on choose; scores [T, width],
    buffers [T, BUFFER].

    BUFFER is at least TILE + K. A token that sees no more than K positions gets them all, and its
    scores may be anything.
    """
    wait_for_previous_kernel()
    row = tl.program_id(0).to(tl.int64)
    token = first_token + tl.program_id(0)
    _, position = position_of(cu_seqlens_q, seq_lens, token, num_sequences)
    out = chosen + row * K
    i = tl.arange(0, PADDED)
    if position < K:
        tl.store(out + i, tl.where(i <= position, i, -1).to(tl.int64), mask=i < K)
        return
    keys_ptr, positions_ptr = keys_buffer + row * BUFFER, positions_buffer + row * BUFFER
    threshold = tl.full([], _LEAST, tl.int32)
    count = tl.full([], 0, tl.int32)
    for start in range(0, position + 1, TILE):
        at = start + tl.arange(0, TILE)
        key = _key_of(tl.load(scores + row * width + at, mask=at < width, other=0.0))
        better = (at <= position) & (key > threshold)
        place = tl.cumsum(better.to(tl.int32), 0)
        tl.store(keys_ptr + count + place - 1, key, mask=better)
        tl.store(positions_ptr + count + place - 1, at, mask=better)
        count += tl.max(place, 0)
        if (count + TILE > BUFFER) | ((start + TILE > position) & (count > K)):
            threshold = _keep_best(keys_ptr, positions_ptr, count, K, BUFFER)
            count = tl.full([], K, tl.int32)
        tl.debug_barrier()
    tl.store(out + i, tl.load(positions_ptr + i).to(tl.int64), mask=i < K)


def select_top_k(scores: Tensor, seqs: AttentionMetadata, first_token: int, chosen_Tk: Tensor) -> None:
    """Write the top-k positions of the T tokens from `first_token` on into `chosen_Tk` (i64).

    They are in ascending order and followed by -1, up to the token's own position, all of them
    where there are no more than k; of equal scores the first. The width of `scores` is a multiple
    of 16, or 0 if no token sees more than k positions.
    """
    num, width = scores.shape
    top_k = chosen_Tk.shape[1]
    assert width % 16 == 0, f"rows of {width} scores"
    for rows in (scores, chosen_Tk):
        assert rows.is_contiguous(), f"strides {rows.stride()} of shape {tuple(rows.shape)}"
    sizes = buffer_sizes(top_k)
    buffers = scores.new_empty(2, num, sizes["BUFFER"] if width else 0, dtype=torch.int32)
    if num:
        top_k_kernel[(num,)](
            scores, seqs.cu_seqlens_q, seqs.seq_lens, *buffers, chosen_Tk, seqs.num_sequences, first_token, width,
            **sizes, num_warps=num_warps_for(top_k), **OPTIONS,
        )  # fmt: skip


def buffer_sizes(top_k: int) -> dict[str, int]:
    padded = triton.next_power_of_2(max(16, top_k))
    return {"K": top_k, "PADDED": padded, "BUFFER": 2 * padded, "TILE": padded // 2}


def num_warps_for(top_k: int) -> int:
    return max(1, min(8, triton.next_power_of_2(top_k) // 256))
