"""The small ops on a CPU, compiled by numba: each is one pass over memory, where torch takes several and a call for each.

Every function here has its specification in the op's own file; matrix products stay with oneDNN (`kernels.linear`). Arrays are
fp32, or bf16 seen as their upper sixteen bits (u16); arithmetic is fp32, rounded once, to nearest even, on the way out. Loops
over tokens are independent and their order within a token is fixed, so a token's bits do not depend on its neighbours.

T tokens, D model width, H query heads, G key/value heads, d head size, F expert width, E experts, K chosen, B sequences, s
block size.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, overload
from torch import Tensor

from expertwire.kernels import attention
from expertwire.kernels.attention import PagedSequences

_jit = njit(cache=True, fastmath={"contract", "reassoc", "nsz", "arcp"}, error_model="numpy")


# ---- numbers


@intrinsic
def _bits_to_f32(context: Any, bits: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), generate


@intrinsic
def _f32_to_bits(context: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), generate


def _load(stored):
    """fp32 value of an array's element."""


@overload(_load, inline="always")
def _load_overload(stored):
    if stored == types.uint16:
        return lambda stored: _bits_to_f32(np.uint32(stored) << np.uint32(16))
    return lambda stored: stored


def _round(value, like):
    """An element of `like`'s type from an fp32 value."""


@overload(_round, inline="always")
def _round_overload(value, like):
    if like == types.uint16:

        def to_bf16(value, like):
            bits = _f32_to_bits(np.float32(value))
            return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))

        return to_bf16
    return lambda value, like: np.float32(value)


@_jit
def _exp(x: float) -> float:
    """e^x in fp32 for x <= 88, by 2^n times a polynomial of the rest (Cephes' expf); loops over it vectorise."""
    x = max(x, np.float32(-87.0))
    n = np.floor(x * np.float32(1.44269504088896341) + np.float32(0.5))
    r = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1.0)
    return p * _bits_to_f32(np.uint32(np.int32(n) + np.int32(127)) << np.uint32(23))


def _array(x: Tensor) -> np.ndarray:
    return x.view(torch.uint16).numpy() if x.dtype == torch.bfloat16 else x.numpy()


# ---- norms


@_jit
def _rms_norm(x_TD: np.ndarray, weight_D: np.ndarray, eps: float, y_TD: np.ndarray) -> None:
    width = x_TD.shape[1]
    for t in range(x_TD.shape[0]):
        total = np.float32(0)
        for i in range(width):
            value = _load(x_TD[t, i])
            total += value * value
        scale = np.float32(1) / np.sqrt(total / np.float32(width) + np.float32(eps))
        for i in range(width):
            y_TD[t, i] = _round(_load(x_TD[t, i]) * scale * _load(weight_D[i]), y_TD[t, i])


@_jit
def _add(x_TD: np.ndarray, delta_TD: np.ndarray, sum_TD: np.ndarray) -> None:
    for t in range(x_TD.shape[0]):
        for i in range(x_TD.shape[1]):
            sum_TD[t, i] = _round(_load(x_TD[t, i]) + _load(delta_TD[t, i]), sum_TD[t, i])


@_jit
def _add_rms_norm(
    x_TD: np.ndarray, delta_TD: np.ndarray, weight_D: np.ndarray, eps: float, sum_TD: np.ndarray, y_TD: np.ndarray
) -> None:
    _add(x_TD, delta_TD, sum_TD)
    _rms_norm(sum_TD, weight_D, eps, y_TD)


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`kernels.rms_norm.reference`."""
    y_TD = torch.empty_like(x_TD)
    _rms_norm(_array(x_TD), _array(weight_D), eps, _array(y_TD))
    return y_TD


def add_rms_norm(x_TD: Tensor, delta_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`kernels.rms_norm.add_reference`."""
    sum_TD, y_TD = torch.empty_like(x_TD), torch.empty_like(x_TD)
    _add_rms_norm(_array(x_TD), _array(delta_TD), _array(weight_D), eps, _array(sum_TD), _array(y_TD))
    return sum_TD, y_TD


# ---- attention


