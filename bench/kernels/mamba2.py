"""Mamba-2 in `bench kernels`: values beside the references, and bits of whole, chunked and decoded sequences.

T tokens, D width of rows, H heads, K taps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from expertwire.bench.kernels.checks import EXACT, ROUNDED, Findings, differing, error, item, poisoned
from expertwire.bench.kernels.measure import Bits, Item, TensorRng
from expertwire.kernels.gpu import causal_conv1d as gpu_conv
from expertwire.kernels.gpu import gated_rms_norm as gpu_norm
from expertwire.kernels.gpu import mamba2 as gpu_mamba2
from expertwire.kernels.ops import attention, causal_conv1d, gated_rms_norm, mamba2
from expertwire.kernels.ops.mamba2 import CHUNK, Mamba2Cache, Mamba2Weights
from expertwire.kernels.ops.recurrent import StateMetadata

_EVERY, _TAPS = 2 * CHUNK, 4
_GPU = gpu_conv.causal_conv1d, gpu_mamba2.mamba2
_REFERENCES = causal_conv1d.reference, mamba2.reference


@dataclass(frozen=True)
class _Layer:
    """Weights of the shape of Nemotron 3 Nano's, and the inputs of one sequence."""

    weights: Mamba2Weights
    weight_DK: Tensor
    bias_D: Tensor
    inputs_TD: Tensor
    dt_TH: Tensor

    @classmethod
    def random(cls, rng: TensorRng, length: int) -> _Layer:
        heads, groups, dim, size = (2, 1, 16, 16) if rng.tiny else (64, 8, 64, 128)
        shape = {"num_groups": groups, "head_dim": dim, "state_size": size}
        A_H, D_H, bias_H = -rng.uniform(0.1, 8, heads), rng.uniform(-1, 1, heads), rng.uniform(-4, 0, heads)
        weights = Mamba2Weights(A_H=A_H, D_H=D_H, dt_bias_H=bias_H, **shape)
        width = sum(weights.widths)
        conv = rng.normal(width, _TAPS, scale=0.5), rng.normal(width, scale=0.1)
        return cls(weights, *conv, rng.normal(length, width), rng.normal(length, heads))

    def run(self, ops: tuple[Any, Any], sizes: Sequence[int]) -> dict[str, Tensor]:
        """Compute the sequence in steps of these sizes; return outputs and what the blocks hold last."""
        x, weights, heads = self.inputs_TD, self.weights, self.weights.A_H.shape[0]
        num = -(-len(x) // _EVERY)

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.full(shape, torch.nan, dtype=dtype, device=x.device)

        table = torch.arange(1, num + 1, dtype=torch.int32).to(x.device)[None]
        tail = empty(num + 1, _TAPS - 1, x.shape[1], dtype=x.dtype)
        cache = Mamba2Cache(
            empty(num + 1, heads, weights.state_size, weights.head_dim),
            empty(2, CHUNK, weights.stored_width, dtype=x.dtype),
            empty(2, CHUNK, heads),
        )
        convolved, y = [], []
        for start, end in pairwise([0, *accumulate(sizes)]):
            seqs = attention.describe([end - start], [end], table)
            states = StateMetadata(
                seqs=seqs, interval=_EVERY, chunk_blocks_S=torch.ones(1, dtype=torch.int32, device=x.device)
            )
            convolved.append(ops[0](x[start:end], self.weight_DK, self.bias_D, tail, states))
            y.append(ops[1](convolved[-1], self.dt_TH[start:end], weights, cache, states))
        joined = {"convolved": torch.cat(convolved), "y": torch.cat(y)}
        return joined | {"tails": tail[1:], "states": cache.state_BHNd[1:]}


def recurrence_check(rng: TensorRng, sizes: Sequence[int]) -> Findings:
    """Check a sequence in steps of these sizes."""
    layer = _Layer.random(rng, sum(sizes))
    with poisoned():
        found = layer.run(_GPU, sizes)
    expected = layer.run(_REFERENCES, sizes)
    # The recurrence of what our convolution has found: its rounding does not count.
    rows = iter(found["convolved"].split(list(sizes)))
    again = layer.run((lambda *_: next(rows), mamba2.reference), sizes)
    return {
        "convolved": (error(found["convolved"], expected["convolved"]), ROUNDED),
        "tails": (differing(found["tails"], expected["tails"]), 0.0),
        "y": (error(found["y"], again["y"]), ROUNDED),
        "states": (error(found["states"], again["states"]), EXACT),
    }


def gated_norm_check(rng: TensorRng, num_tokens: int) -> Findings:
    """Check the gated norms of Mamba-2 and of the gated delta net."""
    found = {}
    for name, width, group, gate_first in (("gate first", 4096, 512, True), ("norm first", 4096, 128, False)):
        width, group = (64, 32) if rng.tiny else (width, group)
        x, z, weight = rng.normal(num_tokens, width), rng.normal(num_tokens, width), rng.normal(width)
        rest = weight, 1e-5, group, gate_first
        with poisoned():
            y = gpu_norm.gated_rms_norm(x, z, *rest)
        found[name] = error(y, gated_rms_norm.reference(x, z, *rest)), ROUNDED
    return found


def recurrence_bits(rng: TensorRng) -> Mapping[str, Mapping[str, Tensor]]:
    """Compute a sequence whole, in chunks, and its end token by token."""
    length, num = (70, 8) if rng.tiny else (330, 80)
    layer = _Layer.random(rng, length)
    ways = {
        "whole": [length],
        "chunks": [length // 3, length // 2 - length // 3, length - length // 2],
        "decode": [length - num] + [1] * num,
    }
    runs = {name: layer.run(_GPU, sizes) for name, sizes in ways.items()}
    names = "convolved", "y", "tails", "states"
    return {name: {way: run[name].nan_to_num() for way, run in runs.items()} for name in names}


def check_items(quick: bool, tiny: bool) -> list[Item]:
    """Return the items that compare values."""
    steps = {"whole": [70], "steps": [40, 1, 29]} if tiny else {"whole": [700], "steps": [100, 1, 1, 90, 64, 300]}
    found: list[Item] = [item(f"mamba2 {name}", recurrence_check, None, sizes) for name, sizes in steps.items()]
    return [*found, item("gated norm", gated_norm_check, None, 5 if tiny else 128)]


def bits_items() -> list[Item]:
    """Return the item that compares bits."""
    return [Bits("mamba2", recurrence_bits)]
