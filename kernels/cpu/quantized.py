"""Quantised experts packed into panels of codes, which are dequantised when they are multiplied.

A panel of codes is [K / 2, 32]: entry (k, n) holds numbers 2 k and 2 k + 1 of output n (`_llvm.codes`). A vector holds
adjacent outputs, so that expansion to a panel of numbers needs no shuffles, and memory holds the checkpoint's bytes in
another order. Numbers have the bits of `formats.dequantize`.

M outputs, K inputs, J groups of inputs that share a scale, e experts.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numba import types
from numba.extending import overload
from torch import Tensor

from expertwire.kernels import formats
from expertwire.kernels.cpu._llvm import LANES, PANEL, allocating_jit, empty, expand_codes, jit, load
from expertwire.kernels.formats import QuantizedWeight

_CODES = {"fp8_block": np.uint16, "fp8_row": np.uint16, "int4": np.int8}


class Codes(NamedTuple):
    """Quantised matrices [e, M, K], or one of them without the first dimension."""

    codes: np.ndarray  # [e, panels, K / 2, 32]
    scales: np.ndarray  # [e, panels, J, 32 or 2]: of each output or of each half of a panel; fp32, bf16 as u16, or u8
    factors: np.ndarray  # fp32 [e, panels, 2]: global scale of each half
    table: np.ndarray  # fp32 [256]: values of u8 scales
    group: int  # pairs of inputs that share a scale

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        return self.codes, self.scales, self.factors


def pack(weight: QuantizedWeight, starts: np.ndarray) -> Codes:
    """Pack matrices, half a panel from each row of `starts`, multiples of 16; parts have whole halves.

    Raises:
        ValueError: the weight holds NaN.
    """
    num_experts, num_rows, num_k = weight.shape
    assert len(starts) * LANES == num_rows, (len(starts), weight.shape)
    assert all(rows % LANES == 0 for rows in weight.parts), (weight.parts, LANES)
    rows = (starts[:, None] + np.arange(LANES)).reshape(-1, PANEL)  # [panels, 32]
    stored, dtype = weight.data.contiguous().view(torch.uint8), _CODES.get(weight.format, np.uint8)
    codes = empty((num_experts, len(rows), num_k // 2, PANEL), dtype)
    for matrix, packed in zip(stored, codes, strict=True):
        if weight.data.dtype == formats.FP8 and ((matrix & 0x7F) == 0x7F).any():
            raise ValueError(f"a weight of format {weight.format} and shape {tuple(weight.shape)} holds NaN")
        _transpose(matrix.numpy().view(dtype), rows, packed)
    return Codes(codes, _scales(weight, rows), _factors(weight, rows), _table(weight.format), _group(weight))


@jit
def _transpose(matrix, rows, panels):
    for p in range(len(rows)):
        for k in range(panels.shape[1]):
            for n in range(rows.shape[1]):
                panels[p, k, n] = matrix[rows[p, n], k]


def _scales(weight: QuantizedWeight, rows: np.ndarray) -> np.ndarray:
    """Return [e, panels, J, 32 or 2]."""
    if weight.format == "fp8_block":
        per_row, rows = formats.row_scales(weight), rows[:, ::LANES]
    elif weight.format == "fp8_row":
        per_row = weight.scales[..., None]
    else:
        per_row = weight.scales.view(torch.int16 if weight.format == "int4" else torch.uint8)
    found = np.ascontiguousarray(per_row.numpy()[:, rows].swapaxes(2, 3))
    return found.view(np.uint16) if found.dtype == np.int16 else found


def _factors(weight: QuantizedWeight, rows: np.ndarray) -> np.ndarray:
    if weight.global_scales is None:
        return np.ones((weight.shape[0], len(rows), 2), np.float32)
    part = np.searchsorted(np.cumsum(weight.parts), rows[:, ::LANES], side="right")
    return np.ascontiguousarray(weight.global_scales.numpy()[:, part])


def _table(format: str) -> np.ndarray:
    every = torch.arange(256).to(torch.uint8)
    return (formats.exponents_to_fp32(every) if format == "mxfp4" else formats.byte_values("fp8_row")).numpy()


def _group(weight: QuantizedWeight) -> int:
    columns = {"fp8_block": formats.BLOCK, "fp8_row": weight.shape[-1]} | formats.GROUPS
    return columns[weight.format] // 2


def tensors(weight: np.ndarray | Codes) -> tuple[Tensor, ...]:
    """Return the arrays [e, ...] of panels or codes as tensors that share their memory."""
    arrays = weight.arrays if isinstance(weight, Codes) else (weight,)
    return tuple(torch.from_numpy(array.view(np.int32)) for array in arrays)


def expert(w, e):
    """Return the panels or codes of one expert, of those of [e, ...]."""


@overload(expert)
def _expert(w, e):
    if isinstance(w, types.Array):
        return lambda w, e: w[e]
    return lambda w, e: Codes(w.codes[e], w.scales[e], w.factors[e], w.table, w.group)


def num_panels(w):
    """Return the number of an expert's panels."""


@overload(num_panels)
def _num_panels(w):
    return (lambda w: len(w)) if isinstance(w, types.Array) else (lambda w: len(w.codes))


def panel_of(w, i, scratch):
    """Return an array of panels of numbers and panel i's index in it; codes are expanded into `scratch`."""


@overload(panel_of)
def _panel_of(w, i, scratch):
    if isinstance(w, types.Array):
        return lambda w, i, scratch: (w, i)

    def unpack(w, i, scratch):
        _unpack(w.codes[i], w.scales[i], w.factors[i], w.table, w.group, scratch)
        return scratch, 0

    return unpack


def scratch(w, like):
    """Return scratch for `panel_of`: [2, K', 32] for codes, with numbers for x of the type of `like`; else empty.

    The second panel is never used, only prefetched by products with the first.
    """


@overload(scratch)
def _scratch(w, like):
    if isinstance(w, types.Array):
        return lambda w, like: w[:0]
    if like.dtype == types.uint16:
        return lambda w, like: empty((2, w.codes.shape[1], PANEL), np.uint32)
    return lambda w, like: empty((2, 2 * w.codes.shape[1], PANEL), np.float32)


def _scale(stored, table):
    """Return a scale as fp32."""


@overload(_scale, inline="always")
def _scale_overload(stored, table):
    if stored == types.uint8:
        return lambda stored, table: table[stored]
    return lambda stored, table: load(stored)


@allocating_jit
def _unpack(codes, scales, factors, table, group, scratch):
    num_k, each, of_outputs = len(codes), scales.shape[1] == PANEL, np.empty(PANEL, np.float32)
    for g in range(len(scales)):
        for half in range(2):
            for n in range(half * LANES, (half + 1) * LANES):
                of_outputs[n] = _scale(scales[g, n if each else half], table) * factors[half]
        first = g * group
        expand_codes(codes, first, min(group, num_k - first), of_outputs, scratch)
