"""What a decoding step does in a layer besides its experts, in two calls: attention with the norm behind it, and routing.

At a few rows a step, calling an op costs as much as its work. So this puts the ops of `gemm`, `attention` and `elementwise`
behind one another, and a row's bits are those of the ops called one by one.

T tokens, one of each sequence, D model width, H query heads, G key/value heads, d head size, E experts, K chosen, b blocks, s
block size.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from expertwire.kernels.attention import PagedSequences
from expertwire.kernels.cpu.attention import attend_single, covers, rotate_and_store_rows
from expertwire.kernels.cpu.elementwise import add_rms_norm_rows, route_rows
from expertwire.kernels.cpu.gemm import few, linear_rows
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
def _route(x_TD: np.ndarray, w_ED: np.ndarray, renormalize: bool, ids_TK: np.ndarray, weights_TK: np.ndarray) -> None:
    logits_TE = np.empty((x_TD.shape[0], w_ED.shape[0]), x_TD.dtype)
    linear_rows(x_TD, w_ED, logits_TE)
    route_rows(logits_TE, renormalize, ids_TK, weights_TK)


def prepare_router(w_ED: Tensor, top_k: int, renormalize: bool) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """`kernels.routing.prepare` for few rows."""
    weight = as_array(w_ED)

    def apply(x_TD: Tensor) -> tuple[Tensor, Tensor]:
        num_tokens = x_TD.shape[0]
        ids_TK = torch.empty(num_tokens, top_k, dtype=torch.int64)
        weights_TK = torch.empty(num_tokens, top_k)
        _route(as_array(x_TD), weight, renormalize, ids_TK.numpy(), weights_TK.numpy())
        return ids_TK, weights_TK

    return apply
