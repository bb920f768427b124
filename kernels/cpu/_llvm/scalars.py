"""Numbers in numba: arithmetic is in fp32; bf16 is stored as u16 (its bits), fp8 (e4m3) as u8.

Conversions round to nearest even; fp8 saturates. This module also defines the decorators of all compiled functions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload, register_jitable
from torch import Tensor

from expertwire.compiled import compiler
from expertwire.kernels.cpu._llvm.vectors import LINE_BYTES

# No fast math: its result depends on what a function is inlined into, hence on what the compilation cache held, so that
# two ranks could differ in their last bits.
#
# `jit` has no reference counts of arrays, as these are atomic and cost more than a small function's work. A function
# compiled by it may neither make an array nor return one; numba detects only the former.
_FOLDER = Path(__file__).parents[1] / "__init__.py"
jit = compiler(str(_FOLDER), "**/*.py", error_model="numpy", _nrt=False)
allocating_jit = compiler(str(_FOLDER), "**/*.py", error_model="numpy", _nrt=True)


@register_jitable
def empty(shape, dtype):
    """Return an array aligned to a cache line, as torch's tensors are.

    Unaligned reads of 64 bytes touch two lines: a product of AMX tiles takes three times as long.
    """
    size = 1
    for length in shape:
        size *= length
    memory = np.empty(size + LINE_BYTES, dtype)
    start = -memory.ctypes.data % LINE_BYTES // memory.itemsize
    return memory[start : start + size].reshape(shape)


@jit(inner=True)
def longest_part(offsets):
    """Return the largest difference of adjacent offsets; `np.diff` takes seconds to compile."""
    longest = 0
    for i in range(len(offsets) - 1):
        longest = max(longest, offsets[i + 1] - offsets[i])
    return longest


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


@register_jitable
def _from_fp8(code):
    """As `vectors.from_fp8`, for one number."""
    rest = code & np.uint32(0x7F)
    doubled = _bits_to_f32((rest << np.uint32(20)) + np.uint32(121 << 23))
    size = doubled - max(doubled * np.float32(0.5), np.float32(2**-6))
    if rest == np.uint32(0x7F):
        size = np.float32(np.nan)
    return _bits_to_f32(_f32_to_bits(size) | ((code & np.uint32(0x80)) << np.uint32(24)))


@register_jitable
def _to_fp8(value):
    """As `vectors.to_fp8`, for one number."""
    bits = _f32_to_bits(value)
    size = _bits_to_f32(bits & np.uint32(0x7FFFFFFF))
    if size > np.float32(448):
        size = np.float32(448)
    rest = _f32_to_bits(size)
    if size < np.float32(2**-6):
        code = _f32_to_bits(size + np.float32(2**14)) - np.uint32(0x46800000)
    else:
        code = ((rest + np.uint32(0x7FFFF) + ((rest >> np.uint32(20)) & np.uint32(1))) >> np.uint32(20)) - np.uint32(
            120 << 3
        )
    return np.uint8(min(code, np.uint32(0x7F)) | ((bits >> np.uint32(24)) & np.uint32(0x80)))


def load(stored):
    """Return the fp32 value of an array's element."""


@overload(load, inline="always")
def _load_overload(stored):
    if stored == types.uint16:
        return lambda stored: _bits_to_f32(np.uint32(stored) << np.uint32(16))
    if stored == types.uint8:
        return lambda stored: _from_fp8(np.uint32(stored))
    return lambda stored: stored


def round_like(value, like):
    """Return an fp32 value rounded to the type of `like`."""


@overload(round_like, inline="always")
def _round_overload(value, like):
    if like == types.uint16:

        def to_bf16(value, like):
            bits = _f32_to_bits(np.float32(value))
            return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))

        return to_bf16
    if like == types.uint8:
        return lambda value, like: _to_fp8(np.float32(value))
    return lambda value, like: np.float32(value)


@intrinsic
def _fma(context: Any, x: Any, y: Any, z: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fma(*args)

    return types.float32(types.float32, types.float32, types.float32), generate


@jit
def exp(x: np.float32) -> np.float32:
    """Return e^x in fp32 for x <= 88 by Cephes' expf: 2^n times a polynomial; loops over it vectorise."""
    x = max(x, np.float32(-87.0))
    n = np.floor(_fma(x, np.float32(1.44269504088896341), np.float32(0.5)))
    r = _fma(n, np.float32(2.12194440e-4), _fma(n, np.float32(-0.693359375), x))
    p = _fma(np.float32(1.9875691500e-4), r, np.float32(1.3981999507e-3))
    p = _fma(p, r, np.float32(8.3334519073e-3))
    p = _fma(p, r, np.float32(4.1665795894e-2))
    p = _fma(p, r, np.float32(1.6666665459e-1))
    p = _fma(p, r, np.float32(5.0000001201e-1))
    p = _fma(p, r * r, r) + np.float32(1.0)
    return p * _bits_to_f32(np.uint32(np.int32(n) + np.int32(127)) << np.uint32(23))


@jit
def decay_factor(x: np.float32) -> np.float32:
    """Return e^x in fp32 for x <= 0, and zero where it is less than e^-60; loops over it vectorise.

    What has decayed so far changes no sum that has a term of the present. Its products would be subnormal numbers, each of
    which takes some processors 150 cycles.
    """
    return np.float32(0) if x < np.float32(-60.0) else exp(x)


_SEEN_AS = {torch.bfloat16: torch.uint16, torch.float8_e4m3fn: torch.uint8}


def as_array(x: Tensor) -> np.ndarray:
    """Return a view that numba understands: bf16 as u16, fp8 as u8."""
    seen_as = _SEEN_AS.get(x.dtype)
    return x.numpy() if seen_as is None else x.view(seen_as).numpy()


class Rows(NamedTuple):
    """Rows of contiguous numbers that may lie apart, such as some columns of a product: row t begins at number `t * stride`.

    A view of one such row is contiguous and a view of more rows is not, so numba would compile what reads the view twice.
    """

    numbers: np.ndarray  # from the first row's first to the last row's last
    stride: int
    width: int


def as_rows(x: Tensor) -> Rows:
    """Return a tensor's rows for compiled functions."""
    (num, width), (stride, step) = x.shape, x.stride()
    assert step == 1, f"strides {x.stride()} of shape {tuple(x.shape)}"
    length = (num - 1) * stride + width if num > 0 else 0
    return Rows(as_array(x.as_strided((length,), (1,))), stride, width)
