"""Correctness in `bench kernels` of the ops besides experts and attention; see `checks`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from expertwire.bench.kernels.checks import EXACT, ROUNDED, Findings, differing, error, item, poisoned
from expertwire.bench.kernels.measure import Item, TensorRng
from expertwire.kernels import formats
from expertwire.kernels.gpu import combine as gpu_combine
from expertwire.kernels.gpu import grouped_gemm_tiles
from expertwire.kernels.gpu import linear as gpu_linear
from expertwire.kernels.gpu import permute as gpu_permute
from expertwire.kernels.gpu import quantize as gpu_quantize
from expertwire.kernels.gpu import rms_norm as gpu_rms_norm
from expertwire.kernels.gpu import rope_and_cache as gpu_rotate
from expertwire.kernels.gpu import routing as gpu_routing
from expertwire.kernels.gpu import sampling as gpu_sampling
from expertwire.kernels.gpu import sigmoid_mul as gpu_sigmoid_mul
from expertwire.kernels.ops import (
    attention,
    combine,
    linear,
    permute,
    quantize,
    rms_norm,
    rotary,
    routing,
    sampling,
    sigmoid_mul,
)
from expertwire.kernels.ops.variants import ExpertGroups, Rope, Routing


def routing_check(rng: TensorRng, rule: str, num_tokens: int) -> Findings:
    """Check ids exactly, weights nearly, then the order of the rows exactly."""
    num_experts, top_k = (16, 4) if rng.tiny else (256, 8)
    rules: dict[str, dict[str, Any]] = {
        "softmax": {"renormalize": True},
        "sigmoid": {"renormalize": False, "score": "sigmoid"},
        "sqrt_softplus": {"renormalize": True, "score": "sqrt_softplus"},
        "V2": {"renormalize": False, "groups": ExpertGroups(number=8, kept=3, by="best")},
        "V3": {
            "renormalize": True,
            "score": "sigmoid",
            "groups": ExpertGroups(number=8, kept=4, by="two_best"),
            "scale": 2.5,
        },
    }
    bias = rng.uniform(0, 0.1, num_experts) if rule in ("sqrt_softplus", "V3") else None
    arguments = Routing(top_k=top_k, **rules[rule]), bias
    logits = rng.normal(num_tokens, num_experts, dtype=torch.float32)
    with poisoned():
        ids, weights = gpu_routing.route(logits, *arguments)
        placed = gpu_permute.permute(ids, num_experts // 2, format="dense")
    expected_ids, expected = routing.reference(logits, *arguments)
    wanted = permute.reference(ids, num_experts // 2)
    tokens = grouped_gemm_tiles.token_tile("dense", ids.numel(), num_experts // 2)
    cut = permute.tile_reference(wanted.expert_offsets, ids.numel(), tokens)
    num_tiles = int(cut.first_tile[-1])
    assert placed.tile_map is not None
    # Where scores are compared, not logits, a last bit may let two experts change places.
    return {
        "ids": (differing(ids, expected_ids), max(2e-3, 2 / ids.numel())),
        "weights": (error(weights, expected), 1e-3),
        **{
            name: (differing(getattr(placed, name), getattr(wanted, name)), 0.0)
            for name in ("expert_offsets", "row_index_N", "home_N")
        },
        "first tiles": (differing(placed.tile_map.first_tile, cut.first_tile), 0.0),
        "experts of tiles": (differing(placed.tile_map.tile_expert[:num_tiles], cut.tile_expert[:num_tiles]), 0.0),
    }  # fmt: skip


def linear_check(rng: TensorRng, num_tokens: int) -> Findings:
    """Check a bias, fp32 results, fp32 weights in three terms, and FP8 weights beside what they unpack to."""
    N, D = (80, 64) if rng.tiny else (5120, 2048)
    x, bias = rng.normal(num_tokens, D), rng.normal(N)
    weight = rng.normal(N, D, scale=D**-0.5)
    wide = rng.normal(256 if N > 256 else N, D, scale=D**-0.5, dtype=torch.float32)
    found = {}
    with poisoned():
        y = gpu_linear.prepare(weight, bias, device=rng.gpu)(x)
        logits = gpu_linear.prepare(weight, device=rng.gpu, out_dtype=torch.float32)(x)
        exact = gpu_linear.prepare(wide, device=rng.gpu, x_dtype=x.dtype, out_dtype=torch.float32)(x)
        for format in formats.GPU_LINEAR_FORMATS:
            packed = formats.quantize(format, weight)
            unpacked = gpu_linear.prepare(formats.dequantize(packed, x.dtype), device=rng.gpu)(x)
            kept = gpu_linear.prepare(packed, device=rng.gpu, dtype=x.dtype)(x)
            found[format] = differing(kept, unpacked), 0.0
    found["bias"] = error(y, linear.reference(x.float(), weight.float(), bias)), ROUNDED
    found["fp32 result"] = error(logits, linear.reference(x.float(), weight.float())), EXACT
    found["fp32 weight"] = error(exact, x.double() @ wide.double().T), EXACT
    return found


def warm_linear(rng: TensorRng, num_tokens: int) -> None:
    """Launch the kernels of `linear_check`."""
    x, bias, weight = rng.normal(num_tokens, 2048), rng.normal(5120), rng.normal(5120, 2048)
    wide = rng.normal(256, 2048, dtype=torch.float32)
    gpu_linear.prepare(weight, bias, device=rng.gpu)(x)
    gpu_linear.prepare(weight, device=rng.gpu, out_dtype=torch.float32)(x)
    gpu_linear.prepare(wide, device=rng.gpu, x_dtype=x.dtype, out_dtype=torch.float32)(x)
    for format in formats.GPU_LINEAR_FORMATS:
        gpu_linear.prepare(formats.quantize(format, weight), device=rng.gpu, dtype=x.dtype)(x)


def norm_check(rng: TensorRng, num_tokens: int) -> Findings:
    """Check the norm, the residual sum, fp8 in groups, the activation, and combine."""
    # The interpreter's conversion to fp8 is wrong: there, values stay unrounded.
    dtype = torch.float32 if rng.tiny else torch.float8_e4m3fn
    D = 256 if rng.tiny else 7168
    x, delta, weight = rng.normal(num_tokens, D), rng.normal(num_tokens, D), rng.normal(D)
    with poisoned():
        y = gpu_rms_norm.rms_norm(x, weight, 1e-6)
        summed, normed = gpu_rms_norm.add_rms_norm(x, delta, weight, 1e-6)
        quantized = gpu_quantize.quantize(x, dtype=dtype)
        hidden = gpu_quantize.silu_mul(torch.cat((x, delta), -1))
        gated = gpu_sigmoid_mul.sigmoid_mul(x[:, None], delta[:, None])
    total, expected = rms_norm.add_reference(x, delta, weight, 1e-6)
    rows, weights = rng.normal(num_tokens, 4, D), rng.uniform(0, 1, num_tokens, 4)
    with poisoned():
        mixed = gpu_combine.combine(rows, weights, delta)
    # Rounding to fp8 changes a number by up to 6 %, by a little over 2 % on average.
    return {
        "norm": (error(y, rms_norm.reference(x, weight, 1e-6)), ROUNDED),
        "sum": (differing(summed, total), 0.0),
        "norm of sum": (error(normed, expected), ROUNDED),
        "fp8": (error(quantize.dequantize(quantized), x), 0.04),
        "silu_mul": (error(hidden, F.silu(x.float()) * delta.float()), ROUNDED),
        "sigmoid_mul": (error(gated, sigmoid_mul.reference(x.float()[:, None], delta.float()[:, None])), ROUNDED),
        "combine": (differing(mixed, combine.reference(rows, weights, delta)), 0.0),
    }


def rotate_check(rng: TensorRng, num_tokens: int) -> Findings:
    """Check both layouts of pairs, norms of the heads, and what is stored in the caches."""
    H, G, d, block = (4, 2, 32, 16) if rng.tiny else (32, 4, 128, 16)
    tables = rotary.tables(512, Rope(theta=1e4, size=d), rng.device)
    qkv, norm = rng.normal(num_tokens, H + 2 * G, d), rng.normal(H + G, d)
    positions = rng.integers(0, 512, num_tokens, dtype=torch.int64)
    slots = torch.randperm(2 * num_tokens, generator=rng.generator, device=rng.device)[:num_tokens]
    found = {}
    for interleaved in (False, True):
        shape = (-(-2 * num_tokens // block), block, G, d)
        caches = [[torch.full(shape, 7.0, dtype=rng.dtype, device=rng.device) for _ in "kv"] for _ in "01"]
        step = (qkv, norm, 1e-6, rotary.RopeInputs(tables, positions, slots, interleaved))
        with poisoned():
            q = gpu_rotate.rope_and_cache(*step, *caches[0])
        expected = attention.rope_and_cache(*step, *caches[1])
        name = "pairs" if interleaved else "halves"
        found[f"{name} q"] = error(q, expected), ROUNDED
        for which, ours, theirs in zip("kv", *caches, strict=True):
            found[f"{name} {which}"] = error(ours, theirs), ROUNDED
    return found


def sampling_check(rng: TensorRng, num_rows: int) -> Findings:
    """Check the tokens of rows with all kinds of rules.

    Sums of fp64 and of integers may differ at a boundary.
    """
    vocab = 700 if rng.tiny else 151936
    logits = rng.normal(num_rows, vocab, dtype=torch.float32, scale=3)
    kinds = [(0.0, -1, 1.0, 0.0), (1.0, -1, 1.0, 0.0), (0.7, 20, 1.0, 0.0), (1.3, -1, 0.8, 0.0), (0.9, 40, 0.9, 0.05)]
    chosen = [kinds[i % len(kinds)] for i in range(num_rows)]
    dtypes = (torch.float32, torch.int64, torch.float32, torch.float32)
    temperature, top_k, top_p, min_p = (
        torch.tensor(values, dtype=dtype).to(rng.device)
        for values, dtype in zip(zip(*chosen, strict=True), dtypes, strict=True)
    )
    counters = [rng.integers(0, 2**31 - 1, num_rows, dtype=torch.int64) for _ in range(3)]
    with poisoned():
        tokens = gpu_sampling.sample(logits, sampling.Draws(temperature, top_k, top_p, min_p, *counters))
    drawn = torch.from_numpy(sampling.uniform(*(counter.cpu().numpy() for counter in counters))).to(rng.device)
    expected = sampling.reference(logits, temperature, top_k, top_p, min_p, drawn)
    return {"tokens": (differing(tokens, expected), 0.02)}


def items(quick: bool, tiny: bool) -> list[Item]:
    """Return the items of the suite."""
    rules = ("V3",) if tiny else ("softmax", "sigmoid", "sqrt_softplus", "V2", "V3")
    sizes = (5,) if tiny else (1, 128) if quick else (1, 16, 128, 300, 4096)
    found = [item(f"routing {rule} T{n}", routing_check, None, rule, n) for rule in rules for n in sizes]
    for n in sizes:
        found.append(item(f"linear T{n}", linear_check, warm_linear, n))
        found.append(item(f"norm T{n}", norm_check, None, n))
        found.append(item(f"rotate T{n}", rotate_check, None, n))
    return [*found, item("sampling", sampling_check, None, 5 if tiny else 128)]
