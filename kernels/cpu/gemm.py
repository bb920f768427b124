"""Linear layers and experts on a CPU, on one thread.

Weights are packed into panels once, after loading. One path serves any number of rows, and a row's bits do not
depend on the others.

M rows, N outputs, K inputs, T tokens, H heads, U distinct tokens, R routed rows, e experts, D model width, F expert
width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numba import types
from numba.extending import overload
from torch import Tensor

from expertwire.kernels.cpu import quantized
from expertwire.kernels.cpu._llvm import (
    HEAD,
    K_STEP,
    LANES,
    LEAST_ROWS,
    PANEL,
    accumulators,
    allocating_jit,
    as_array,
    begin_products,
    copy_row,
    empty,
    end_products,
    jit,
    load,
    longest_part,
    multiply,
    multiply_and_gate,
    operand,
    pack_rows,
    round_like,
    rows_at_once,
    store_gated_rows,
    store_rows,
)
from expertwire.kernels.cpu.elementwise import silu_mul
from expertwire.kernels.cpu.quantized import Codes, expert, num_panels, panel_of, scratch
from expertwire.kernels.formats import QuantizedWeight, Weight
from expertwire.kernels.ops import experts as experts_op
from expertwire.kernels.ops import heads, linear
from expertwire.kernels.ops.experts import GroupedMlp, GroupedMlpWeights
from expertwire.kernels.ops.heads import PerHead
from expertwire.kernels.ops.linear import Linear
from expertwire.kernels.ops.permute import TileMap

# Rows of x that stay in the cache while they are multiplied by all weights; a multiple of `rows_at_once`.
CHUNK = 288

Gating = tuple[np.float32, np.float32, np.float32]  # alpha, limit and offset of `experts.gate_reference`
Operands = tuple[np.ndarray | Codes, np.ndarray, np.ndarray | Codes, np.ndarray, Gating | None]


def is_packed(weight: Weight) -> bool:
    """Return whether a weight [..., N, K] is packed: if its widths allow it and torch has one or two threads.

    Products of packed weights run on one thread, which takes most of the memory bandwidth that two could; more threads
    together read faster.
    """
    return weight.device.type == "cpu" and torch.get_num_threads() <= 2 and supports(weight)


def supports(weight: Weight) -> bool:
    """Return whether panels can hold a weight [..., N, K]."""
    if isinstance(weight, QuantizedWeight):
        return weight.shape[-1] % K_STEP == 0 and all(rows % LANES == 0 for rows in weight.parts)
    return weight.shape[-1] % K_STEP == 0 and weight.dtype in (torch.float32, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class PackedLinear:
    """`kernels.ops.linear.Linear` of contiguous rows, converted to the weight's dtype."""

    panels: np.ndarray  # [panels, K', 32]
    bias: np.ndarray  # fp32 [panels * 32]
    num_outputs: int

    def __call__(self, x_MK: Tensor) -> Tensor:
        x_MK = x_MK.to(torch.bfloat16 if self.panels.dtype == np.uint32 else torch.float32)
        y_MN = x_MK.new_empty(x_MK.shape[0], self.num_outputs)
        linear_rows(as_array(x_MK), self.panels, self.bias, as_array(y_MN))
        return y_MN


@dataclass(frozen=True, eq=False)
class PackedExperts:
    """`kernels.ops.experts.GroupedMlp`; weights are panels of numbers or `quantized.Codes`."""

    w13: np.ndarray | Codes  # [e, F / 16, K', 32]: sixteen outputs of w1, then sixteen of w3; without a gate as w2
    w2: np.ndarray | Codes  # [e, panels, K', 32]
    bias13: np.ndarray  # fp32 [e, F / 16, 32]; [e, F] without a gate
    bias2: np.ndarray  # fp32 [e, D]
    gating: Gating | None  # None: squared ReLU

    @property
    def weights(self) -> tuple[Tensor, ...]:
        biases = torch.from_numpy(self.bias13), torch.from_numpy(self.bias2)
        return quantized.tensors(self.w13) + quantized.tensors(self.w2) + biases

    @property
    def operands(self) -> Operands:
        """Return the arguments of `experts_rows`."""
        return self.w13, self.bias13, self.w2, self.bias2, self.gating

    def __call__(
        self,
        x_UD: Tensor,
        row_index_R: Tensor,
        offsets: np.ndarray | Tensor,
        home_R: Tensor | None = None,
        tile_map: TileMap | None = None,
    ) -> Tensor:
        assert isinstance(offsets, np.ndarray), "the host counts rows"
        assert home_R is None, "rows stay in order"
        assert tile_map is None, "rows are not in tiles"
        y_RD = x_UD.new_empty(len(row_index_R), x_UD.shape[1])
        if len(row_index_R) > 0:
            experts_rows(as_array(x_UD), row_index_R.numpy(), offsets, self.operands, as_array(y_RD))
        return y_RD


