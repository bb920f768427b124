"""Correctness in `bench kernels`: every kernel against its torch reference, on fresh random inputs,
into poisoned outputs.

Findings are |found - expected| / |expected| (Frobenius), which NaN never passes, or the share of
tokens or ids that differ.

H query heads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import deterministic

from expertwire.bench.kernels import attention as kernels_attention
from expertwire.bench.kernels import experts as kernels_experts
from expertwire.bench.kernels import reference_formats
from expertwire.bench.kernels.measure import Check, Item, TensorRng
from expertwire.bench.kernels.models import Model
from expertwire.kernels.gpu import block_scaled_mma, formats, grouped_gemm_tiles
from expertwire.kernels.gpu import mla as gpu_mla
from expertwire.kernels.gpu.formats import ExpertWeights
from expertwire.kernels.ops import attention, experts, mla
from expertwire.kernels.ops.experts import Activation

Findings = Mapping[str, tuple[float, float]]
FORMATS = ("dense", "fp8_block", "fp8_row", "int4", "mxfp4", "nvfp4")
ROUNDED, EXACT = 8e-3, 1e-4  # of results in bf16 or fp16, and in fp32


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill memory that has not been written yet with NaN, or the largest integer."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = deterministic  # a module whose attributes are properties
    filled = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        settings.fill_uninitialized_memory = filled


def error(found: Tensor, expected: Tensor) -> float:
    """Return the relative error in fp64; NaN if either has one, infinity if shapes differ."""
    if found.shape != expected.shape:
        return float("inf")
    distance = (found.double() - expected.double()).norm()
    return float(distance / expected.double().norm().clamp(min=1e-30))


def differing(found: Tensor, expected: Tensor) -> float:
    """Return the share of elements that differ."""
    if found.shape != expected.shape:
        return float("inf")
    return float((found != expected).double().mean()) if found.numel() else 0.0


def weights_and_plain(
    rng: TensorRng, format: str, e: int, M: int, K: int, *, gated: bool
) -> tuple[ExpertWeights, Tensor]:
    """Return random weights as the kernels read them, and fp32 [e, M, K], gate over up."""
    plain = rng.normal(e, M, K, scale=K**-0.5, dtype=torch.float32)
    if format == "dense":
        plain = plain.to(rng.dtype)
        return formats.dense(plain, gated=gated), plain.float()
    if format == "fp8_block":
        parts = [reference_formats.quantize_blocks(part) for part in plain.chunk(2 if gated else 1, dim=1)]
        data, scales = (torch.cat(column, dim=1) for column in zip(*parts, strict=True))
        return formats.fp8_block(data, scales, gated=gated), torch.cat(
            [reference_formats.dequantize_blocks(*part) for part in parts], dim=1
        )
    if format == "fp8_row":
        scales = plain.abs().amax(-1) / formats.FP8_MAX
        data = (plain / scales[..., None]).to(formats.FP8)
        return formats.fp8_row(data, scales, gated=gated), data.float() * scales[..., None]
    if format in formats.SCALED:
        numbers, scales = reference_formats.quantize_scaled(block_scaled_mma.KINDS[format][0], plain)
        weights = block_scaled_mma.pack(format, numbers, scales, gated=gated)
        return weights, reference_formats.dequantize_scaled(numbers, scales)
    codes = reference_formats.quantize_4bit(format, plain)
    return formats.pack4(format, *codes, gated=gated), reference_formats.dequantize_4bit(format, *codes)


def rows_and_plain(format: str, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return rows as the kernels read them, their scales, and fp32."""
    if format in formats.SCALED:
        numbers, scales = reference_formats.quantize_scaled(block_scaled_mma.KINDS[format][1], x)
        return reference_formats.pack_rows(numbers), scales, reference_formats.dequantize_scaled(numbers, scales)
    if not format.startswith("fp8"):
        return x, None, x.float()
    group = formats.BLOCK if format == "fp8_block" else x.shape[1]
    values, scales = reference_formats.quantize_rows(x, group)
    return (
        values,
        scales if format == "fp8_block" else scales[:, 0],
        reference_formats.dequantize_rows(values, scales, group),
    )