@_jit
def _rotate_and_store(
    qkv_Thd: np.ndarray,
    norm_hd: np.ndarray,
    eps: float,
    cos_Pd: np.ndarray,
    sin_Pd: np.ndarray,
    positions_T: np.ndarray,
    slots_T: np.ndarray,
    k_NGd: np.ndarray,
    v_NGd: np.ndarray,
    q_THd: np.ndarray,
) -> None:
    num_heads, num_kv, dim = q_THd.shape[1], k_NGd.shape[1], q_THd.shape[2]
    half = dim // 2
    row = np.empty(dim, np.float32)
    for t in range(qkv_Thd.shape[0]):
        position, slot = positions_T[t], slots_T[t]
        for h in range(num_heads + num_kv):
            for i in range(dim):
                row[i] = _load(qkv_Thd[t, h, i])
            if norm_hd.shape[0] > 0:
                total = np.float32(0)
                for i in range(dim):
                    total += row[i] * row[i]
                scale = np.float32(1) / np.sqrt(total / np.float32(dim) + np.float32(eps))
                for i in range(dim):
                    row[i] = row[i] * scale * _load(norm_hd[h, i])
            target = q_THd[t, h] if h < num_heads else k_NGd[slot, h - num_heads]
            for i in range(half):
                first, second = row[i], row[i + half]
                cos, sin = cos_Pd[position, i + half], sin_Pd[position, i + half]
                target[i] = _round(first * cos - second * sin, target[i])
                target[i + half] = _round(second * cos + first * sin, target[i])
        for h in range(num_kv):
            for i in range(dim):
                v_NGd[slot, h, i] = qkv_Thd[t, num_heads + num_kv + h, i]


def rotate_and_store(
    qkv_Thd: Tensor,
    norm_hd: Tensor | None,
    eps: float,
    tables: tuple[Tensor, Tensor],
    positions_T: Tensor,
    slot_mapping_T: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
) -> Tensor:
    """`kernels.attention.rotate_and_store`."""
    num_kv, dim = k_cache.shape[2:]
    q_THd = qkv_Thd.new_empty(qkv_Thd.shape[0], qkv_Thd.shape[1] - 2 * num_kv, dim)
    norm = qkv_Thd.new_empty(0, dim) if norm_hd is None else norm_hd
    _rotate_and_store(
        _array(qkv_Thd),
        _array(norm),
        eps,
        tables[0].numpy(),
        tables[1].numpy(),
        positions_T.numpy(),
        slot_mapping_T.numpy(),
        _array(k_cache.flatten(0, 1)),
        _array(v_cache.flatten(0, 1)),
        _array(q_THd),
    )
    return q_THd


