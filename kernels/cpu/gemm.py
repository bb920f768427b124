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

from expertwire.kernels.cpu import unpack
from expertwire.kernels.cpu.elementwise import silu_mul
from expertwire.kernels.cpu.multiply import (
    HEAD,
    LEAST_ROWS,
    begin,
    finish,
    multiply,
    multiply_gating,
    operand,
    products,
    rows_at_once,
)
from expertwire.kernels.cpu.numbers import allocating_jit, as_array, empty, jit, round_like
from expertwire.kernels.cpu.panel import LINE, PANEL, pack_rows, put_gated_rows, put_rows
from expertwire.kernels.cpu.rows import put_row
from expertwire.kernels.cpu.unpack import Codes, expert, num_panels, room, unpacked
from expertwire.kernels.cpu.vectors import LANES
from expertwire.kernels.formats import QuantizedWeight, Weight
from expertwire.kernels.ops import experts as experts_op
from expertwire.kernels.ops import heads, linear
from expertwire.kernels.ops.experts import GroupedMlp
from expertwire.kernels.ops.heads import PerHead
from expertwire.kernels.ops.linear import Linear
from expertwire.kernels.ops.permute import TileMap
from expertwire.kernels.ops.variants import Activation

# Rows of x that stay in the cache while all weights meet them; a multiple of how many are multiplied at once.
CHUNK = 288

Gating = tuple[np.float32, np.float32, np.float32]  # alpha, limit and offset of `experts.gate_reference`
Operands = tuple[np.ndarray | Codes, np.ndarray, np.ndarray | Codes, np.ndarray, Gating]


def is_packed(weight: Weight) -> bool:
    """Return whether a weight [..., N, K] is packed: if its widths allow it and torch has one or two threads.

    Products of packed weights run on one thread, which takes most of the memory bandwidth that two could; more threads
    together read faster.
    """
    return weight.device.type == "cpu" and torch.get_num_threads() <= 2 and supports(weight)


