"""Numbers in numba: bf16 seen as its upper sixteen bits (u16), arithmetic in fp32, rounding to nearest even on the way out."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload
from torch import Tensor

from expertwire.compiled import compiler

# No fast math: what LLVM makes of it depends on what a function is inlined into, which depends on what was in the cache, so two
# ranks could differ in their last bits.
jit = compiler(__file__, error_model="numpy")


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


def load(stored):
    """fp32 value of an array's element."""


@overload(load, inline="always")
def _load_overload(stored):
    if stored == types.uint16:
        return lambda stored: _bits_to_f32(np.uint32(stored) << np.uint32(16))
    return lambda stored: stored


def round_like(value, like):
    """An element of `like`'s type from an fp32 value."""


@overload(round_like, inline="always")
def _round_overload(value, like):
    if like == types.uint16:

        def to_bf16(value, like):
            bits = _f32_to_bits(np.float32(value))
            return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))

        return to_bf16
    return lambda value, like: np.float32(value)


@jit
def exp(x: float) -> float:
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


@jit
def sum_squares(x: np.ndarray) -> float:
    """Of one row, in eight partial sums, which a processor adds side by side."""
    a, b, c, d = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
    e, f, g, h = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
    whole = len(x) // 8 * 8
    for i in range(0, whole, 8):
        a += load(x[i]) * load(x[i])
        b += load(x[i + 1]) * load(x[i + 1])
        c += load(x[i + 2]) * load(x[i + 2])
        d += load(x[i + 3]) * load(x[i + 3])
        e += load(x[i + 4]) * load(x[i + 4])
        f += load(x[i + 5]) * load(x[i + 5])
        g += load(x[i + 6]) * load(x[i + 6])
        h += load(x[i + 7]) * load(x[i + 7])
    for i in range(whole, len(x)):
        a += load(x[i]) * load(x[i])
    return ((a + b) + (c + d)) + ((e + f) + (g + h))


@jit
def softmax(x: np.ndarray) -> None:
    """In place, of one row; maximum and sum in eight parts, as in `sum_squares`."""
    largest, total = np.empty(8, np.float32), np.zeros(8, np.float32)
    whole = len(x) // 8 * 8
    largest[:] = x[0]
    for i in range(0, whole, 8):
        for j in range(8):
            largest[j] = max(largest[j], x[i + j])
    for i in range(whole, len(x)):
        largest[0] = max(largest[0], x[i])
    top = largest[0]
    for j in range(8):
        top = max(top, largest[j])
    for i in range(len(x)):
        x[i] = exp(x[i] - top)
    for i in range(0, whole, 8):
        for j in range(8):
            total[j] += x[i + j]
    for i in range(whole, len(x)):
        total[0] += x[i]
    parts = ((total[0] + total[1]) + (total[2] + total[3])) + ((total[4] + total[5]) + (total[6] + total[7]))
    inverse = np.float32(1) / parts
    for i in range(len(x)):
        x[i] *= inverse


def as_array(x: Tensor) -> np.ndarray:
    """A view that numba understands: bf16 as u16."""
    return x.view(torch.uint16).numpy() if x.dtype == torch.bfloat16 else x.numpy()
