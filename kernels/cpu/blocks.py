"""The two blocks of a layer on a CPU, each in one call: `kernels.ops.attention_block` and `kernels.ops.moe_block`.

With a few rows a step, calling an op costs as much as its work. These functions call the compiled ops of `gemm`,
`attention` and `elementwise` one after another, so that a row has the bits of the separate ops. They take `CHUNK` rows
at a time: results of one op are still in the cache for the next.

T tokens, D model width, H query heads, G key/value heads, d head size, E logical experts, e physical experts, K
experts a token, R routed rows, F expert width, S sequences, B blocks, s block size, W entries of a block table, Y
positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from expertwire.kernels.cpu._llvm import add_row, allocating_jit, as_array, empty
from expertwire.kernels.cpu.attention import attend_rows, scales, variant
from expertwire.kernels.cpu.elementwise import (
    add_rms_norm_rows,
    combine_rows,
    relu2_rows,
    sigmoid_mul_rows,
    silu_mul_rows,
)
from expertwire.kernels.cpu.gemm import (
    CHUNK,
    Operands,
    PackedExperts,
    PackedLinear,
    experts_rows,
    linear_rows,
)
from expertwire.kernels.cpu.rotary import rope_and_cache_rows
from expertwire.kernels.cpu.routing import Rule, route_rows, rule
from expertwire.kernels.ops.attention_block import AttentionBlock, AttentionInputs, AttentionWeights
from expertwire.kernels.ops.moe_block import MoeBlock, MoeWeights

Weights = tuple[np.ndarray, np.ndarray]  # panels and bias of a `PackedLinear`
# A shared expert's first and second product and gate, or None, outputs of the first, and whether half of them are gates.
Shared = tuple[Weights, Weights, Weights | None, int, bool]


@allocating_jit
def _attention(
    x_TD: np.ndarray,
    normed_TD: np.ndarray,
    qkv: Weights,
    all_heads: int,
    qk_norm_hd: np.ndarray,
    eps: float,
    scale: float,
    window: int,
    chunk: int,
    sinks_H: np.ndarray,
    interleaved: bool,
    cos_Yr: np.ndarray,
    sin_Yr: np.ndarray,
    positions_T: np.ndarray,
    slots_T: np.ndarray,
    tables_SW: np.ndarray,
    cu_seqlens_q: np.ndarray,
    seq_lens_S: np.ndarray,
    k_BsGd: np.ndarray,
    v_BsGd: np.ndarray,
    kv_scales_2G: np.ndarray,
    output: Weights,
    norm_D: np.ndarray,
    sum_TD: np.ndarray,
    y_TD: np.ndarray,
) -> None:
    num_tokens, num_kv, dim = x_TD.shape[0], k_BsGd.shape[2], k_BsGd.shape[3]
    num_heads = all_heads - 2 * num_kv
    q_THd = empty((num_tokens, num_heads, dim), x_TD.dtype)
    qkv_Thd = empty((min(num_tokens, CHUNK), all_heads, dim), x_TD.dtype)
    for start in range(0, num_tokens, CHUNK):
        end = min(start + CHUNK, num_tokens)
        part_Thd = qkv_Thd[: end - start]
        linear_rows(normed_TD[start:end], qkv[0], qkv[1], part_Thd.reshape((end - start, -1)))
        rope_and_cache_rows(
            part_Thd,
            qk_norm_hd,
            eps,
            cos_Yr,
            sin_Yr,
            positions_T[start:end],
            slots_T[start:end],
            k_BsGd.reshape((-1, num_kv, dim)),
            v_BsGd.reshape((-1, num_kv, dim)),
            kv_scales_2G,
            interleaved,
            q_THd[start:end],
        )
    attended_THd = empty((num_tokens, num_heads, dim), x_TD.dtype)
    options = scale, window, chunk, sinks_H
    attend_rows(q_THd, k_BsGd, v_BsGd, kv_scales_2G, tables_SW, cu_seqlens_q, seq_lens_S, *options, attended_THd)
    attended_TK = attended_THd.reshape((num_tokens, -1))
    delta_TD = empty((min(num_tokens, CHUNK), x_TD.shape[1]), x_TD.dtype)
    for start in range(0, num_tokens, CHUNK):
        end = min(start + CHUNK, num_tokens)
        part_TD = delta_TD[: end - start]
        linear_rows(attended_TK[start:end], output[0], output[1], part_TD)
        add_rms_norm_rows(x_TD[start:end], part_TD, norm_D, eps, sum_TD[start:end], y_TD[start:end])


def fuse_attention(weights: AttentionWeights, *, scales_queries: bool) -> AttentionBlock | None:
    """As `kernels.ops.attention_block.FuseAttention`: of packed projections, with no more than norms of heads."""
    w, qkv, output = weights, weights.qkv, weights.output
    if not (isinstance(qkv, PackedLinear) and isinstance(output, PackedLinear)):
        return None
    if w.row_norms is not None or w.gated or scales_queries:
        return None
    qk_norm_hd = w.norm_D.new_empty(0, w.head_dim) if w.head_norms_hd is None else w.head_norms_hd
    options = variant(w.options, w.head_dim)
    first = (qkv.panels, qkv.bias), qkv.num_outputs // w.head_dim, as_array(qk_norm_hd), w.eps, *options
    return _AttentionBlock(first, scales(w.options.kv_scales_2G), ((output.panels, output.bias), as_array(w.norm_D)))


@dataclass(frozen=True, eq=False)
class _AttentionBlock:
    """Arguments of `_attention` before those of a step, the KV scales, and arguments after the caches."""

    first: tuple[Any, ...]
    kv_scales: np.ndarray
    last: tuple[Any, ...]

    def __call__(
        self, x_TD: Tensor, normed_TD: Tensor, k_cache: Tensor, v_cache: Tensor, inputs: AttentionInputs
    ) -> tuple[Tensor, Tensor]:
        sum_TD, y_TD = torch.empty_like(x_TD), torch.empty_like(x_TD)
        if len(x_TD) > 0:
            x, normed, k, v, total, y = (as_array(t) for t in (x_TD, normed_TD, k_cache, v_cache, sum_TD, y_TD))
            step = inputs.rope.interleaved, *inputs.arrays
            _attention(x, normed, *self.first, *step, k, v, self.kv_scales, *self.last, total, y)
        return sum_TD, y_TD


@allocating_jit
def _sort(physical_TK: np.ndarray, offsets: np.ndarray, row_index_R: np.ndarray, place_TK: np.ndarray) -> None:
    """Sort rows by expert as `comm.all_to_all.base.Dispatched` has them; `place_TK` is the row of each (token, k)."""
    num_tokens, top_k = physical_TK.shape
    offsets[:] = 0
    for t in range(num_tokens):
        for k in range(top_k):
            offsets[physical_TK[t, k] + 1] += 1
    next_e = np.empty(len(offsets) - 1, np.int64)
    for e in range(len(next_e)):
        next_e[e] = offsets[e]
        offsets[e + 1] += offsets[e]
    for t in range(num_tokens):
        for k in range(top_k):
            row = next_e[physical_TK[t, k]]
            place_TK[t, k], row_index_R[row] = row, t
            next_e[physical_TK[t, k]] += 1


@allocating_jit
def _add_shared(
    x_TD: np.ndarray, up: Weights, down: Weights, gate: Weights | None, num_up: int, is_gated: bool, sum_TD: np.ndarray
) -> None:
    """Add the shared expert's outputs; see `kernels.ops.moe_block.DenseMlp`."""
    num_tokens, width = sum_TD.shape
    up_TF = empty((num_tokens, num_up), x_TD.dtype)
    linear_rows(x_TD, up[0], up[1], up_TF)
    hidden_TF = up_TF
    if is_gated:
        hidden_TF = empty((num_tokens, num_up // 2), x_TD.dtype)
        silu_mul_rows(up_TF, hidden_TF)
    else:
        relu2_rows(up_TF)
    y_T1D = empty((num_tokens, 1, width), x_TD.dtype)
    y_TD = y_T1D.reshape((num_tokens, width))
    linear_rows(hidden_TF, down[0], down[1], y_TD)
    if gate is not None:
        gate_T1 = empty((num_tokens, 1), x_TD.dtype)
        linear_rows(x_TD, gate[0], gate[1], gate_T1)
        sigmoid_mul_rows(y_T1D, gate_T1.reshape((num_tokens, 1, 1)), y_T1D)
    for t in range(num_tokens):
        add_row(sum_TD[t], y_TD[t], sum_TD[t])


@allocating_jit
def _moe(
    x_TD: np.ndarray,
    normed_TD: np.ndarray,
    router: Weights,
    like_router: np.ndarray,
    top_k: int,
    rule: Rule,
    log2phy_E: np.ndarray,
    experts: Operands,
    shared: Shared | None,  # what a model does not have is not compiled
    norm_D: np.ndarray,
    eps: float,
    load_E: np.ndarray,
    sum_TD: np.ndarray,
    y_TD: np.ndarray,
) -> None:
    num_tokens, width = x_TD.shape
    ids_TK, weights_TK = np.empty((num_tokens, top_k), np.int64), np.empty((num_tokens, top_k), np.float32)
    logits_TE = np.empty((num_tokens, len(load_E)), like_router.dtype)
    linear_rows(normed_TD, router[0], router[1], logits_TE)
    route_rows(logits_TE, rule, ids_TK, weights_TK)

    physical_TK, place_TK = np.empty((num_tokens, top_k), np.int64), np.empty((num_tokens, top_k), np.int64)
    for t in range(num_tokens):
        for k in range(top_k):
            load_E[ids_TK[t, k]] += 1
            physical_TK[t, k] = log2phy_E[ids_TK[t, k]]
    offsets, row_index_R = np.empty(len(experts[1]) + 1, np.int64), np.empty(num_tokens * top_k, np.int64)
    _sort(physical_TK, offsets, row_index_R, place_TK)
    rows_RD = empty((num_tokens * top_k, width), x_TD.dtype)
    experts_rows(normed_TD, row_index_R, offsets, experts, rows_RD)
    delta_TD = empty((min(num_tokens, CHUNK), width), x_TD.dtype)
    for start in range(0, num_tokens, CHUNK):
        end = min(start + CHUNK, num_tokens)
        part_TD = delta_TD[: end - start]
        combine_rows(rows_RD, place_TK[start:end], weights_TK[start:end], part_TD)
        if shared is not None:
            _add_shared(normed_TD[start:end], *shared, part_TD)
        add_rms_norm_rows(x_TD[start:end], part_TD, norm_D, eps, sum_TD[start:end], y_TD[start:end])


def fuse_moe(weights: MoeWeights) -> MoeBlock | None:
    """As `kernels.ops.moe_block.FuseMoe`: of packed weights."""
    w, router, experts, routing = weights, weights.router, weights.experts, weights.routing
    if not (isinstance(router, PackedLinear) and isinstance(experts, PackedExperts)) or routing.scales_input:
        return None
    dense: Shared | None = None
    if w.shared is not None:
        up, down, gate = w.shared.up, w.shared.down, w.shared.gate
        if not (isinstance(up, PackedLinear) and isinstance(down, PackedLinear)):
            return None
        if not (gate is None or isinstance(gate, PackedLinear)):
            return None
        of_gate = None if gate is None else _weights(gate)
        dense = _weights(up), _weights(down), of_gate, up.num_outputs, w.shared.silu_mul is not None
    like_router = np.empty(0, np.uint16 if router.panels.dtype == np.uint32 else np.float32)
    choice = routing.top_k, rule(len(w.log2phy_E), routing, w.choice_bias), w.log2phy_E.numpy()
    return _MoeBlock((_weights(router), like_router, *choice, experts.operands, dense, as_array(w.norm_D), w.eps))


def _weights(linear: PackedLinear) -> Weights:
    return linear.panels, linear.bias


@dataclass(frozen=True, eq=False)
class _MoeBlock:
    """Arguments of `_moe` between those of a step."""

    fixed: tuple[Any, ...]

    def __call__(self, x_TD: Tensor, normed_TD: Tensor, load_E: np.ndarray) -> tuple[Tensor, Tensor]:
        sum_TD, y_TD = torch.empty_like(x_TD), torch.empty_like(x_TD)
        if len(x_TD) > 0:
            x, normed, total, y = (as_array(tensor) for tensor in (x_TD, normed_TD, sum_TD, y_TD))
            _moe(x, normed, *self.fixed, load_E, total, y)
        return sum_TD, y_TD