def supports(weight: Weight) -> bool:
    """Return whether panels can hold a weight [..., N, K]."""
    if isinstance(weight, QuantizedWeight):
        return weight.shape[-1] % LINE == 0 and all(rows % LANES == 0 for rows in weight.parts)
    return weight.shape[-1] % LINE == 0 and weight.dtype in (torch.float32, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class PackedLinear:
    """`kernels.ops.linear.reference` of contiguous rows, in the weight's dtype."""

    panels: np.ndarray  # [P, K', 32]
    bias: np.ndarray  # fp32 [P * 32]
    num_outputs: int

    def __call__(self, x_MK: Tensor) -> Tensor:
        x_MK = x_MK.to(torch.bfloat16 if self.panels.dtype == np.uint32 else torch.float32)
        y_MN = x_MK.new_empty(x_MK.shape[0], self.num_outputs)
        _linear(as_array(x_MK), self.panels, self.bias, as_array(y_MN))
        return y_MN


@dataclass(frozen=True, eq=False)
class PackedExperts:
    """`kernels.ops.experts.reference`, with biases and other activations; weights are panels, or `unpack.Codes` of them."""

    w13: np.ndarray | Codes  # [e, F / 16, K', 32]: sixteen of w1, then as many of w3
    w2: np.ndarray | Codes  # [e, P, K', 32]
    bias13: np.ndarray  # fp32 [e, F / 16, 32]
    bias2: np.ndarray  # fp32 [e, D]
    gating: Gating

    @property
    def weights(self) -> tuple[Tensor, ...]:
        biases = torch.from_numpy(self.bias13), torch.from_numpy(self.bias2)
        return unpack.tensors(self.w13) + unpack.tensors(self.w2) + biases

    @property
    def operands(self) -> Operands:
        """As `experts_rows` takes them."""
        return self.w13, self.bias13, self.w2, self.bias2, self.gating

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
        _experts(as_array(x_UD), row_index_R.numpy(), offsets, self.operands, as_array(y_RD))
        return y_RD


@dataclass(frozen=True, eq=False)
class PackedHeads:
    """`kernels.ops.heads.PerHead` for rows of the weights' dtype."""

    panels: np.ndarray  # [H, P, K', 32]
    num_outputs: int

    def __call__(self, x_THK: Tensor, out: Tensor | None = None) -> Tensor:
        y_THN = x_THK.new_empty(*x_THK.shape[:2], self.num_outputs)
        _heads(as_array(x_THK.contiguous()), self.panels, as_array(y_THN))
        return y_THN if out is None else out.copy_(y_THN)


def prepare_linear(
    weight: Weight,
    bias_N: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
    x_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> Linear:
    """As `kernels.ops.linear.PrepareLinear`."""
    w_NK = linear.unpacked(weight, dtype)
    assert out_dtype in (None, w_NK.dtype), (out_dtype, w_NK.dtype)
    return pack_linear(w_NK, bias_N) if is_packed(w_NK) else linear.prepare(w_NK, bias_N)


def prepare_per_head(w_HNK: Tensor) -> PerHead:
    """As `kernels.ops.heads.PreparePerHead`."""
    return pack_heads(w_HNK) if is_packed(w_HNK) else heads.prepare(w_HNK)


def prepare_experts(
    w13: Weight,
    w2: Weight,
    *,
    activation: Activation | None = None,
    bias13_eF: Tensor | None = None,
    bias2_eD: Tensor | None = None,
    expected: float = 1.0,
    overlapped: bool = False,
) -> GroupedMlp:
    """As `kernels.ops.experts.PrepareExperts`."""
    activation = activation or Activation()
    if is_packed(w13) and is_packed(w2):
        assert activation.gated, f"{activation} on a CPU"
        return pack_experts(w13, w2, activation, bias13_eF, bias2_eD)
    biases = {"bias13_eF": bias13_eF, "bias2_eD": bias2_eD}
    return experts_op.prepare(w13, w2, activation=activation, silu_mul=silu_mul, **biases)


def pack_linear(w_NK: Tensor, bias_N: Tensor | None = None) -> PackedLinear:
    """From a weight that `supports`."""
    num_outputs = w_NK.shape[0]
    starts = np.arange(0, -(-num_outputs // PANEL) * PANEL, LANES)
    bias = np.zeros(len(starts) * LANES, np.float32)
    if bias_N is not None:
        bias[:num_outputs] = bias_N.float().numpy()
    return PackedLinear(_pack(w_NK[None], starts)[0], bias, num_outputs)


def pack_heads(w_HNK: Tensor) -> PackedHeads:
    """From weights that `supports`."""
    num_outputs = w_HNK.shape[1]
    return PackedHeads(_pack(w_HNK, np.arange(0, -(-num_outputs // PANEL) * PANEL, LANES)), num_outputs)


def pack_experts(
    w13: Weight,
    w2: Weight,
    activation: Activation,
    bias13_eF: Tensor | None = None,
    bias2_eD: Tensor | None = None,
) -> PackedExperts:
    """From weights [e, 2F, D] and [e, D, F] that `supports`."""
    assert supports(w13), f"w13 {tuple(w13.shape)}"
    assert supports(w2), f"w2 {tuple(w2.shape)}"
    num_experts, width, inner = w2.shape
    alpha, limit, offset = activation.gating
    gates = np.arange(0, inner, LANES)
    halves = np.stack((gates, gates + inner), 1).flatten()
    bias13 = np.zeros((num_experts, 2 * inner), np.float32) if bias13_eF is None else bias13_eF.float().numpy()
    bias2 = np.zeros((num_experts, width), np.float32) if bias2_eD is None else bias2_eD.float().numpy()
    return PackedExperts(
        w13=_pack(w13, halves),
        w2=_pack(w2, np.arange(0, width, LANES)),
        bias13=bias13.reshape(num_experts, -1, LANES)[:, halves // LANES].reshape(num_experts, -1, PANEL),
        bias2=bias2,
        gating=(np.float32(alpha), np.float32(limit), np.float32(offset)),
    )


def _pack(w_eNK: Weight, starts: np.ndarray) -> np.ndarray | Codes:
    """[e, P, K', 32], half a panel from each row of `starts`."""
    if isinstance(w_eNK, QuantizedWeight):
        return unpack.pack(w_eNK, starts)
    array = as_array(w_eNK.contiguous())
    array = array.view(np.uint32) if array.dtype == np.uint16 else array
    panels = empty((len(array), len(starts) // 2, array.shape[2], PANEL), array.dtype)
    for w, packed in zip(array, panels, strict=True):
        pack_rows(w, starts, packed)
    return panels


@jit
def _copy(x, start, count, buffer):
    for i in range(count):
        put_row(x[start + i], buffer[i])


def _rows(x, start, count, buffer):
    """Rows of x for `multiply`: in place, if they can be, or else in `buffer`."""


@overload(_rows)
def _rows_overload(x, start, count, buffer):
    in_place = x.dtype == buffer.dtype
    least = LEAST_ROWS if x.dtype == types.uint16 else 0

    def rows(x, start, count, buffer):
        if count >= least:
            return x[start : start + count]
        _copy(x, start, count, buffer)
        return buffer

    def copied(x, start, count, buffer):
        _copy(x, start, count, buffer)
        return buffer

    return rows if in_place else copied


@jit
def _product(x, num_m, w, bias, room, found, y):
    num_n, num_k = y.shape[1], x.shape[1]
    for i in range(num_panels(w)):
        n = i * PANEL
        panels, j = unpacked(w, i, room)
        for m in range(0, num_m, rows_at_once(panels)):
            multiply(x, m, num_m, num_k, panels, j, found)
            count = min(rows_at_once(panels), num_m - m)
            if n + PANEL <= num_n:
                put_rows(found, HEAD, count, bias, n, y, m * num_n + n, num_n)
            else:
                _put_few(found, count, bias, n, y[m : m + count])


@jit
def _put_few(found, count, bias, n, y):
    """What `put_rows` does, of a panel that is wider than what is left of y from column n on."""
    for i in range(count):
        for k in range(n, y.shape[1]):
            y[i, k] = round_like(found[HEAD + i, k - n] + bias[k], y[i, k])


@jit
def _hidden(x, num_m, w13, bias, gating, room, found, other, like, hidden):
    """What lies between an expert's products, rounded as `like`. Some rows are gated while the next ones are multiplied."""
    width, num_k = hidden.shape[1], x.shape[1]
    waiting = other, HEAD, 0, bias, 0, gating, like, hidden, 0, width
    for i in range(num_panels(w13)):
        panels, j = unpacked(w13, i, room)
        step = rows_at_once(panels)
        for m in range(0, num_m, step):
            multiply_gating(x, m, num_m, num_k, panels, j, found, waiting)
            count, at = min(step, num_m - m), m * width + i * LANES
            waiting = found, HEAD, count, bias, i * PANEL, gating, like, hidden, at, width
            found, other = other, found
    put_gated_rows(*waiting)


@allocating_jit
def linear_rows(x, w, bias, y):
    """`kernels.ops.linear.reference` of contiguous rows, with weights and a bias as in `PackedLinear`."""
    num_m, num_k = x.shape
    buffer, found = operand(min(num_m, CHUNK), num_k, w), products()
    begin(w)
    for start in range(0, num_m, CHUNK):
        count = min(CHUNK, num_m - start)
        _product(_rows(x, start, count, buffer), count, w, bias, w, found, y[start : start + count])
    finish(w)


@jit
def _gather(x, index, start, count, rows):
    for m in range(count):
        put_row(x[index[start + m]], rows[m])


@allocating_jit
def experts_rows(x, index, offsets, operands, y):
    """`kernels.ops.experts.reference`, with `PackedExperts.operands`, of at least one row."""
    w13, bias13, w2, bias2, gating = operands
    most, width, inner = min(CHUNK, np.diff(offsets).max()), x.shape[1], bias13.shape[1] * LANES
    room13, room2 = room(expert(w13, 0), x), room(expert(w2, 0), x)
    rows, hidden, found = operand(most, width, room13), operand(most, inner, room2), products()
    other = products()
    begin(room13)
    for e in range(len(bias13)):
        for start in range(offsets[e], offsets[e + 1], CHUNK):
            count = min(CHUNK, offsets[e + 1] - start)
            _gather(x, index, start, count, rows)
            _hidden(rows, count, expert(w13, e), bias13[e], gating, room13, found, other, x[0, 0], hidden)
            _product(hidden, count, expert(w2, e), bias2[e], room2, found, y[start : start + count])
    finish(room13)


@allocating_jit
def _linear(x, w, bias, y):
    linear_rows(x, w, bias, y)


@allocating_jit
def _experts(x, index, offsets, operands, y):
    if len(index) > 0:
        experts_rows(x, index, offsets, operands, y)


@allocating_jit
def _heads(x, w, y):
    num_m, num_heads, num_k = x.shape
    num_n, most = y.shape[2], min(num_m, CHUNK)
    bias, found = np.zeros(w.shape[1] * PANEL, np.float32), products()
    rows, columns = operand(most, num_k, w[0]), empty((most, num_n), y.dtype)
    begin(w[0])
    for h in range(num_heads):
        for start in range(0, num_m, CHUNK):
            count = min(CHUNK, num_m - start)
            for m in range(count):
                put_row(x[start + m, h], rows[m])
            _product(rows, count, w[h], bias, w[h], found, columns)
            for m in range(count):
                y[start + m, h] = columns[m]
    finish(w[0])