@_jit
def _attend_single(
    q_BHd: np.ndarray,
    k_NsGd: np.ndarray,
    v_NsGd: np.ndarray,
    tables_Bb: np.ndarray,
    lengths_B: np.ndarray,
    scale: float,
    out_BHd: np.ndarray,
) -> None:
    batch, num_heads, dim = q_BHd.shape
    block_size, num_kv = k_NsGd.shape[1], k_NsGd.shape[2]
    group = num_heads // num_kv
    scores = np.empty((group, tables_Bb.shape[1] * block_size), np.float32)
    query = np.empty((group, dim), np.float32)
    total = np.empty((group, dim), np.float32)
    row = np.empty(dim, np.float32)
    for b in range(batch):
        length = lengths_B[b]
        for g in range(num_kv):
            for j in range(group):
                for i in range(dim):
                    query[j, i] = _load(q_BHd[b, g * group + j, i]) * np.float32(scale)
            total[:] = np.float32(0)
            for position in range(length):
                key = k_NsGd[tables_Bb[b, position // block_size], position % block_size, g]
                for i in range(dim):
                    row[i] = _load(key[i])
                for j in range(group):
                    dot = np.float32(0)
                    for i in range(dim):
                        dot += row[i] * query[j, i]
                    scores[j, position] = dot
            for j in range(group):
                _softmax(scores[j, :length])
            for position in range(length):
                value = v_NsGd[tables_Bb[b, position // block_size], position % block_size, g]
                for i in range(dim):
                    row[i] = _load(value[i])
                for j in range(group):
                    weight = scores[j, position]
                    for i in range(dim):
                        total[j, i] += weight * row[i]
            for j in range(group):
                for i in range(dim):
                    out_BHd[b, g * group + j, i] = _round(total[j, i], out_BHd[b, g * group + j, i])


@_jit
def _softmax(x: np.ndarray) -> None:
    largest = x[0]
    for i in range(len(x)):
        largest = max(largest, x[i])
    total = np.float32(0)
    for i in range(len(x)):
        x[i] = _exp(x[i] - largest)
        total += x[i]
    inverse = np.float32(1) / total
    for i in range(len(x)):
        x[i] *= inverse


def attend(q_THd: Tensor, k_cache: Tensor, v_cache: Tensor, seqs: PagedSequences) -> Tensor:
    """`kernels.attention.reference`: single queries here, reading the blocks in place; longer ones by torch."""
    if seqs.num_single == 0:
        return attention.attend_several(q_THd, k_cache, v_cache, seqs)
    out_THd = torch.empty_like(q_THd)
    single = seqs.num_single
    _attend_single(
        _array(q_THd[:single]),
        _array(k_cache),
        _array(v_cache),
        seqs.single_block_table.numpy(),
        seqs.single_lengths.numpy(),
        q_THd.shape[-1] ** -0.5,
        _array(out_THd[:single]),
    )
    if seqs.num_sequences > single:
        out_THd[single:] = attention.attend_several(q_THd, k_cache, v_cache, seqs)
    return out_THd


# ---- experts


@_jit
def _route(logits_TE: np.ndarray, renormalize: bool, ids_TK: np.ndarray, weights_TK: np.ndarray) -> None:
    num_experts, top_k = logits_TE.shape[1], ids_TK.shape[1]
    probs = np.empty(num_experts, np.float32)
    for t in range(logits_TE.shape[0]):
        for e in range(num_experts):
            probs[e] = _load(logits_TE[t, e])
        _softmax(probs)
        chosen = np.float32(0)
        for k in range(top_k):
            best = 0
            for e in range(num_experts):
                if probs[e] > probs[best]:
                    best = e
            ids_TK[t, k] = best
            weights_TK[t, k] = probs[best]
            chosen += probs[best]
            probs[best] = np.float32(-1)
        if renormalize:
            for k in range(top_k):
                weights_TK[t, k] /= chosen


def route(logits_TE: Tensor, top_k: int, *, renormalize: bool) -> tuple[Tensor, Tensor]:
    """`kernels.routing.reference`; of equal weights the lower id comes first."""
    num_tokens = logits_TE.shape[0]
    ids_TK = torch.empty(num_tokens, top_k, dtype=torch.int64)
    weights_TK = torch.empty(num_tokens, top_k)
    _route(_array(logits_TE), renormalize, ids_TK.numpy(), weights_TK.numpy())
    return ids_TK, weights_TK


@_jit
def _silu_mul(gate_up_NF: np.ndarray, out_NF: np.ndarray) -> None:
    width = out_NF.shape[1]
    for n in range(out_NF.shape[0]):
        for i in range(width):
            gate = _load(gate_up_NF[n, i])
            # e^-x overflows the range of _exp only where silu is zero anyway.
            silu = gate / (np.float32(1) + _exp(min(-gate, np.float32(88.0))))
            out_NF[n, i] = _round(_load(_round(silu, out_NF[n, i])) * _load(gate_up_NF[n, i + width]), out_NF[n, i])


def silu_mul(gate_up_NF: Tensor) -> Tensor:
    """`kernels.experts.silu_mul_reference`."""
    out_NF = gate_up_NF.new_empty(gate_up_NF.shape[0], gate_up_NF.shape[1] // 2)
    _silu_mul(_array(gate_up_NF), _array(out_NF))
    return out_NF


@njit(cache=True, error_model="numpy")  # no fast math: product and sum must round separately
def _combine(rows_TKD: np.ndarray, weights_TK: np.ndarray, out_TD: np.ndarray) -> None:
    total = np.empty(out_TD.shape[1], np.float32)
    for t in range(out_TD.shape[0]):
        total[:] = np.float32(0)
        for k in range(weights_TK.shape[1]):
            weight = weights_TK[t, k]
            for i in range(len(total)):
                total[i] += _load(rows_TKD[t, k, i]) * weight
        for i in range(len(total)):
            out_TD[t, i] = _round(total[i], out_TD[t, i])


def combine(rows_TKD: Tensor, weights_TK: Tensor) -> Tensor:
    """`kernels.combine.reference`, bit for bit."""
    out_TD = torch.empty_like(rows_TKD[:, 0])
    _combine(_array(rows_TKD), weights_TK.numpy(), _array(out_TD))
    return out_TD
