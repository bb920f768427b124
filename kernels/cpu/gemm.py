"""Linear layers and experts on a CPU. They use one thread.

Weights are packed once, after loading (`panel`). There is one path for any number of rows, and a row's bits do not depend on the
others.

M rows, N outputs, K inputs, R routed rows, e experts, D model width, F expert width, P panels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numba import types
from numba.extending import overload
from torch import Tensor

from expertwire.kernels.cpu import amx
from expertwire.kernels.cpu.multiply import HEAD, begin, finish, multiply, operand, products, put_row, rows_at_once
from expertwire.kernels.cpu.numbers import as_array, jit, round_like
from expertwire.kernels.cpu.panel import LINE, PANEL, pack_rows, put_gated_rows, put_rows
from expertwire.kernels.cpu.vectors import LANES
from expertwire.kernels.permute import TileMap

_CHUNK = (
    288  # rows of x that stay in the cache while all weights meet them; a multiple of how many are multiplied at once
)


def supports(weight: Tensor) -> bool:
    """Whether panels hold a weight [..., N, K]."""
    return weight.shape[-1] % LINE == 0 and weight.dtype in (torch.float32, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class PackedLinear:
    """`kernels.linear.reference` of contiguous rows of the weight's dtype."""

    panels: np.ndarray  # [P, K', 32]
    bias: np.ndarray  # fp32 [P * 32]
    num_outputs: int

    def __call__(self, x_MK: Tensor) -> Tensor:
        y_MN = x_MK.new_empty(x_MK.shape[0], self.num_outputs)
        _linear(as_array(x_MK), self.panels, self.bias, as_array(y_MN))
        return y_MN


@dataclass(frozen=True, eq=False)
class PackedExperts:
    """`kernels.experts.reference`."""

    w13: np.ndarray  # [e, F / 16, K', 32]: sixteen of w1, then as many of w3
    w2: np.ndarray  # [e, P, K', 32]

    def __call__(
        self,
        x_UD: Tensor,
        row_index_R: Tensor,
        offsets: np.ndarray | Tensor,
        home_R: Tensor | None = None,
        tile_map: TileMap | None = None,
    ) -> Tensor:
        assert isinstance(offsets, np.ndarray), "here the host counts rows"
        assert home_R is tile_map is None, "and they stay in order"
        y_RD = x_UD.new_empty(len(row_index_R), x_UD.shape[1])
        _experts(as_array(x_UD), row_index_R.numpy(), offsets, self.w13, self.w2, as_array(y_RD))
        return y_RD


def pack_linear(w_NK: Tensor, bias_N: Tensor | None = None) -> PackedLinear:
    """From a weight that `supports`."""
    num_outputs = w_NK.shape[0]
    starts = np.arange(0, -(-num_outputs // PANEL) * PANEL, LANES)
    bias = np.zeros(len(starts) * LANES, np.float32)
    if bias_N is not None:
        bias[:num_outputs] = bias_N.float().numpy()
    return PackedLinear(_pack(w_NK[None], starts)[0], bias, num_outputs)


def pack_experts(w13_eFD: Tensor, w2_eDF: Tensor) -> PackedExperts:
    """From weights [e, 2F, D] and [e, D, F] that `supports`."""
    width, inner = w2_eDF.shape[1:]
    gates = np.arange(0, inner, LANES)
    w13 = _pack(w13_eFD, np.stack((gates, gates + inner), 1).flatten())
    return PackedExperts(w13, _pack(w2_eDF, np.arange(0, width, LANES)))


def _pack(w_eNK: Tensor, starts: np.ndarray) -> np.ndarray:
    """[e, P, K', 32], half a panel from each row of `starts`."""
    array = as_array(w_eNK.contiguous())
    array = array.view(np.uint32) if array.dtype == np.uint16 else array
    panels = np.empty((len(array), len(starts) // 2, array.shape[2], PANEL), array.dtype)
    for w, packed in zip(array, panels, strict=True):
        pack_rows(w, starts, packed)
    return panels


@jit
def _copied(x, start, count, buffer):
    for i in range(count):
        put_row(x[start + i], buffer[i])
    return buffer


def _rows(x, start, count, buffer):
    """Rows of x for `multiply`: in place, if they can be, or else in `buffer`."""


@overload(_rows)
def _rows_overload(x, start, count, buffer):
    if x.dtype != buffer.dtype:
        return lambda x, start, count, buffer: _copied(x, start, count, buffer)
    least = amx.TILE if x.dtype == types.uint16 else 0

    def either(x, start, count, buffer):
        return x[start : start + count] if count >= least else _copied(x, start, count, buffer)

    return either


@jit
def _product(x, num_m, w, bias, found, y):
    num_n, num_k, step = y.shape[1], x.shape[1], rows_at_once(w)
    for i in range(len(w)):
        n = i * PANEL
        for m in range(0, num_m, step):
            multiply(x, m, num_m, num_k, w, i, found)
            count = min(step, num_m - m)
            if n + PANEL <= num_n:
                put_rows(found, HEAD, count, bias, n, y, m * num_n + n, num_n)
            else:
                for j in range(count):
                    for k in range(n, num_n):
                        y[m + j, k] = round_like(found[HEAD + j, k - n] + bias[k], y[m + j, k])


@jit
def _hidden(x, num_m, w13, found, like, hidden):
    """What lies between an expert's products, rounded as `like`."""
    width, num_k, step = hidden.shape[1], x.shape[1], rows_at_once(w13)
    for i in range(len(w13)):
        for m in range(0, num_m, step):
            multiply(x, m, num_m, num_k, w13, i, found)
            put_gated_rows(found, HEAD, min(step, num_m - m), like, hidden, m * width + i * LANES, width)


@jit
def linear_rows(x, w, bias, y):
    """`kernels.linear.reference` of contiguous rows, with weights and a bias as in `PackedLinear`."""
    num_m, num_k = x.shape
    buffer, found = operand(min(num_m, _CHUNK), num_k, w), products()
    begin(w)
    for start in range(0, num_m, _CHUNK):
        count = min(_CHUNK, num_m - start)
        _product(_rows(x, start, count, buffer), count, w, bias, found, y[start : start + count])
    finish(w)


@jit
def experts_rows(x, index, offsets, w13, w2, y):
    """`kernels.experts.reference`, with weights as in `PackedExperts`, of at least one row."""
    most, width, inner = min(_CHUNK, np.diff(offsets).max()), x.shape[1], w13.shape[1] * LANES
    rows, hidden, found = operand(most, width, w13), operand(most, inner, w2), products()
    bias = np.zeros(width, np.float32)
    begin(w13)
    for e in range(len(w13)):
        for start in range(offsets[e], offsets[e + 1], _CHUNK):
            count = min(_CHUNK, offsets[e + 1] - start)
            for m in range(count):
                put_row(x[index[start + m]], rows[m])
            _hidden(rows, count, w13[e], found, x[0, 0], hidden)
            _product(hidden, count, w2[e], bias, found, y[start : start + count])
    finish(w13)


@jit
def _linear(x, w, bias, y):
    linear_rows(x, w, bias, y)


@jit
def _experts(x, index, offsets, w13, w2, y):
    if len(index) > 0:
        experts_rows(x, index, offsets, w13, w2, y)
