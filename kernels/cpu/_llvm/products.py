"""Product of some rows of x with a panel of weights: by AMX if it holds pairs and the processor can, else in vectors.

Rows that are multiplied by pairs are bf16 where the processor multiplies pairs in either way, else fp32. The
dispatch on an array `w` is by its type alone, at compile time.
"""

from __future__ import annotations

import numpy as np
from numba import types
from numba.extending import overload

from expertwire.kernels.cpu._llvm import amx, panels
from expertwire.kernels.cpu._llvm.panels import PANEL, store_gated_rows
from expertwire.kernels.cpu._llvm.scalars import allocating_jit, empty

MULTIPLIES_PAIRS = amx.AVAILABLE or panels.MULTIPLIES_PAIRS
BF16_PRODUCTS = "AMX" if amx.AVAILABLE else "AVX512-BF16" if MULTIPLIES_PAIRS else "vectors of fp32"
LEAST_ROWS = amx.TILE if amx.AVAILABLE else 1  # of an operand, even if fewer are multiplied
HEAD = amx.HEAD  # rows of products before the requested ones


def _by_amx(w):
    return amx.AVAILABLE and w.dtype == types.uint32


def begin_products(w):
    """Acquire AMX tiles if needed: before any `multiply` with weights like w."""


@overload(begin_products)
def _begin_products(w):
    return (lambda w: amx.begin()) if _by_amx(w) else (lambda w: None)


def end_products(w):
    """Release AMX tiles if needed: after the last `multiply`."""


@overload(end_products)
def _end_products(w):
    return (lambda w: amx.finish()) if _by_amx(w) else (lambda w: None)


def rows_at_once(w):
    """Return how many rows of x `multiply` takes at once."""


@overload(rows_at_once)
def _rows_at_once(w):
    rows = amx.ROWS if _by_amx(w) else panels.ROWS
    return lambda w: rows


def operand(num_rows, num_k, w):
    """Return an array for rows of x, with the type and number of rows that `multiply` needs."""


@overload(operand)
def _operand(num_rows, num_k, w):
    dtype = np.uint16 if MULTIPLIES_PAIRS and w.dtype == types.uint32 else np.float32
    least = LEAST_ROWS
    return lambda num_rows, num_k, w: empty((max(num_rows, least), num_k), dtype)


@allocating_jit
def accumulators():
    """Return the output array of `multiply`: fp32 [*, 32], written from row HEAD on."""
    return empty((HEAD + max(amx.ROWS, panels.ROWS), PANEL), np.float32)


def multiply(x, m, num_m, num_k, w, i, acc):
    """Multiply rows m, m + 1, ... of the first `num_m` of x, up to `rows_at_once`, by panel i of w [panels, >= K', 32].

    x is an `operand` or like one; `num_k`, at most its width, is K. The next panel is prefetched.
    """


@overload(multiply)
def _multiply(x, m, num_m, num_k, w, i, acc):
    def with_amx(x, m, num_m, num_k, w, i, acc):
        at, size = i * w.shape[1] * w.shape[2], w.shape[1] * w.shape[2]
        amx.multiply_rows(x, m, num_m, num_k, w, at, at + size, acc, None)

    step = 2 if w.dtype == types.uint32 else 1

    def in_vectors(x, m, num_m, num_k, w, i, acc):
        at, size, width = i * w.shape[1] * w.shape[2], w.shape[1] * w.shape[2], x.shape[1]
        done, count = 0, min(panels.ROWS, num_m - m)
        while done < count:
            start, row = (m + done) * width, (HEAD + done) * PANEL
            left = count - done
            done += panels.multiply_rows(left, x, start, width, w, at, at + size, num_k // step, acc, row)

    return with_amx if _by_amx(w) else in_vectors


def multiply_and_gate(x, m, num_m, num_k, w, i, acc, pending):
    """`multiply`, and `store_gated_rows(*pending)` for earlier products, if it has rows."""


@overload(multiply_and_gate)
def _multiply_and_gate(x, m, num_m, num_k, w, i, acc, pending):
    def with_amx(x, m, num_m, num_k, w, i, acc, pending):
        at, size = i * w.shape[1] * w.shape[2], w.shape[1] * w.shape[2]
        amx.multiply_rows(x, m, num_m, num_k, w, at, at + size, acc, pending)

    def in_vectors(x, m, num_m, num_k, w, i, acc, pending):
        if pending[2] > 0:
            store_gated_rows(*pending)
        multiply(x, m, num_m, num_k, w, i, acc)

    return with_amx if _by_amx(w) else in_vectors