def experts_check(rng: TensorRng, format: str, kind: str, num_tokens: int) -> Findings:
    """Check both products, each against the loop over experts in fp32, for random, one-sided and sparse routing."""
    activation, model = Activation(kind), _layer_shape(rng, kind)
    hidden_width = model.F * (2 if activation.gated else 1)
    w13, plain13 = weights_and_plain(rng, format, model.num_experts, hidden_width, model.D, gated=activation.gated)
    w2, plain2 = weights_and_plain(rng, format, model.num_experts, model.D, model.F, gated=False)
    biases = [rng.normal(*plain.shape[:2], scale=0.1) if model.biases else None for plain in (plain13, plain2)]
    layer = kernels_experts.Layer(w13=w13, w2=w2, activation=activation, bias13=biases[0], bias2=biases[1])
    tolerance = EXACT if rng.dtype == torch.float32 and format in ("dense", "int4", "mxfp4", "nvfp4") else ROUNDED
    found = {}
    for name, routed in _routings(rng, model, num_tokens):
        x, x_scales, plain_x = rows_and_plain(format, rng.normal(routed.num_tokens, model.D))
        rows = kernels_experts.as_rows(routed, format)
        with poisoned():
            hidden = kernels_experts.first_product(rng, layer, rows, x, x_scales)
        expected = experts.w13_reference(plain_x, routed.row_index_R, routed.offsets, plain13, activation, biases[0])
        found[f"w13 {name}"] = error(hidden, expected), tolerance
        operand, scales, plain_hidden = rows_and_plain(format, expected.to(rng.dtype))
        with poisoned():
            if format == "fp8_block":
                assert scales is not None
                scales = grouped_gemm_tiles.tile_scales(scales, None, rows.expert_offsets, rows.tile_map)
            out = kernels_experts.second_product(rng, layer, rows, operand, scales)
        target = torch.full_like(out, torch.nan, dtype=torch.float32)
        experts.w2_reference(plain_hidden, routed.offsets, plain2, routed.home_R, target, biases[1])
        found[f"w2 {name}"] = error(out, target), tolerance
    return found


def scaled_check(rng: TensorRng, format: str, num_tokens: int) -> Findings:
    """Do what `experts_check` does on Blackwell; an earlier GPU refuses the format."""
    try:
        return experts_check(rng, format, "swiglu", num_tokens)
    except ValueError:
        return {"refused": (float(rng.gpu.arch >= 100), 0.0)}


def warm_experts(rng: TensorRng, format: str, kind: str, num_tokens: int) -> None:
    """Launch the kernels of `experts_check`."""
    model = _layer_shape(rng, kind)
    layer, routed = (
        kernels_experts.Layer.random(rng, model, format, 1),
        kernels_experts.route(rng, model, 1, num_tokens),
    )
    x = kernels_experts.random_x(rng, format, routed.num_tokens, model.D)
    kernels_experts.pair(rng, layer, kernels_experts.as_rows(routed, format), *x)()


def _layer_shape(rng: TensorRng, kind: str) -> Model:
    sizes = (
        {"num_experts": 3, "top_k": 2, "D": 96, "F": 64}
        if rng.tiny
        else {"num_experts": 32, "top_k": 8, "D": 2048, "F": 768}
    )
    return Model(name="check", activation=kind, biases=kind == "swiglu_clamped", **sizes)


def _routings(rng: TensorRng, model: Model, num_tokens: int) -> Iterator[tuple[str, kernels_experts.Routed]]:
    """Yield random routing, all rows at one expert, and sparse routing with a single row at one expert."""
    routed = kernels_experts.route(rng, model, 1, num_tokens)
    yield "random", routed
    total, e = len(routed.row_index_R), model.num_experts
    sparse = [0] * e
    sparse[0], sparse[-1] = 1, total - 1
    for name, counts in (("one expert", [0, total] + [0] * (e - 2)), ("sparse", sparse)):
        offsets = rng.fixed([0, *np.cumsum(counts).tolist()])
        yield name, dataclasses.replace(routed, offsets=offsets, counts=counts)


def attention_check(rng: TensorRng, model: kernels_attention.Heads, batch: list[tuple[int, int]]) -> Findings:
    """Check both numerics modes; the cache holds NaN after a sequence's end."""
    seqs, blocks = kernels_attention.sequences(rng, batch)
    q = rng.normal(sum(num for num, _ in batch), model.heads, model.dim)
    caches = _caches(rng, seqs, blocks, (model.kv_heads, model.dim), number=2)
    sinks_H = rng.normal(model.heads) if model.sinks else None
    options = attention.AttentionOptions(window=model.window, sinks_H=sinks_H)
    k, v = (cache.nan_to_num() for cache in caches)
    expected = attention.reference(q, k, v, seqs, options)
    found = {}
    for numerics, attend in kernels_attention.ATTENTION.items():
        out = torch.full_like(q, torch.nan)
        with poisoned():
            attend(q, *caches, seqs, options, device=rng.gpu, out=out)
        found[numerics] = error(out, expected), ROUNDED
    return found


