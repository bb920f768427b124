"""Mamba's selective scan on a CPU, on one thread: token by token, in vectors of channels.

A piece is computed for some channels at a time, whose states stay in the cache nearest to the core. A channel's numbers depend on
no other channel, and its tokens follow each other, so its bits do not depend on how steps cut a sequence.

T tokens, D width of the rows (the channels), N numbers of the state for each channel, B blocks, S sequences, W entries of a block
table, H = 1 head that holds all channels.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from expertwire.kernels.cpu._llvm import allocating_jit, as_array, decay_factor, empty, exp, jit, load, round_like
from expertwire.kernels.cpu.recurrent import begin_state, next_piece, steps
from expertwire.kernels.ops.recurrent import StateMetadata
from expertwire.kernels.ops.selective_scan import ScanWeights

_CHANNELS = 256  # at once: 16 KiB of states of 16 numbers


@jit
def _softplus(x):
    """Return log(1 + e^x) without a call, so that loops vectorise.

    log(1 + r) = 2 atanh(s) with s = r / (2 + r) <= 1/3, by its series to s^15.
    """
    r = exp(-abs(x))
    s = r / (np.float32(2) + r)
    q = s * s
    p = np.float32(1 / 15)
    p = p * q + np.float32(1 / 13)
    p = p * q + np.float32(1 / 11)
    p = p * q + np.float32(1 / 9)
    p = p * q + np.float32(1 / 7)
    p = p * q + np.float32(1 / 5)
    p = p * q + np.float32(1 / 3)
    p = p * q + np.float32(1)
    return max(x, np.float32(0)) + np.float32(2) * s * p


@jit
def _begin_token(x_D, dt_D, dt_bias_D, skip_D, step_D, input_D, sum_D):
    for i in range(len(sum_D)):
        x, step = load(x_D[i]), _softplus(load(dt_D[i]) + dt_bias_D[i])
        step_D[i], input_D[i], sum_D[i] = step, step * x, skip_D[i] * x


@jit
def _advance(A_D, write, read, step_D, input_D, state_D, sum_D):
    """Let one number of each channel's state move on, and add what the output reads of it."""
    for i in range(len(sum_D)):
        state = decay_factor(step_D[i] * A_D[i]) * state_D[i] + write * input_D[i]
        state_D[i] = state
        sum_D[i] += read * state


@jit
def _store(sum_D, y_D):
    for i in range(len(sum_D)):
        y_D[i] = round_like(sum_D[i], y_D[i])


@jit
def _piece(x_TD, dt_TD, B_TN, C_TN, A_ND, skip_D, dt_bias_D, state_ND, scratch, y_TD):
    """Compute a piece's tokens; `state_ND` becomes the state after them."""
    for first in range(0, x_TD.shape[1], _CHANNELS):
        last = min(first + _CHANNELS, x_TD.shape[1])
        step_D, input_D, sum_D = scratch[0, : last - first], scratch[1, : last - first], scratch[2, : last - first]
        for t in range(len(x_TD)):
            rows = x_TD[t, first:last], dt_TD[t, first:last], dt_bias_D[first:last], skip_D[first:last]
            _begin_token(*rows, step_D, input_D, sum_D)
            for n in range(len(A_ND)):
                factors = A_ND[n, first:last], load(B_TN[t, n]), load(C_TN[t, n])
                _advance(*factors, step_D, input_D, state_ND[n, first:last], sum_D)
            _store(sum_D, y_TD[t, first:last])


@allocating_jit
def _scan(x_TD, dt_TD, B_TN, C_TN, A_ND, skip_D, dt_bias_D, state_BHND, steps, y_TD):
    cu_seqlens_q, seq_lens_S, table_SW, every = steps
    scratch = empty((3, _CHANNELS), np.float32)
    for b in range(len(seq_lens_S)):
        row, length = np.int64(cu_seqlens_q[b]), np.int64(seq_lens_S[b])
        start = length - (cu_seqlens_q[b + 1] - row)
        while start < length:
            end, source, target = next_piece(table_SW[b], start, length, every)
            last = row + end - start
            begin_state(state_BHND, source, target)
            rows = x_TD[row:last], dt_TD[row:last], B_TN[row:last], C_TN[row:last]
            _piece(*rows, A_ND, skip_D, dt_bias_D, state_BHND[target, 0], scratch, y_TD[row:last])
            row, start = last, end


def selective_scan(
    x_TD: Tensor,
    dt_TD: Tensor,
    B_TN: Tensor,
    C_TN: Tensor,
    weights: ScanWeights,
    state_BND: Tensor,
    states: StateMetadata,
) -> Tensor:
    """As `kernels.ops.selective_scan.SelectiveScan`."""
    w = weights
    assert all(x.is_contiguous() and x.dtype == torch.float32 for x in (w.A_ND, state_BND)), "states and A"
    y_TD = x_TD.new_empty(x_TD.shape)
    rows = (x.contiguous() for x in (x_TD, dt_TD, B_TN, C_TN))
    inputs = *rows, w.A_ND, w.skip_D, w.dt_bias_D, state_BND[:, None]
    _scan(*(as_array(tensor) for tensor in inputs), steps(states), as_array(y_TD))
    return y_TD
