"""Arithmetic of fp32 numbers in Triton, for recurrences of models with 16 bits.

A product of an fp32 number with one of the model's 16 bits is two products: of the upper and of the lower half of the former.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def softplus(x):
    """Return log(1 + e^x) to a few last bits, for small results too."""
    e = tl.exp(-tl.abs(x))
    z = e / (2.0 + e)  # log(1 + e) = 2 artanh(z), z <= 1/3
    w = z * z
    p = 1.0 / 15
    for i in tl.static_range(7):
        p = tl.fma(p, w, 1.0 / (13 - 2 * i))
    return tl.maximum(x, 0.0) + 2.0 * z * p


@triton.jit
def halves(x, dtype: tl.constexpr):
    """Return two numbers of 16 bits, whose sum is x but for its last seven bits or so."""
    if dtype == tl.bfloat16:  # the upper half of the bits: conversions that are used twice are slow
        upper = (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
        result = upper.to(dtype), (x - upper).to(dtype)
    else:
        rounded = x.to(dtype)
        result = rounded, (x - rounded.to(tl.float32)).to(dtype)
    return result


@triton.jit
def dot_fp32(a, b, acc):
    """Return acc + a b, where one of them is fp32 and the other has the model's numbers."""
    if a.dtype == b.dtype:
        acc = tl.dot(a, b, acc, input_precision="tf32x3")
    elif a.dtype == tl.float32:
        upper, lower = halves(a, b.dtype)
        acc = tl.dot(upper, b, tl.dot(lower, b, acc))
    else:
        upper, lower = halves(b, a.dtype)
        acc = tl.dot(a, upper, tl.dot(a, lower, acc))
    return acc
