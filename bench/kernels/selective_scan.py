"""Correctness of Mamba's selective scan and of layer normalisation in `bench kernels`; see `checks`.

T tokens, D width of the rows (the channels), N numbers of the state for each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from expertwire.bench.kernels.checks import EXACT, ROUNDED, Findings, differing, error, item, poisoned
from expertwire.bench.kernels.measure import Item, TensorRng
from expertwire.kernels.gpu import layer_norm as gpu_layer_norm
from expertwire.kernels.gpu.selective_scan import selective_scan
from expertwire.kernels.ops import attention, layer_norm
from expertwire.kernels.ops.recurrent import StateMetadata
from expertwire.kernels.ops.selective_scan import ScanWeights, SelectiveScan, reference

_EVERY = 64  # positions of an interval


def scan_check(rng: TensorRng, num_tokens: int) -> Findings:
    """Check a whole sequence, and the bits of one that steps cut."""
    D, N = (24, 16) if rng.tiny else (5120, 16)
    inputs = [rng.normal(num_tokens, width) for width in (D, D, N, N)]
    weights = ScanWeights(
        A_ND=-rng.uniform(0.1, 8, N, D), skip_D=rng.uniform(-1, 1, D), dt_bias_D=rng.uniform(-4, 0, D)
    )
    intervals = -(-num_tokens // _EVERY)
    table = torch.arange(1, intervals + 1, dtype=torch.int32, device=rng.device)[None]

    def run(op: SelectiveScan, steps: list[int]) -> tuple[Tensor, Tensor]:
        """Return outputs [T, D] and all states."""
        state = torch.full((intervals + 1, N, D), float("nan"), device=rng.device)
        outputs, done = [], 0
        for num in steps:
            seqs = attention.describe([num], [done + num], table)
            states = StateMetadata(seqs=seqs, interval=_EVERY)
            x_TD, dt_TD, B_TN, C_TN = (rows[done : done + num] for rows in inputs)
            outputs.append(op(x_TD, dt_TD, B_TN, C_TN, weights, state, states))
            done += num
        return torch.cat(outputs), state[1:]

    first = num_tokens // 2
    with poisoned():
        whole, states = run(selective_scan, [num_tokens])
        cut, states_of_cut = run(selective_scan, [first, 1, 1, num_tokens - first - 3, 1])
    expected, expected_states = run(reference, [num_tokens])
    return {
        "y": (error(whole, expected), ROUNDED),
        "states": (error(states, expected_states), EXACT),
        "bits of steps": (differing(cut, whole), 0.0),
        "bits of the states": (differing(states_of_cut, states), 0.0),
    }


def layer_norm_check(rng: TensorRng, num_tokens: int) -> Findings:
    """Check the residual sum and its norm."""
    D = 40 if rng.tiny else 2560
    x, delta, weight, bias = rng.normal(num_tokens, D), rng.normal(num_tokens, D), rng.normal(D), rng.normal(D)
    with poisoned():
        total, y = gpu_layer_norm.add_layer_norm(x, delta, weight, bias, 1e-5)
    expected_total, expected = layer_norm.add_reference(x, delta, weight, bias, 1e-5)
    return {"sum": (differing(total, expected_total), 0.0), "norm": (error(y, expected), ROUNDED)}


def check_items(quick: bool, tiny: bool) -> list[Item]:
    """Return the items of the suite; the reference computes token by token."""
    sizes = (20,) if tiny else (130,) if quick else (70, 130, 300)
    found = [item(f"selective scan T{num}", scan_check, None, num) for num in sizes]
    return [*found, item("layer norm", layer_norm_check, None, 5 if tiny else 128)]
