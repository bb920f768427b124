"""Correctness of the gated delta rule in `bench kernels`; see `checks`.

T tokens, D width of the rows, H heads of values, G heads of keys, d and v their sizes.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from expertwire.bench.kernels.checks import ROUNDED, Findings, differing, error, item, poisoned
from expertwire.bench.kernels.measure import Item, TensorRng
from expertwire.kernels.gpu.gated_delta_rule import gated_delta_rule
from expertwire.kernels.ops import attention
from expertwire.kernels.ops.gated_delta_rule import CHUNK, DeltaCache, GatedDeltaRule, reference
from expertwire.kernels.ops.recurrent import StateMetadata

_EVERY = 128  # positions of an interval


def gated_delta_check(rng: TensorRng, num_tokens: int) -> Findings:
    """Check a whole sequence, the bits of one that steps cut, and `fast` decodes among them."""
    G, H, d, v = (1, 2, 16, 32) if rng.tiny else (16, 32, 128, 128)
    inputs = [rng.normal(num_tokens, width) for width in (2 * G * d + H * v, H, H)]
    A_H, dt_bias_H = -rng.uniform(0.01, 4, H).float(), rng.uniform(-4, 0, H).float()
    intervals = -(-num_tokens // _EVERY)
    table = torch.arange(1, intervals + 1, dtype=torch.int32, device=rng.device)[None]

    def run(op: GatedDeltaRule, steps: list[int]) -> tuple[Tensor, Tensor]:
        """Return outputs [T, D] and the last state."""

        def empty(*shape: int) -> Tensor:
            return torch.full(shape, float("nan"), device=rng.device)

        cache = DeltaCache(
            empty(intervals + 1, H, d, v), empty(2, CHUNK, G, d), empty(2, CHUNK, H, v), empty(2, CHUNK, H)
        )
        outputs, done = [], 0
        for num in steps:
            seqs = attention.describe([num], [done + num], table)
            states = StateMetadata(seqs=seqs, interval=_EVERY, chunk_blocks_S=table[0, :1])
            qkv_TD, a_TH, b_TH = (x[done : done + num] for x in inputs)
            outputs.append(op(qkv_TD, a_TH, b_TH, A_H, dt_bias_H, cache, states))
            done += num
        return torch.cat(outputs), cache.state_BHdv[intervals]

    first = num_tokens // 2
    steps = [first, 1, 1, num_tokens - first - 5, 1, 1, 1]
    with poisoned():
        whole, state = run(gated_delta_rule, [num_tokens])
        cut, state_of_cut = run(gated_delta_rule, steps)
        fast, _ = run(partial(gated_delta_rule, fast=True), steps)
    expected, expected_state = run(reference, [num_tokens])
    return {
        "prefill": (error(whole, expected), ROUNDED),
        "state": (error(state, expected_state), ROUNDED),
        "bits of steps": (differing(cut, whole), 0.0),
        "bits of the state": (differing(state_of_cut, state), 0.0),
        "fast decodes": (error(fast, expected), ROUNDED),
    }


def check_items(quick: bool, tiny: bool) -> list[Item]:
    """Return the items of the suite; the reference computes token by token."""
    sizes = (70,) if tiny else (130,) if quick else (70, 130, 300)
    return [item(f"gated delta rule T{n}", gated_delta_check, None, n) for n in sizes]
