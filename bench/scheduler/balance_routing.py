"""Routing for `bench balance`: two windows drawn from a power law, or recorded from the demo model.

L layers, T tokens, K experts a token, E experts, D model width.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import random

import numpy as np
from torch import Tensor

from expertwire.bench.serving.rank_model import RankModel
from expertwire.deploy import demo_task
from expertwire.kernels.ops.routing import Route
from expertwire.kernels.ops.variants import Routing

_CHUNK = 8192  # tokens drawn at a time
_LONGEST = 512  # of the demo task's texts, in tokens


def power_law(exponent: float, shape: tuple[int, int, int], num_experts: int, seed: int) -> np.ndarray:
    """Return routing drawn from a power law: i16 [2, L, T, K] for the `shape` [L, T, K].

    Each layer's experts have weights of density x ** -exponent on [1, 6553.6], as NVIDIA's
    aiconfigurator draws the loads of its "power_law_1.01" and "power_law_1.2" (collector/helper.py:
    up to 0.8 of its 8,192 tokens).
    """
    rng = np.random.default_rng(seed)
    top = 0.8 * 8192
    power = 1 - exponent
    layers = [
        _draw(((top**power - 1) * rng.random(num_experts) + 1) ** (1 / power), 2 * shape[1], shape[2], rng)
        for _ in range(shape[0])
    ]
    return np.stack(layers).reshape(shape[0], 2, *shape[1:]).swapaxes(0, 1)


def zipf(exponent: float, shape: tuple[int, int, int], num_experts: int, seed: int) -> np.ndarray:
    """Return routing as `power_law`, but the i-th likeliest expert has the weight i ** -exponent."""
    rng = np.random.default_rng(seed)
    weights_E = np.arange(1, num_experts + 1.0) ** -exponent
    layers = [_draw(rng.permutation(weights_E), 2 * shape[1], shape[2], rng) for _ in range(shape[0])]
    return np.stack(layers).reshape(shape[0], 2, *shape[1:]).swapaxes(0, 1)


def _draw(weights_E: np.ndarray, num_tokens: int, top_k: int, rng: np.random.Generator) -> np.ndarray:
    """Return the first K of exponential clocks to ring, which is drawing without replacement: i16 [T, K]."""
    pace_E = (weights_E.mean() / weights_E).astype(np.float32)
    chunks = []
    for start in range(0, num_tokens, _CHUNK):
        size = min(_CHUNK, num_tokens - start), len(weights_E)
        clocks_TE = rng.standard_exponential(size, dtype=np.float32) * pace_E
        chunks.append(np.argpartition(clocks_TE, top_k - 1, axis=1)[:, :top_k].astype(np.int16))
    return np.concatenate(chunks)


def recorded(num_tokens: int, seed: int) -> np.ndarray:
    """Return the demo model's routing of its task's problems and solutions: i16 [2, L, T, K]."""
    folder = str(importlib.resources.files("expertwire") / "demo_model")
    alone = RankModel(folder, max_tokens=_LONGEST)
    seen: list[np.ndarray] = []
    model = alone.model
    for i, layer in enumerate(model.layers):
        assert layer.moe is not None, f"layer {i} of the demo model is dense"
        router = dataclasses.replace(layer.moe.router, route=_recording(layer.moe.router.route, seen))
        moe = dataclasses.replace(layer.moe, router=router, block=None)
        model.layers[i] = dataclasses.replace(layer, moe=moe)
    word_ids = {word: i for i, word in enumerate(demo_task.WORDS)}
    rng, total = random.Random(seed), 0
    while total < 2 * num_tokens:
        kind = rng.choice(list(demo_task.SIZES))
        problem, solution = demo_task.make_example(kind, rng.choice(demo_task.SIZES[kind]), rng.randrange(1 << 30))
        ids = [word_ids[word] for word in f"{problem.prompt} {solution}".split()]
        alone.logits(ids)
        total += len(ids)
    num_layers = len(model.layers)
    ids_LTK = np.stack([np.concatenate(seen[i::num_layers])[: 2 * num_tokens] for i in range(num_layers)])
    return ids_LTK.reshape(num_layers, 2, num_tokens, -1).swapaxes(0, 1).astype(np.int16)


def _recording(route: Route, seen: list[np.ndarray]) -> Route:
    """Return `route`, which then also appends its choices to `seen`."""

    def record(logits_TE: Tensor, routing: Routing, bias_E: Tensor | None = None) -> tuple[Tensor, Tensor]:
        ids_TK, weights_TK = route(logits_TE, routing, bias_E)
        seen.append(ids_TK.numpy().copy())
        return ids_TK, weights_TK

    return record