def warm_attention(rng: TensorRng, model: kernels_attention.Heads, batch: list[tuple[int, int]]) -> None:
    """Launch the kernels of `attention_check`."""
    seqs, blocks = kernels_attention.sequences(rng, batch)
    q = rng.normal(sum(num for num, _ in batch), model.heads, model.dim)
    k, v = (rng.normal(blocks, kernels_attention.BLOCK, model.kv_heads, model.dim) for _ in range(2))
    sinks_H = rng.normal(model.heads) if model.sinks else None
    options = attention.AttentionOptions(window=model.window, sinks_H=sinks_H)
    for attend in kernels_attention.ATTENTION.values():
        attend(q, k, v, seqs, options, device=rng.gpu)


def latent_check(rng: TensorRng, batch: list[tuple[int, int]]) -> Findings:
    """Do what `attention_check` does, with one cache."""
    heads, rank, rotated = (4, 32, 16) if rng.tiny else (kernels_attention.LATENT_HEADS, 512, 64)
    seqs, blocks = kernels_attention.sequences(rng, batch)
    q = rng.normal(sum(num for num, _ in batch), heads, rank + rotated)
    (cache,) = _caches(rng, seqs, blocks, (rank + rotated,), number=1)
    out = q.new_full((*q.shape[:2], rank), torch.nan)
    with poisoned():
        gpu_mla.attend(q, cache, seqs, rng.gpu, rank=rank, scale=0.05, out=out)
    expected = mla.reference(q, cache.nan_to_num(), seqs, rank=rank, scale=0.05)
    return {"invariant": (error(out, expected), ROUNDED)}


def _caches(
    rng: TensorRng, seqs: attention.AttentionMetadata, blocks: int, row: tuple[int, ...], *, number: int
) -> list[Tensor]:
    """Return caches with NaN wherever no sequence has stored."""
    block = kernels_attention.BLOCK
    known = torch.zeros(blocks, block, dtype=torch.bool, device=rng.device)
    for table, length in zip(seqs.block_table.long(), seqs.seq_lens.tolist(), strict=True):
        slots = table[:, None] * block + torch.arange(block, device=rng.device)
        known.view(-1)[slots.flatten()[:length]] = True
    caches = [rng.normal(blocks, block, *row) for _ in range(number)]
    for cache in caches:
        cache[~known] = torch.nan
    return caches


def expert_items(quick: bool, tiny: bool) -> list[Item]:
    """Return every format in every regime; the formats of the bars first."""
    sizes = (3,) if tiny else (1, 40, 2000) if quick else (1, 40, 120, 500, 2000, 6000)
    found: list[Item] = [
        item(f"{format} T{number}", experts_check, warm_experts, format, "swiglu", number)
        for format in FORMATS
        for number in sizes
    ]
    found += [
        item(f"{format} T{number}", scaled_check, None, format, number) for format in formats.SCALED for number in sizes
    ]
    kinds = ("swiglu_clamped", "relu2")
    return found + [
        item(f"dense {kind} T{n}", experts_check, warm_experts, "dense", kind, n) for kind in kinds for n in sizes[:2]
    ]


def attention_items(quick: bool, tiny: bool) -> list[Item]:
    """Return decode, prefill and mixed steps of every kind of attention, at lengths next to tile and
    split boundaries.
    """
    batches = {
        "decode": [(1, length) for length in (1, 15, 16, 17, 63, 64, 65, 1023, 1024, 1025, 5000)],
        "mixed": [(1, 33), (1, 2049), (7, 7), (40, 1100), (70, 200)],
    }
    if tiny:
        batches = {"mixed": [(1, 17), (3, 5)]}
    small = kernels_attention.Heads(name="small", heads=4, kv_heads=2, dim=32)
    kinds = [small] if tiny else [
        kernels_attention.QWEN3, kernels_attention.MIXTRAL, kernels_attention.GPT_OSS, kernels_attention.GPT_OSS_WINDOW,
    ]  # fmt: skip
    found: list[Item] = [
        item(f"{model.name} {name}", attention_check, warm_attention, model, batch)
        for model in kinds
        for name, batch in batches.items()
    ]
    return found + [item(f"latent {name}", latent_check, None, batch) for name, batch in batches.items()]


def item(key: str, run: Callable[..., Findings], warm: Callable[..., None] | None, *arguments: Any) -> Check:
    return Check(key, lambda rng: run(rng, *arguments), None if warm is None else lambda rng: warm(rng, *arguments))
