"""Norms, activation and combine on a CPU, each in one pass over memory, where torch takes several.

Tokens are independent and the order of operations within a token is fixed, so its bits do not depend on the batch.

T tokens, H heads, d head size, D model width, F expert width, K experts of a token, N rows, R rows of
the experts' outputs.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from expertwire.kernels.cpu._llvm import (
    add_row,
    add_scaled_row,
    allocating_jit,
    as_array,
    as_rows,
    copy_row,
    empty,
    exp,
    jit,
    load,
    rms_scale,
    round_like,
    scale_row,
)


@jit
def _rms_norm(x_TD: np.ndarray, weight_D: np.ndarray, eps: float, y_TD: np.ndarray) -> None:
    for t in range(len(x_TD)):
        scale_row(x_TD[t], rms_scale(x_TD[t], eps), weight_D, y_TD[t])


@jit
def add_rms_norm_rows(
    x_TD: np.ndarray, delta_TD: np.ndarray, weight_D: np.ndarray, eps: float, sum_TD: np.ndarray, y_TD: np.ndarray
) -> None:
    for t in range(x_TD.shape[0]):
        add_row(x_TD[t], delta_TD[t], sum_TD[t])
        scale_row(sum_TD[t], rms_scale(sum_TD[t], eps), weight_D, y_TD[t])


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """As `kernels.ops.rms_norm.RmsNorm`."""
    assert x_TD.stride(1) == 1, f"strides {x_TD.stride()} of shape {tuple(x_TD.shape)}"
    y_TD = torch.empty_like(x_TD)
    _rms_norm(as_array(x_TD), as_array(weight_D), eps, as_array(y_TD))
    return y_TD


def add_rms_norm(x_TD: Tensor, delta_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As `kernels.ops.rms_norm.AddRmsNorm`."""
    assert x_TD.stride(1) == 1, f"strides {x_TD.stride()} of shape {tuple(x_TD.shape)}"
    sum_TD, y_TD = torch.empty_like(x_TD), torch.empty_like(x_TD)
    add_rms_norm_rows(as_array(x_TD), as_array(delta_TD), as_array(weight_D), eps, as_array(sum_TD), as_array(y_TD))
    return sum_TD, y_TD


@jit
def silu(x: float) -> float:
    """Return x / (1 + e^-x) in fp32."""
    # e^-x leaves the range of exp only where silu is zero.
    return x / (np.float32(1) + exp(min(-x, np.float32(88.0))))


@jit
def _gate_row(gate: np.ndarray, x: np.ndarray, y: np.ndarray) -> None:
    """`y = silu(gate) * x`, of fp32 rows; the loop is in vectors only if y is another row."""
    for i in range(len(x)):
        y[i] = round_like(silu(gate[i]) * x[i], y[i])


@allocating_jit
def _gated_rms_norm(x_TD, z_TD, weight_D, eps, group_size, gate_first, y_TD):
    width = len(weight_D)
    row_D, gate_D, gated_D = (empty((width,), np.float32), empty((width,), np.float32), empty((width,), np.float32))
    for t in range(len(x_TD)):
        at = t * z_TD.stride
        copy_row(x_TD[t], row_D)
        copy_row(z_TD.numbers[at : at + width], gate_D)
        if gate_first:
            _gate_row(gate_D, row_D, gated_D)
        for g in range(0, width, group_size):
            end = g + group_size
            if gate_first:
                scale_row(gated_D[g:end], rms_scale(gated_D[g:end], eps), weight_D[g:end], y_TD[t, g:end])
            else:
                scale_row(row_D[g:end], rms_scale(row_D[g:end], eps), weight_D[g:end], row_D[g:end])
        if not gate_first:
            _gate_row(gate_D, row_D, y_TD[t])


def gated_rms_norm(
    x_TD: Tensor, z_TD: Tensor, weight_D: Tensor, eps: float, group_size: int, gate_first: bool
) -> Tensor:
    """As `kernels.ops.gated_rms_norm.GatedRmsNorm`."""
    assert weight_D.shape[0] == x_TD.shape[1], f"{tuple(weight_D.shape)} weights for {tuple(x_TD.shape)}"
    assert x_TD.shape[1] % group_size == 0, f"groups of {group_size} in rows of {x_TD.shape[1]}"
    y_TD = x_TD.new_empty(x_TD.shape)
    x, weight, y = (as_array(tensor.detach()) for tensor in (x_TD.contiguous(), weight_D, y_TD))
    _gated_rms_norm(x, as_rows(z_TD.detach()), weight, eps, group_size, gate_first, y)
    return y_TD


