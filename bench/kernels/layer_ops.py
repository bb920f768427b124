"""Timed items of `bench kernels` besides experts and attention: routing, sampling, dense layers, norms, combine.

T tokens, D model width, E experts, K of them a token, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from expertwire.bench.kernels.measure import Call, Item, TensorRng, Timed, TimedCalls, copies
from expertwire.bench.kernels.models import DEEPSEEK, GPT_OSS, QWEN3, Cost, Model, linear_cost
from expertwire.kernels.gpu import combine, linear, permute, quantize, rms_norm, rope_and_cache, routing, sampling
from expertwire.kernels.ops.rotary import RopeInputs
from expertwire.kernels.ops.sampling import Draws
from expertwire.kernels.ops.variants import ExpertGroups, Routing

VOCAB = 151936
DEEPSEEK_GROUPS = ExpertGroups(number=8, kept=4, by="two_best")
ROUTINGS = {
    DEEPSEEK.name: Routing(top_k=DEEPSEEK.top_k, renormalize=True, score="sigmoid", groups=DEEPSEEK_GROUPS, scale=2.5),
    QWEN3.name: Routing(top_k=QWEN3.top_k, renormalize=True),
    GPT_OSS.name: Routing(top_k=GPT_OSS.top_k, renormalize=True),
}
# outputs, inputs, bytes of an output
LINEARS = {
    "qkv": (5120, 2048, 2),
    "o": (2048, 4096, 2),
    "router": (128, 2048, 4),
    "lm head": (VOCAB, 2048, 4),
}


def routing_work(rng: TensorRng, model: Model, num_tokens: int) -> TimedCalls:
    """Time the choice of experts, the order of the rows and their tiles: from the router's logits to
    the first product.
    """
    calls = []
    for _ in range(1 if rng.is_meta else 8):
        logits = rng.normal(num_tokens, model.num_experts, dtype=torch.float32)
        bias = rng.uniform(0, 0.1, model.num_experts) if model is DEEPSEEK else None
        calls.append(_route(logits, bias, model))
    moved = num_tokens * (model.num_experts * 4 + model.top_k * 20)
    return TimedCalls(
        calls={"ours": calls}, cost=Cost(bytes=moved, flops=0), labels={"model": model.name, "tokens": num_tokens}
    )


def _route(logits: Tensor, bias: Tensor | None, model: Model) -> Call:
    load_E = torch.zeros(model.num_experts, dtype=torch.int64, device=logits.device)

    def call() -> Any:
        routed = routing.route_and_count(logits, ROUTINGS[model.name], bias, load_E=load_E)
        return permute.permute(routed.physical_TK, model.num_experts, format="dense"), routed.weights_TK

    return call


def sampling_work(rng: TensorRng, rule: str, num_rows: int) -> TimedCalls:
    """Time the sampling of rows that are all greedy, all drawn from everything, or all filtered;
    beside a sort by torch.
    """
    drawn, filtered = rule != "greedy", rule == "filtered"

    def column(value: float, dtype: torch.dtype) -> Tensor:
        return torch.full((num_rows,), value, dtype=dtype, device=rng.device)

    draws = Draws(
        column(0.8 if drawn else 0.0, torch.float32),
        column(50 if filtered else -1, torch.int64),
        column(0.9 if filtered else 1.0, torch.float32),
        column(0.0, torch.float32),
        *(rng.integers(0, 2**40, num_rows, dtype=torch.int64) for _ in range(3)),
    )
    moved = num_rows * VOCAB * 4
    calls: dict[str, list[Call]] = {"ours": []}
    for _ in range(1 if rng.is_meta else min(8, copies(moved))):
        logits = rng.normal(num_rows, VOCAB, dtype=torch.float32, scale=3)
        calls["ours"].append(_sample(logits, draws, drawn, filtered))
        if filtered:
            calls.setdefault("torch.sort", []).append(_sort(logits))
    labels = {"rule": rule, "rows": num_rows}
    return TimedCalls(
        calls=calls, cost=Cost(bytes=moved, flops=0), peers=frozenset({"torch.sort"}) & set(calls), labels=labels
    )


def _sample(logits: Tensor, draws: Draws, drawn: bool, filtered: bool) -> Call:
    return lambda: sampling.sample(logits, draws, drawn=drawn, filtered=filtered)


def _sort(logits: Tensor) -> Call:
    return lambda: logits.sort(dim=-1, descending=True)


def linear_work(rng: TensorRng, name: str, num_tokens: int) -> TimedCalls:
    """Time a dense layer of Qwen3-30B-A3B, and torch's product."""
    outputs, inputs, out_bytes = LINEARS[name]
    out_dtype = torch.float32 if out_bytes == 4 else None
    calls: dict[str, list[Call]] = {"ours": []}
    x = rng.normal(num_tokens, inputs)
    for _ in range(1 if rng.is_meta else copies(2 * inputs * outputs)):
        weight = rng.normal(outputs, inputs, scale=inputs**-0.5)
        calls["ours"].append(_apply(linear.prepare(weight, device=rng.gpu, out_dtype=out_dtype), x))
        if not rng.is_meta:
            calls.setdefault("torch linear", []).append(_torch_linear(weight, x))
    cost = linear_cost(num_tokens, inputs, outputs, out_bytes)
    labels = {"layer": name, "tokens": num_tokens}
    return TimedCalls(calls=calls, cost=cost, peers=frozenset({"torch linear"}) & set(calls), labels=labels)


def _apply(layer: Any, x: Tensor) -> Call:
    return lambda: layer(x)


