"""Timed items of `bench kernels`: the ops of recurrent mixers, at the shapes of real models.

A step's bytes are its rows, read and written, the states that it reads and, but for decodes of mixers in chunks, writes, and what
chunk caches hold of half a chunk; FLOPs are those of the chunked forms. T tokens, D width of rows, H heads, G groups or heads of
keys, d and v their sizes, N numbers of a state, K taps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from expertwire.bench.kernels.attention import sequences
from expertwire.bench.kernels.measure import Item, TensorRng, Timed, TimedCalls, copies
from expertwire.bench.kernels.models import Cost
from expertwire.kernels.gpu import (
    causal_conv1d,
    gated_delta_rule,
    gated_rms_norm,
    layer_norm,
    mamba2,
    selective_scan,
)
from expertwire.kernels.ops.gated_delta_rule import DeltaCache
from expertwire.kernels.ops.mamba2 import Mamba2Cache, Mamba2Weights
from expertwire.kernels.ops.recurrent import StateMetadata
from expertwire.kernels.ops.selective_scan import ScanWeights
from expertwire.kernels.ops.variants import CHUNK

_EVERY = 512  # the engine's default
# Queries and known tokens of each sequence.
STEPS = {
    "decode 64": [(1, 4096 + 37 * i) for i in range(64)],
    "decode 1": [(1, 4096)],
    "prefill 8k": [(8192, 8192)],
    "prefill 8 x 1k": [(1024, 1024)] * 8,
}
Prepared = tuple[Callable[[], Any], float, float]  # a call, its bytes and its FLOPs


def states_of(rng: TensorRng, step: str) -> tuple[StateMetadata, int, int]:
    """Return a step's metadata, the blocks of the state cache, and tokens. A sequence's chunk block is behind the null block."""
    batch = STEPS[step]
    seqs, blocks = sequences(rng, batch, _EVERY)
    chunks = rng.fixed(range(1, len(batch) + 1))
    return StateMetadata(seqs=seqs, interval=_EVERY, chunk_blocks_S=chunks), blocks, sum(num for num, _ in batch)


def _moved(step: str, rows: int, state: int, chunk: int) -> float:
    """Return the bytes of a step: `rows` of a token, `state` of a sequence, `chunk` of a whole chunk."""
    batch = STEPS[step]
    decodes = sum(num == 1 for num, _ in batch)
    intervals = sum(-(-num // _EVERY) for num, _ in batch if num > 1)
    return rows * sum(num for num, _ in batch) + decodes * (state + chunk // 2) + intervals * state


def _conv(rng: TensorRng, step: str) -> Prepared:
    """Prepare the convolution of Nemotron 3 Super."""
    width, taps = 10240, 4
    states, blocks, num = states_of(rng, step)
    x, weight, bias = rng.normal(num, width), rng.normal(taps, width).t(), rng.normal(width)
    tail = rng.normal(blocks, taps - 1, width)
    moved = _moved(step, 4 * width, 4 * (taps - 1) * width, 0)
    return lambda: causal_conv1d.causal_conv1d(x, weight, bias, tail, states), moved, 0.0


def _mamba2(rng: TensorRng, step: str) -> Prepared:
    """Prepare the recurrence of Nemotron 3 Super."""
    H, G, d, N = 128, 8, 64, 128
    states, blocks, num = states_of(rng, step)
    weights = Mamba2Weights(
        A_H=-rng.uniform(0.1, 8, H), D_H=rng.uniform(-1, 1, H), dt_bias_H=rng.uniform(-4, 0, H),
        num_groups=G, head_dim=d, state_size=N,
    )  # fmt: skip
    kept, sequences_ = weights.stored_width, len(STEPS[step])
    cache = Mamba2Cache(
        rng.normal(blocks, H, N, d, dtype=torch.float32),
        rng.normal(sequences_ + 1, CHUNK, kept),
        rng.uniform(0, 1, sequences_ + 1, CHUNK, H),
    )
    x, dt = rng.normal(num, sum(weights.widths)), rng.normal(num, H)
    moved = _moved(step, 2 * (x.shape[1] + H + H * d), 4 * H * N * d, CHUNK * (2 * kept + 4 * H))
    rows = CHUNK if num > len(STEPS[step]) else 1  # of a chunk that are computed
    flops = 2.0 * num * H * (rows * (N + d) + 2 * N * d)
    return lambda: mamba2.mamba2(x, dt, weights, cache, states), moved, flops


def _delta(rng: TensorRng, step: str) -> Prepared:
    """Prepare the gated delta rule of Qwen3-Next."""
    H, G, d, v = 32, 16, 128, 128
    states, blocks, num = states_of(rng, step)
    sequences_ = len(STEPS[step])

    def normal(*shape: int) -> Tensor:
        return rng.normal(*shape, dtype=torch.float32)

    cache = DeltaCache(
        normal(blocks, H, d, v), normal(sequences_ + 1, CHUNK, G, d), normal(sequences_ + 1, CHUNK, H, v),
        -rng.uniform(0, 1, sequences_ + 1, CHUNK, H),
    )  # fmt: skip
    qkv, a, b = (rng.normal(num, width) for width in (2 * G * d + H * v, H, H))
    A, bias = -rng.uniform(0.01, 4, H), rng.uniform(-4, 0, H)
    moved = _moved(step, 2 * (qkv.shape[1] + 2 * H + H * v), 4 * H * d * v, 4 * CHUNK * (G * d + H * v + H))
    rows = CHUNK if num > sequences_ else 1
    flops = 2.0 * num * H * (rows * (2 * d + 2 * v) + 3 * d * v)
    return lambda: gated_delta_rule.gated_delta_rule(qkv, a, b, A, bias, cache, states), moved, flops


def _scan(rng: TensorRng, step: str) -> Prepared:
    """Prepare the selective scan of Phi-4-mini-flash; its exponentials, not its products, are what it computes."""
    D, N = 5120, 16
    states, blocks, num = states_of(rng, step)
    weights = ScanWeights(
        A_ND=-rng.uniform(0.1, 8, N, D), skip_D=rng.uniform(-1, 1, D), dt_bias_D=rng.uniform(-4, 0, D)
    )
    x, dt, B, C = (rng.normal(num, width) for width in (D, D, N, N))
    state = rng.normal(blocks, N, D, dtype=torch.float32)
    moved = _moved(step, 2 * (3 * D + 2 * N), 8 * N * D, 0)
    return lambda: selective_scan.selective_scan(x, dt, B, C, weights, state, states), moved, 0.0


def _gated_norm(rng: TensorRng, step: str) -> Prepared:
    """Prepare the gated norm of Nemotron 3 Super."""
    num, width, group = sum(num for num, _ in STEPS[step]), 8192, 1024
    x, z, weight = rng.normal(num, width), rng.normal(num, width), rng.normal(width)
    return lambda: gated_rms_norm.gated_rms_norm(x, z, weight, 1e-5, group, True), 6.0 * x.numel(), 0.0


def _layer_norm(rng: TensorRng, step: str) -> Prepared:
    """Prepare the residual addition with its norm of Phi-4-mini-flash."""
    num, width = sum(num for num, _ in STEPS[step]), 2560
    x, delta, weight, bias = rng.normal(num, width), rng.normal(num, width), rng.normal(width), rng.normal(width)
    return lambda: layer_norm.add_layer_norm(x, delta, weight, bias, 1e-5), 8.0 * x.numel(), 0.0


OPS: dict[str, Callable[[TensorRng, str], Prepared]] = {
    "mamba2": _mamba2,
    "gated delta rule": _delta,
    "selective scan": _scan,
    "causal conv1d": _conv,
    "gated norm": _gated_norm,
    "layer norm": _layer_norm,
}


def work(rng: TensorRng, name: str, step: str) -> TimedCalls:
    """Time an op in a step, on copies of its caches and inputs that no cache of the device holds together."""
    call, moved, flops = OPS[name](rng, step)
    more = 0 if rng.is_meta else min(8, copies(moved)) - 1
    calls = [call, *(OPS[name](rng, step)[0] for _ in range(more))]
    return TimedCalls(calls={"ours": calls}, cost=Cost(bytes=moved, flops=flops), labels={"op": name, "step": step})


def items(quick: bool) -> list[Item]:
    """Return the items of the suite."""
    steps = list(STEPS)[::2] if quick else list(STEPS)
    return [_timed(name, step) for step in steps for name in OPS]


def _timed(name: str, step: str) -> Timed:
    return Timed(f"{name} {step}", lambda rng: work(rng, name, step))