@dataclass(frozen=True, eq=False)
class PackedHeads:
    """`kernels.ops.heads.PerHead` for rows of the weights' dtype."""

    panels: np.ndarray  # [H, panels, K', 32]
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


def prepare_experts(weights: GroupedMlpWeights, *, expected: float = 1.0, overlapped: bool = False) -> GroupedMlp:
    """As `kernels.ops.experts.PrepareExperts`."""
    if is_packed(weights.w13) and is_packed(weights.w2):
        return pack_experts(weights)
    return experts_op.prepare(weights, silu_mul=silu_mul)


def pack_linear(w_NK: Tensor, bias_N: Tensor | None = None) -> PackedLinear:
    """Pack a weight that panels support."""
    num_outputs = w_NK.shape[0]
    starts = np.arange(0, -(-num_outputs // PANEL) * PANEL, LANES)
    bias = np.zeros(len(starts) * LANES, np.float32)
    if bias_N is not None:
        bias[:num_outputs] = bias_N.float().numpy()
    return PackedLinear(_pack_dense(w_NK[None], starts)[0], bias, num_outputs)


def pack_heads(w_HNK: Tensor) -> PackedHeads:
    """Pack weights that panels support."""
    num_outputs = w_HNK.shape[1]
    return PackedHeads(_pack_dense(w_HNK, np.arange(0, -(-num_outputs // PANEL) * PANEL, LANES)), num_outputs)


def pack_experts(weights: GroupedMlpWeights) -> PackedExperts:
    """Pack weights that panels support."""
    w = weights
    assert supports(w.w13), f"w13 {tuple(w.w13.shape)}"
    assert supports(w.w2), f"w2 {tuple(w.w2.shape)}"
    num_experts, width, inner = w.w2.shape
    rows = w.w13.shape[1]
    bias13 = np.zeros((num_experts, rows), np.float32) if w.bias13_eF is None else w.bias13_eF.float().numpy()
    bias2 = np.zeros((num_experts, width), np.float32) if w.bias2_eD is None else w.bias2_eD.float().numpy()
    packed_w2 = _pack(w.w2, np.arange(0, width, LANES))
    if not w.activation.gated:
        starts = np.arange(0, -(-rows // PANEL) * PANEL, LANES)
        return PackedExperts(_pack(w.w13, starts), packed_w2, bias13, bias2, gating=None)
    gates = np.arange(0, inner, LANES)
    halves = np.stack((gates, gates + inner), 1).flatten()
    bias13 = bias13.reshape(num_experts, -1, LANES)[:, halves // LANES].reshape(num_experts, -1, PANEL)
    alpha, limit, offset = w.activation.gating
    gating = np.float32(alpha), np.float32(limit), np.float32(offset)
    return PackedExperts(_pack(w.w13, halves), packed_w2, bias13, bias2, gating)


def _pack(w_eNK: Weight, starts: np.ndarray) -> np.ndarray | Codes:
    """Return panels [e, panels, K', 32], or codes, with half a panel from each row of `starts`."""
    return quantized.pack(w_eNK, starts) if isinstance(w_eNK, QuantizedWeight) else _pack_dense(w_eNK, starts)


def _pack_dense(w_eNK: Tensor, starts: np.ndarray) -> np.ndarray:
    array = as_array(w_eNK.contiguous())
    array = array.view(np.uint32) if array.dtype == np.uint16 else array
    panels = empty((len(array), len(starts) // 2, array.shape[2], PANEL), array.dtype)
    for w, packed in zip(array, panels, strict=True):
        pack_rows(w, starts, packed)
    return panels


@jit
def _copy(x, start, count, buffer):
    for i in range(count):
        copy_row(x[start + i], buffer[i])


def _rows(x, start, count, buffer):
    """Return rows of x for `multiply`: in place if possible, else copied to `buffer`."""


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
def _product(x, num_m, w, bias, scratch, acc, y):
    num_n, num_k = y.shape[1], x.shape[1]
    for i in range(num_panels(w)):
        n = i * PANEL
        panels, j = panel_of(w, i, scratch)
        for m in range(0, num_m, rows_at_once(panels)):
            multiply(x, m, num_m, num_k, panels, j, acc)
            count = min(rows_at_once(panels), num_m - m)
            if n + PANEL <= num_n:
                store_rows(acc, HEAD, count, bias, n, y, m * num_n + n, num_n)
            else:
                _store_partial_panel(acc, count, bias, n, y[m : m + count])


@jit
def _store_partial_panel(acc, count, bias, n, y):
    """As `store_rows`, for a panel that is wider than the columns of y from n on."""
    for i in range(count):
        for k in range(n, y.shape[1]):
            y[i, k] = round_like(acc[HEAD + i, k - n] + bias[k], y[i, k])


def _hidden(x, num_m, w13, bias, gating, scratch, acc, other, like, hidden):
    """Compute the hidden layer of an expert, rounded as `like`; without `gating` by squared ReLU."""


@overload(_hidden)
def _hidden_overload(x, num_m, w13, bias, gating, scratch, acc, other, like, hidden):
    def gated(x, num_m, w13, bias, gating, scratch, acc, other, like, hidden):
        _gated_hidden(x, num_m, w13, bias, gating, scratch, acc, other, like, hidden)

    def ungated(x, num_m, w13, bias, gating, scratch, acc, other, like, hidden):
        _product(x, num_m, w13, bias, scratch, acc, hidden)
        for m in range(num_m):
            _relu2(hidden[m], like)

    return ungated if isinstance(gating, types.NoneType) else gated


@jit
def _relu2(row, like):
    """Square the positive numbers of a row of products, every result rounded as `like`."""
    for i in range(len(row)):
        number = max(load(round_like(load(row[i]), like)), np.float32(0))
        row[i] = round_like(load(round_like(number * number, like)), row[i])


@jit
def _gated_hidden(x, num_m, w13, bias, gating, scratch, acc, other, like, hidden):
    """Compute gated hidden rows: some are gated while the next ones are multiplied."""
    width, num_k = hidden.shape[1], x.shape[1]
    pending = other, HEAD, 0, bias, 0, gating, like, hidden, 0, width
    for i in range(num_panels(w13)):
        panels, j = panel_of(w13, i, scratch)
        step = rows_at_once(panels)
        for m in range(0, num_m, step):
            multiply_and_gate(x, m, num_m, num_k, panels, j, acc, pending)
            count, at = min(step, num_m - m), m * width + i * LANES
            pending = acc, HEAD, count, bias, i * PANEL, gating, like, hidden, at, width
            acc, other = other, acc
    store_gated_rows(*pending)


@allocating_jit
def linear_rows(x, w, bias, y):
    """As `kernels.ops.linear.reference`, of contiguous rows, with panels and bias of a `PackedLinear`."""
    num_m, num_k = x.shape
    buffer, acc = operand(min(num_m, CHUNK), num_k, w), accumulators()
    begin_products(w)
    for start in range(0, num_m, CHUNK):
        count = min(CHUNK, num_m - start)
        _product(_rows(x, start, count, buffer), count, w, bias, w, acc, y[start : start + count])
    end_products(w)


@jit
def _gather(x, index, start, count, rows):
    for m in range(count):
        copy_row(x[index[start + m]], rows[m])


@allocating_jit
def experts_rows(x, index, offsets, operands, y):
    """As `kernels.ops.experts.reference`, with `PackedExperts.operands`; at least one row."""
    w13, bias13, w2, bias2, gating = operands
    most, width = min(CHUNK, longest_part(offsets)), x.shape[1]
    inner = bias13[0].size if gating is None else bias13.shape[1] * LANES
    scratch13, scratch2 = scratch(expert(w13, 0), x), scratch(expert(w2, 0), x)
    rows, hidden, acc = operand(most, width, scratch13), operand(most, inner, scratch2), accumulators()
    other = accumulators()
    begin_products(scratch13)
    for e in range(len(bias13)):
        for start in range(offsets[e], offsets[e + 1], CHUNK):
            count = min(CHUNK, offsets[e + 1] - start)
            _gather(x, index, start, count, rows)
            _hidden(rows, count, expert(w13, e), bias13[e], gating, scratch13, acc, other, x[0, 0], hidden)
            _product(hidden, count, expert(w2, e), bias2[e], scratch2, acc, y[start : start + count])
    end_products(scratch13)


@allocating_jit
def _heads(x, w, y):
    num_m, num_heads, num_k = x.shape
    num_n, most = y.shape[2], min(num_m, CHUNK)
    bias, acc = np.zeros(w.shape[1] * PANEL, np.float32), accumulators()
    rows, columns = operand(most, num_k, w[0]), empty((most, num_n), y.dtype)
    begin_products(w[0])
    for h in range(num_heads):
        for start in range(0, num_m, CHUNK):
            count = min(CHUNK, num_m - start)
            for m in range(count):
                copy_row(x[start + m, h], rows[m])
            _product(rows, count, w[h], bias, w[h], acc, columns)
            for m in range(count):
                y[start + m, h] = columns[m]
    end_products(w[0])
