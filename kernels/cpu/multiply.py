"""The product of some rows of x with a panel of weights: by matrices, where they are pairs and the processor can, or by vectors.

Rows that meet pairs are bf16 where the processor multiplies pairs in either way, else fp32.

What is called with an array `w` depends on its type alone.
"""

from __future__ import annotations

import numpy as np
from numba import types
from numba.extending import overload

from expertwire.kernels.cpu import amx, panel
from expertwire.kernels.cpu.numbers import allocating_jit, empty
from expertwire.kernels.cpu.panel import PANEL, put_gated_rows

MULTIPLIES_PAIRS = amx.AVAILABLE or panel.MULTIPLIES_PAIRS
BF16_PRODUCTS = "AMX" if amx.AVAILABLE else "AVX512-BF16" if MULTIPLIES_PAIRS else "vectors of fp32"
LEAST_ROWS = amx.TILE if amx.AVAILABLE else 1  # of an operand, whether or not that many are asked for
HEAD = amx.HEAD  # rows of products before those that were asked for


def by_matrices(w):
    return amx.AVAILABLE and w.dtype == types.uint32


def begin(w):
    """Before any `multiply` with weights like w."""


@overload(begin)
def _begin(w):
    return (lambda w: amx.begin()) if by_matrices(w) else (lambda w: None)


def finish(w):
    """After the last one."""


@overload(finish)
def _finish(w):
    return (lambda w: amx.finish()) if by_matrices(w) else (lambda w: None)


def rows_at_once(w):
    """How many rows of x `multiply` takes."""


@overload(rows_at_once)
def _rows_at_once(w):
    rows = amx.ROWS if by_matrices(w) else panel.ROWS
    return lambda w: rows


def operand(num_rows, num_k, w):
    """An array for rows of x, of the type and with the rows that `multiply` needs."""


@overload(operand)
def _operand(num_rows, num_k, w):
    dtype = np.uint16 if MULTIPLIES_PAIRS and w.dtype == types.uint32 else np.float32
    least = LEAST_ROWS
    return lambda num_rows, num_k, w: empty((max(num_rows, least), num_k), dtype)


@allocating_jit
def products():
    """Where `multiply` puts what it finds: fp32 [*, 32], from row HEAD on."""
    return empty((HEAD + max(amx.ROWS, panel.ROWS), PANEL), np.float32)


def multiply(x, m, num_m, num_k, w, i, found):
    """Rows m, m + 1, ... of the first `num_m` of x, as many as it takes at once, times panel i of w [P, >= K', 32].

    x is an `operand`, or like one; `num_k`, at most its width, is K. Asks for the next panel.
    """


@overload(multiply)
def _multiply(x, m, num_m, num_k, w, i, found):
    def matrices(x, m, num_m, num_k, w, i, found):
        at, size = i * w.shape[1] * w.shape[2], w.shape[1] * w.shape[2]
        amx.multiply_rows(x, m, num_m, num_k, w, at, at + size, found, None)

    step = 2 if w.dtype == types.uint32 else 1

    def vectors(x, m, num_m, num_k, w, i, found):
        at, size, width = i * w.shape[1] * w.shape[2], w.shape[1] * w.shape[2], x.shape[1]
        done, count = 0, min(panel.ROWS, num_m - m)
        while done < count:
            start, row = (m + done) * width, (HEAD + done) * PANEL
            left = count - done
            done += panel.multiply_rows(left, x, start, width, w, at, at + size, num_k // step, found, row)

    return matrices if by_matrices(w) else vectors


def multiply_gating(x, m, num_m, num_k, w, i, found, waiting):
    """`multiply`, and `put_gated_rows(*waiting)` of other products, unless they are no rows."""


@overload(multiply_gating)
def _multiply_gating(x, m, num_m, num_k, w, i, found, waiting):
    def matrices(x, m, num_m, num_k, w, i, found, waiting):
        at, size = i * w.shape[1] * w.shape[2], w.shape[1] * w.shape[2]
        amx.multiply_rows(x, m, num_m, num_k, w, at, at + size, found, waiting)

    def vectors(x, m, num_m, num_k, w, i, found, waiting):
        if waiting[2] > 0:
            put_gated_rows(*waiting)
        multiply(x, m, num_m, num_k, w, i, found)

    return matrices if by_matrices(w) else vectors
