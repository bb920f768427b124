"""What a decoding step does in a layer, in two calls: attention with the norm behind it, and a rank's experts with theirs.

At a few rows a step, calling an op costs as much as its work. So this puts the ops of `gemm`, `attention` and `elementwise`
behind one another, and a row's bits are those of the ops called one by one.

T tokens, one of each sequence, D model width, H query heads, G key/value heads, d head size, E logical experts, e those here, K
chosen, R routed rows, F expert width, b blocks, s block size.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from expertwire.kernels.attention import PagedSequences
from expertwire.kernels.cpu.attention import attend_single, covers, rotate_and_store_rows
from expertwire.kernels.cpu.elementwise import add_rms_norm_rows, combine_rows, route_rows
from expertwire.kernels.cpu.gemm import experts_rows, few, linear_rows
from expertwire.kernels.cpu.numbers import as_array, jit

# What all layers of a step share: cosines and sines, positions_T, slots_T, tables_Tb, lengths_T.
StepArrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]


@jit
def _attention(
    x_TD: np.ndarray,
    normed_TD: np.ndarray,
    w_qkv: np.ndarray,
    qk_norm_hd: np.ndarray,
    cos_Pd: np.ndarray,
    sin_Pd: np.ndarray,
    positions_T: np.ndarray,
    slots_T: np.ndarray,
    tables_Tb: np.ndarray,
    lengths_T: np.ndarray,
    k_NsGd: np.ndarray,
    v_NsGd: np.ndarray,
    w_o: np.ndarray,
    norm_D: np.ndarray,
    eps: float,
    sum_TD: np.ndarray,
    y_TD: np.ndarray,
) -> None:
    num_tokens, num_kv, dim = x_TD.shape[0], k_NsGd.shape[2], k_NsGd.shape[3]
    num_heads = w_o.shape[1] // dim
    qkv = np.empty((num_tokens, w_qkv.shape[0]), x_TD.dtype)
    linear_rows(normed_TD, w_qkv, qkv)
    q_THd = np.empty((num_tokens, num_heads, dim), x_TD.dtype)
    rotate_and_store_rows(
        qkv.reshape((num_tokens, num_heads + 2 * num_kv, dim)),
        qk_norm_hd,
        eps,
        cos_Pd,
        sin_Pd,
        positions_T,
        slots_T,
        k_NsGd.reshape((-1, num_kv, dim)),
        v_NsGd.reshape((-1, num_kv, dim)),
        q_THd,
    )
    attended_THd = np.empty((num_tokens, num_heads, dim), x_TD.dtype)
    attend_single(q_THd, k_NsGd, v_NsGd, tables_Tb, lengths_T, dim**-0.5, attended_THd)
    delta_TD = np.empty_like(x_TD)
    linear_rows(attended_THd.reshape((num_tokens, num_heads * dim)), w_o, delta_TD)
    add_rms_norm_rows(x_TD, delta_TD, norm_D, eps, sum_TD, y_TD)


class AttentionAndNorm:
    """`kernels.attention.FewRows` on a CPU."""

    def __init__(
        self, w_qkv: Tensor, w_o: Tensor, qk_norm_hd: Tensor | None, norm_D: Tensor, eps: float, dim: int
    ) -> None:
        self._qkv, self._o, self._norm, self._eps = as_array(w_qkv), as_array(w_o), as_array(norm_D), eps
        self._qk_norm = as_array(w_qkv.new_empty(0, dim) if qk_norm_hd is None else qk_norm_hd)

    def step(
        self, tables: tuple[Tensor, Tensor], positions_T: Tensor, slots_T: Tensor, seqs: PagedSequences, k_cache: Tensor
    ) -> StepArrays | None:
        num_tokens, single = len(positions_T), seqs.num_single
        if not covers(k_cache.shape[3], k_cache.shape[1]) or not 0 < num_tokens == single <= few(k_cache.dtype):
            return None
        (cos_Pd, sin_Pd), table_Tb, lengths_T = tables, seqs.single_block_table, seqs.single_lengths
        host = (tensor.numpy() for tensor in (positions_T, slots_T, table_Tb, lengths_T))
        return cos_Pd.numpy(), sin_Pd.numpy(), *host

    def __call__(
        self, x_TD: Tensor, normed_TD: Tensor, k_cache: Tensor, v_cache: Tensor, step: StepArrays
    ) -> tuple[Tensor, Tensor]:
        sum_TD, y_TD = torch.empty_like(x_TD), torch.empty_like(x_TD)
        _attention(
            as_array(x_TD),
            as_array(normed_TD),
            self._qkv,
            self._qk_norm,
            *step,
            as_array(k_cache),
            as_array(v_cache),
            self._o,
            self._norm,
            self._eps,
            as_array(sum_TD),
            as_array(y_TD),
        )
        return sum_TD, y_TD


@jit
def _sort(physical_TK: np.ndarray, offsets: np.ndarray, row_index_R: np.ndarray, place_TK: np.ndarray) -> int:
    """`comm.all_to_all.Dispatched` of one rank, where each (token, k) stands in it, and how many rows an expert has at most."""
    num_tokens, top_k = physical_TK.shape
    offsets[:] = 0
    for t in range(num_tokens):
        for k in range(top_k):
            offsets[physical_TK[t, k] + 1] += 1
    most = offsets.max()
    next_e = np.empty(len(offsets) - 1, np.int64)
    for e in range(len(next_e)):
        next_e[e] = offsets[e]
        offsets[e + 1] += offsets[e]
    for t in range(num_tokens):
        for k in range(top_k):
            row = next_e[physical_TK[t, k]]
            place_TK[t, k], row_index_R[row] = row, t
            next_e[physical_TK[t, k]] += 1
    return most


@jit
def _moe(
    x_TD: np.ndarray,
    normed_TD: np.ndarray,
    ids_TK: np.ndarray,
    weights_TK: np.ndarray,
    w_router: np.ndarray,
    renormalize: bool,
    max_rows: int,
    physical_of_E: np.ndarray,
    w13: np.ndarray,
    w2: np.ndarray,
    norm_D: np.ndarray,
    eps: float,
    load_E: np.ndarray,
    sum_TD: np.ndarray,
    y_TD: np.ndarray,
) -> bool:
    """Chooses the experts if `ids_TK` is empty. False, with nothing done, if an expert would have more than `max_rows`."""
    num_tokens, width, top_k = x_TD.shape[0], x_TD.shape[1], ids_TK.shape[1]
    if len(ids_TK) < num_tokens:
        ids_TK, weights_TK = np.empty((num_tokens, top_k), np.int64), np.empty((num_tokens, top_k), np.float32)
        logits_TE = np.empty((num_tokens, w_router.shape[0]), x_TD.dtype)
        linear_rows(normed_TD, w_router, logits_TE)
        route_rows(logits_TE, renormalize, ids_TK, weights_TK)

    physical_TK, place_TK = np.empty((num_tokens, top_k), np.int64), np.empty((num_tokens, top_k), np.int64)
    for t in range(num_tokens):
        for k in range(top_k):
            physical_TK[t, k] = physical_of_E[ids_TK[t, k]]
    offsets, row_index_R = np.empty(len(w13) + 1, np.int64), np.empty(num_tokens * top_k, np.int64)
    if _sort(physical_TK, offsets, row_index_R, place_TK) > max_rows:
        return False
    rows_RD = np.empty((num_tokens * top_k, width), x_TD.dtype)
    experts_rows(normed_TD, row_index_R, offsets, w13, w2, max_rows, rows_RD)
    rows_TKD = np.empty((num_tokens, top_k, width), x_TD.dtype)
    for t in range(num_tokens):
        for k in range(top_k):
            load_E[ids_TK[t, k]] += 1
            for i in range(width):
                rows_TKD[t, k, i] = rows_RD[place_TK[t, k], i]
    delta_TD = np.empty_like(x_TD)
    combine_rows(rows_TKD, weights_TK, delta_TD)
    add_rms_norm_rows(x_TD, delta_TD, norm_D, eps, sum_TD, y_TD)
    return True


class MoeAndNorm:
    """`kernels.experts.FewRows` on a CPU."""

    def __init__(
        self,
        w_router: Tensor,
        w13_eFD: Tensor,
        w2_eDF: Tensor,
        norm_D: Tensor,
        physical_of_E: Tensor,
        *,
        top_k: int,
        renormalize: bool,
        eps: float,
    ) -> None:
        weights = (as_array(tensor) for tensor in (w13_eFD, w2_eDF, norm_D))
        self.max_unrouted = few(w_router.dtype)
        self._fixed = (as_array(w_router), renormalize, self.max_unrouted, physical_of_E.numpy(), *weights, eps)
        self._unrouted = np.empty((0, top_k), np.int64), np.empty((0, top_k), np.float32)

    def __call__(
        self, x_TD: Tensor, normed_TD: Tensor, routed: tuple[Tensor, Tensor] | None, load_E: np.ndarray
    ) -> tuple[Tensor, Tensor] | None:
        ids_TK, weights_TK = self._unrouted if routed is None else (tensor.numpy() for tensor in routed)
        sum_TD, y_TD = torch.empty_like(x_TD), torch.empty_like(x_TD)
        x, normed, total, y = (as_array(tensor) for tensor in (x_TD, normed_TD, sum_TD, y_TD))
        done = _moe(x, normed, ids_TK, weights_TK, *self._fixed, load_E, total, y)
        return (sum_TD, y_TD) if done else None
