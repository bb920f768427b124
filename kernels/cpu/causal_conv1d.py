"""The causal convolution on a CPU, token by token, in one pass over memory.

A channel's sum runs over the taps in order, so its bits do not depend on how steps cut a sequence.

T tokens, D width of the rows (the channels), K taps, B blocks of the state cache, S sequences, W entries of a block table.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from expertwire.kernels.cpu._llvm import (
    allocating_jit,
    as_array,
    as_rows,
    copy_row,
    empty,
    jit,
    load,
    round_like,
)
from expertwire.kernels.cpu.elementwise import silu
from expertwire.kernels.cpu.recurrent import next_piece, steps
from expertwire.kernels.ops.recurrent import StateMetadata


@jit
def _begin_sum(bias_D, weight_D, x_D, sum_D):
    if len(bias_D) > 0:
        for i in range(len(sum_D)):
            sum_D[i] = load(bias_D[i]) + load(weight_D[i]) * x_D[i]
    else:
        for i in range(len(sum_D)):
            sum_D[i] = load(weight_D[i]) * x_D[i]


@jit
def _add_tap(weight_D, x_D, sum_D):
    for i in range(len(sum_D)):
        sum_D[i] += load(weight_D[i]) * x_D[i]


@jit
def _store_silu(sum_D, y_D):
    for i in range(len(sum_D)):
        y_D[i] = round_like(silu(sum_D[i]), y_D[i])


@jit
def _piece(x_TD, first, last, weight_KD, bias_D, tail_BkD, source, target, window_KD, sum_D, y_TD):
    """Compute tokens `first` to `last`, a piece; `window_KD` holds the inputs that the taps see, position p in row p % K."""
    taps = len(weight_KD)
    for k in range(taps - 1):
        if source >= 0:
            copy_row(tail_BkD[source, k], window_KD[k])
        else:
            window_KD[k] = 0
    for t in range(last - first):
        at = (first + t) * x_TD.stride
        copy_row(x_TD.numbers[at : at + x_TD.width], window_KD[(t + taps - 1) % taps])
        _begin_sum(bias_D, weight_KD[0], window_KD[t % taps], sum_D)
        for k in range(1, taps):
            _add_tap(weight_KD[k], window_KD[(t + k) % taps], sum_D)
        _store_silu(sum_D, y_TD[first + t])
    for k in range(taps - 1):
        copy_row(window_KD[(last - first + k) % taps], tail_BkD[target, k])


@allocating_jit
def _causal_conv1d(x_TD, weight_KD, bias_D, tail_BkD, steps, y_TD):
    cu_seqlens_q, seq_lens_S, table_SW, every = steps
    window_KD, sum_D = empty(weight_KD.shape, np.float32), empty((weight_KD.shape[1],), np.float32)
    for b in range(len(seq_lens_S)):
        first, length = np.int64(cu_seqlens_q[b]), np.int64(seq_lens_S[b])
        start = length - (cu_seqlens_q[b + 1] - first)
        while start < length:
            end, source, target = next_piece(table_SW[b], start, length, every)
            last = first + end - start
            _piece(x_TD, first, last, weight_KD, bias_D, tail_BkD, source, target, window_KD, sum_D, y_TD)
            first, start = last, end


def causal_conv1d(
    x_TD: Tensor, weight_DK: Tensor, bias_D: Tensor | None, tail_BkD: Tensor, states: StateMetadata
) -> Tensor:
    """As `kernels.ops.causal_conv1d.CausalConv1d`."""
    assert tail_BkD.is_contiguous(), f"strides {tail_BkD.stride()} of tails"
    assert tail_BkD.dtype == x_TD.dtype, f"tails {tail_BkD.dtype} of inputs {x_TD.dtype}"
    y_TD, bias_D = x_TD.new_empty(x_TD.shape), weight_DK.new_empty(0) if bias_D is None else bias_D
    weight_KD = weight_DK.detach().t().contiguous()
    arrays = (as_array(tensor) for tensor in (weight_KD, bias_D.detach(), tail_BkD))
    _causal_conv1d(as_rows(x_TD), *arrays, steps(states), as_array(y_TD))
    return y_TD