@jit
def silu_mul_of(gate: float, up: float, like: float) -> float:
    """Return silu(gate) * up of fp32 products, every intermediate rounded to `like`'s type, as the result."""
    gate, up = load(round_like(gate, like)), load(round_like(up, like))
    return round_like(load(round_like(silu(gate), like)) * up, like)


@jit
def silu_mul_row(gate_up: np.ndarray, out: np.ndarray, like: float) -> None:
    """Apply `silu_mul_of` to a row; `out` has its own type."""
    width = len(out)
    for i in range(width):
        out[i] = round_like(load(silu_mul_of(load(gate_up[i]), load(gate_up[i + width]), like)), out[i])


@jit
def silu_mul_rows(gate_up_NF: np.ndarray, out_NF: np.ndarray) -> None:
    for n in range(out_NF.shape[0]):
        silu_mul_row(gate_up_NF[n], out_NF[n], out_NF[n, 0])


def silu_mul(gate_up_NF: Tensor) -> Tensor:
    """As `kernels.ops.experts.SiluMul`."""
    out_NF = gate_up_NF.new_empty(gate_up_NF.shape[0], gate_up_NF.shape[1] // 2)
    silu_mul_rows(as_array(gate_up_NF), as_array(out_NF))
    return out_NF


@jit
def relu2_rows(x_NF: np.ndarray) -> None:
    """Square the positive numbers of rows, in place, and let the others be zero."""
    for n in range(x_NF.shape[0]):
        for i in range(x_NF.shape[1]):
            number = load(x_NF[n, i])
            if number <= np.float32(0):  # not of NaN
                number = np.float32(0)
            x_NF[n, i] = round_like(number * number, x_NF[n, i])


@jit
def _combine(
    rows_RD: np.ndarray, place_TK: np.ndarray, weights_TK: np.ndarray, total: np.ndarray, out_TD: np.ndarray
) -> None:
    for t in range(out_TD.shape[0]):
        total[:] = np.float32(0)
        for k in range(weights_TK.shape[1]):
            add_scaled_row(rows_RD[place_TK[t, k]], weights_TK[t, k], total)
        copy_row(total, out_TD[t])


@allocating_jit
def combine_rows(rows_RD: np.ndarray, place_TK: np.ndarray, weights_TK: np.ndarray, out_TD: np.ndarray) -> None:
    """Combine rows; `place_TK` holds the rows of each token."""
    _combine(rows_RD, place_TK, weights_TK, empty((out_TD.shape[1],), np.float32), out_TD)


def combine(rows_TKD: Tensor, weights_TK: Tensor) -> Tensor:
    """As `kernels.ops.combine.reference`, bit for bit."""
    out_TD = torch.empty_like(rows_TKD[:, 0])
    place_TK = np.arange(weights_TK.numel()).reshape(weights_TK.shape)
    combine_rows(as_array(rows_TKD.flatten(0, 1)), place_TK, weights_TK.numpy(), as_array(out_TD))
    return out_TD


@jit
def _sigmoid(x: float) -> float:
    # e^-x leaves the range of exp only where the sigmoid is zero.
    return np.float32(1) / (np.float32(1) + exp(min(-x, np.float32(88.0))))


@jit
def sigmoid_mul_rows(x_THd: np.ndarray, gate_THd: np.ndarray, y_THd: np.ndarray) -> None:
    num_tokens, num_heads, dim = x_THd.shape
    for t in range(num_tokens):
        for h in range(num_heads):
            if gate_THd.shape[2] == 1:
                factor = _sigmoid(load(gate_THd[t, h, 0]))
                for i in range(dim):
                    y_THd[t, h, i] = round_like(load(x_THd[t, h, i]) * factor, y_THd[t, h, i])
            else:
                for i in range(dim):
                    factor = _sigmoid(load(gate_THd[t, h, i]))
                    y_THd[t, h, i] = round_like(load(x_THd[t, h, i]) * factor, y_THd[t, h, i])


def sigmoid_mul(x_THd: Tensor, gate_THd: Tensor) -> Tensor:
    """As `kernels.ops.sigmoid_mul.SigmoidMul`."""
    y_THd = torch.empty_like(x_THd)
    sigmoid_mul_rows(as_array(x_THd), as_array(gate_THd.contiguous()), as_array(y_THd))
    return y_THd