def _torch_linear(weight: Tensor, x: Tensor) -> Call:
    return lambda: F.linear(x, weight)


def combine_work(rng: TensorRng, model: Model, num_tokens: int) -> TimedCalls:
    """Time the weighted sum of K rows a token."""
    K, D = model.top_k, model.D
    weights = rng.uniform(0, 1, num_tokens, K)
    moved = num_tokens * (K + 1) * D * 2
    number = 1 if rng.is_meta else min(8, copies(moved))
    calls = [_combine(rng.normal(num_tokens, K, D), weights) for _ in range(number)]
    return TimedCalls(
        calls={"ours": calls}, cost=Cost(bytes=moved, flops=0), labels={"model": model.name, "tokens": num_tokens}
    )


def _combine(rows: Tensor, weights: Tensor) -> Call:
    return lambda: combine.combine(rows, weights)


def norm_work(rng: TensorRng, num_tokens: int, D: int) -> TimedCalls:
    """Time the residual addition with its norm."""
    weight = rng.normal(D)
    calls: dict[str, list[Call]] = {"ours": []}
    for _ in range(1 if rng.is_meta else min(8, copies(num_tokens * D * 8))):
        x, delta = (rng.normal(num_tokens, D) for _ in range(2))
        calls["ours"].append(_norm(x, delta, weight))
        if not rng.is_meta:
            calls.setdefault("torch", []).append(_torch_norm(x, delta, weight))
    moved = num_tokens * D * 8
    labels = {"tokens": num_tokens, "D": D}
    return TimedCalls(
        calls=calls, cost=Cost(bytes=moved, flops=0), peers=frozenset({"torch"}) & set(calls), labels=labels
    )


def _norm(x: Tensor, delta: Tensor, weight: Tensor) -> Call:
    return lambda: rms_norm.add_rms_norm(x, delta, weight, 1e-6)


def _torch_norm(x: Tensor, delta: Tensor, weight: Tensor) -> Call:
    return lambda: F.rms_norm(x + delta, weight.shape, weight, 1e-6)


def quantize_work(rng: TensorRng, num_tokens: int, D: int) -> TimedCalls:
    """Time the quantisation to fp8 in groups of 128."""
    moved = num_tokens * D * 3
    number = 1 if rng.is_meta else min(8, copies(moved))
    calls = [_quantize(rng.normal(num_tokens, D)) for _ in range(number)]
    return TimedCalls(calls={"ours": calls}, cost=Cost(bytes=moved, flops=0), labels={"tokens": num_tokens, "D": D})


def _quantize(x: Tensor) -> Call:
    return lambda: quantize.quantize(x)


def rotate_work(rng: TensorRng, num_tokens: int) -> TimedCalls:
    """Time the rope and cache write of Qwen3-30B-A3B: norms of 36 heads, rotation, 4 key and value heads stored."""
    heads, kv_heads, dim, block = 32, 4, 128, 16
    tables = rng.uniform(-1, 1, 4096, dim), rng.uniform(-1, 1, 4096, dim)
    norm = rng.normal(heads + kv_heads, dim)
    positions = rng.integers(0, 4096, num_tokens, dtype=torch.int64)
    slots = torch.arange(num_tokens, device=rng.device)
    caches = [rng.normal(-(-num_tokens // block), block, kv_heads, dim) for _ in range(2)]
    qkv = rng.normal(num_tokens, heads + 2 * kv_heads, dim)
    inputs, moved = RopeInputs(tables, positions, slots), 2 * qkv.numel() * 2
    return TimedCalls(
        calls={"ours": [lambda: rope_and_cache.rope_and_cache(qkv, norm, 1e-6, inputs, *caches)]},
        cost=Cost(bytes=moved, flops=0),
        labels={"model": QWEN3.name, "tokens": num_tokens},
    )


def routing_items(quick: bool) -> list[Item]:
    """Return the items of the routing suite, that of the bar first."""
    found = [(DEEPSEEK, 128), (QWEN3, 128)] + ([] if quick else [(DEEPSEEK, 1), (DEEPSEEK, 4096), (GPT_OSS, 128)])
    return [_timed(f"route {model.name} T{tokens}", routing_work, model, tokens) for model, tokens in found]


def sampling_items(quick: bool) -> list[Item]:
    """Return the items of the sampling suite: rules and numbers of rows."""
    rows = (64,) if quick else (1, 64, 256)
    return [
        _timed(f"sample {rule} S{number}", sampling_work, rule, number)
        for number in rows
        for rule in ("filtered", "drawn", "greedy")
    ]


def other_items(quick: bool) -> list[Item]:
    """Return dense layers, and ops that memory alone bounds."""
    tokens = (1, 64, 4096) if quick else (1, 16, 64, 256, 1024, 4096)
    found: list[Item] = [
        _timed(f"linear {name} T{number}", linear_work, name, number)
        for number in tokens
        for name in LINEARS
        if name != "lm head" or number <= 256
    ]
    for number in (64,) if quick else (64, 4096):
        found += [
            _timed(f"combine {QWEN3.name} T{number}", combine_work, QWEN3, number),
            _timed(f"norm D2048 T{number}", norm_work, number, 2048),
            _timed(f"norm D7168 T{number}", norm_work, number, 7168),
            _timed(f"quantize D7168 T{number}", quantize_work, number, 7168),
            _timed(f"rotate {QWEN3.name} T{number}", rotate_work, number),
        ]
    return found


def _timed(key: str, work: Any, *arguments: Any) -> Timed:
    return Timed(key, lambda rng: work(rng, *arguments))
