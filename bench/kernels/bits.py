"""Bitwise equality in `bench kernels`: a row's result must not depend on the batch, the tile or the kind of step.

That is what invariant mode promises, for the classes of tiles that were found equal on this device.
Each item computes the same rows in several ways; the mode needs them to be one class of equal bits.

H query heads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from expertwire.bench.kernels import attention as kernels_attention
from expertwire.bench.kernels import checks as kernels_checks
from expertwire.bench.kernels import experts as kernels_experts
from expertwire.bench.kernels.measure import Bits, Item, TensorRng
from expertwire.bench.kernels.models import Model
from expertwire.kernels.gpu import attention, grouped_gemm_tiles, linear, mla, rms_norm
from expertwire.kernels.gpu.device import Device
from expertwire.kernels.ops.attention import AttentionMetadata, AttentionOptions, describe

Ways = Mapping[str, Mapping[str, Tensor]]


def experts_bits(rng: TensorRng, format: str) -> Ways:
    """Compute both products with every tile that the wrapper can choose, and of single rows among others and alone."""
    model = Model(name="bits", num_experts=3, top_k=2, D=96, F=128) if rng.tiny else Model(
        name="bits", num_experts=64, top_k=8, D=2048, F=768
    )  # fmt: skip
    layer = kernels_experts.Layer.random(rng, model, format, 1)
    routed = kernels_experts.route(rng, model, 1, 4 if rng.tiny else 1800)
    x, x_scales = kernels_experts.random_x(rng, format, routed.num_tokens, model.D)
    hidden = rng.normal(len(routed.row_index_R), model.F)
    found: dict[str, dict[str, Tensor]] = {"w13": {}, "w2": {}}
    for name, planned in _tile_classes(rng, format, model).items():
        rows = kernels_experts.as_rows(dataclasses.replace(routed, planned=planned), format)
        found["w13"][name] = kernels_experts.first_product(rng, layer, rows, x, x_scales)
        operand = kernels_experts.second_operand(layer, rows, hidden)
        found["w2"][name] = kernels_experts.second_product(rng, layer, rows, *operand)
    if not rng.is_meta:
        found["w13 of single rows"] = _single_rows(rng, layer, routed, x, x_scales)
    return found


def _tile_classes(rng: TensorRng, format: str, model: Model) -> dict[str, int]:
    """Return a number of planned rows for each pair of tiles that can be chosen for the two products."""
    found: dict[str, int] = {}
    for planned in sorted({model.num_experts * 2**i for i in range(12)} | {1, 4}):
        tokens = grouped_gemm_tiles.token_tile(format, planned, model.num_experts)
        shapes = ((2 * model.F, model.D), (model.D, model.F))
        configs = [
            grouped_gemm_tiles.tile_config(format, tokens, (model.num_experts, *shape), planned, rng.gpu)
            for shape in shapes
        ]
        found.setdefault("/".join(f"{config.rows}x{tokens}" for config in configs), planned)
    # On a CPU the order of a sum does depend on the tile.
    return found if not rng.tiny else dict(list(found.items())[:1])


def _single_rows(
    rng: TensorRng, layer: kernels_experts.Layer, routed: kernels_experts.Routed, x: Tensor, x_scales: Tensor | None
) -> dict[str, Tensor]:
    """Compute some rows among all of them, and each in a batch of its own."""
    format = layer.w13.format
    at = torch.arange(0, len(routed.row_index_R), max(1, len(routed.row_index_R) // 8))
    whole = kernels_experts.first_product(rng, layer, kernels_experts.as_rows(routed, format), x, x_scales)
    experts = torch.searchsorted(routed.offsets[1:].contiguous(), at.to(rng.device), right=True).tolist()
    alone = []
    for row, expert in zip(at.tolist(), experts, strict=True):
        counts = [int(e == expert) for e in range(len(routed.counts))]
        one = dataclasses.replace(
            routed,
            row_index_R=routed.row_index_R[row : row + 1].contiguous(),
            home_R=routed.home_R[:1] * 0,
            offsets=rng.fixed([0, *accumulate(counts)]),
            planned=routed.planned if rng.tiny else 1,
        )
        alone.append(kernels_experts.first_product(rng, layer, kernels_experts.as_rows(one, format), x, x_scales))
    return {"in a batch": whole[at.to(rng.device)], "alone": torch.cat(alone)}


def attention_bits(rng: TensorRng, model: kernels_attention.Heads) -> Ways:
    """Compute the last queries of a sequence as prefill, chunk and decode, alone and in a batch, on
    few and many SMs.
    """
    length, num = (50, 4) if rng.tiny else (3000, 40)
    seqs, blocks = kernels_attention.sequences(rng, [(length, length)])
    q = rng.normal(length, model.heads, model.dim)
    k, v = (rng.normal(blocks, kernels_attention.BLOCK, model.kv_heads, model.dim) for _ in range(2))
    sinks_H = rng.normal(model.heads) if model.sinks else None
    default = attention.tile_config(head_dim=model.dim, element_size=q.element_size(), arch=rng.gpu.arch)

    def last(sizes: list[int], gpu: Device, **config: int) -> Tensor:
        step, rows = _stretches(seqs, length, sizes)
        chosen = dataclasses.replace(default, **config)
        options = AttentionOptions(window=model.window, sinks_H=sinks_H)
        return attention.attend(q[rows], k, v, step, options, device=gpu, config=chosen)[-num:]

    few = dataclasses.replace(rng.gpu, num_sms=2)
    steps = {"prefill": last([length], rng.gpu), "chunk": last([num], rng.gpu)}
    steps |= {"decode": last([1] * num, rng.gpu), "decode, few SMs": last([1] * num, few)}
    if rng.tiny:
        return {"steps": steps}
    rows = {"64 rows": last([num], rng.gpu, rows=64), "128 rows": last([num], rng.gpu, rows=128)}
    single = {f"{size} rows": last([1] * num, rng.gpu, decode_rows=size) for size in (64, 16)}
    return {
        "steps": steps,
        "tiles of prefill (128 rows are for later)": rows,
        "tiles of decode (16 rows are fast mode)": single,
    }


def _stretches(seqs: AttentionMetadata, length: int, sizes: list[int]) -> tuple[AttentionMetadata, slice]:
    """Return the last sum(sizes) queries of the only sequence as sequences of a step, which share their cache."""
    first = length - sum(sizes)
    ends = [first + end for end in accumulate(sizes)]
    table = seqs.block_table.expand(len(sizes), -1).contiguous()
    step = describe(sizes, ends, table, max_seq_len=seqs.max_seq_len)
    return step, slice(first, length)


def latent_bits(rng: TensorRng) -> Ways:
    """Do what `attention_bits` does, for latent attention."""
    heads, rank, rotated, length, num = (2, 32, 16, 40, 3) if rng.tiny else (128, 512, 64, 1500, 20)
    seqs, blocks = kernels_attention.sequences(rng, [(length, length)])
    q = rng.normal(length, heads, rank + rotated)
    cache = rng.normal(blocks, kernels_attention.BLOCK, rank + rotated)

    def last(sizes: list[int], gpu: Device) -> Tensor:
        step, rows = _stretches(seqs, length, sizes)
        return mla.attend(q[rows], cache, step, gpu, rank=rank, scale=0.05)[-num:]

    few = dataclasses.replace(rng.gpu, num_sms=2)
    steps = {"prefill": last([length], rng.gpu), "chunk": last([num], rng.gpu)}
    return {"steps": steps | {"decode": last([1] * num, rng.gpu), "decode, few SMs": last([1] * num, few)}}


def linear_bits(rng: TensorRng, outputs: int, inputs: int) -> Ways:
    """Compute the first rows in batches of every size that has tiles of its own."""
    sizes = (2, 40) if rng.tiny else (2, 20, 50, 100, 200, 2000, 9000)
    weight, x = rng.normal(outputs, inputs), rng.normal(max(sizes), inputs)
    layer = linear.prepare(weight, device=rng.gpu)
    return {"rows": {f"T{size}": layer(x[:size])[:2] for size in sizes}}


def norm_bits(rng: TensorRng) -> Ways:
    """Return RMSNorm's rows as computed alone and in batches of several sizes."""
    x, weight = rng.normal(300, 2048), rng.normal(2048)
    whole = rms_norm.rms_norm(x, weight, 1e-6)
    ways = {f"T{size}": rms_norm.rms_norm(x[:size].contiguous(), weight, 1e-6)[:1] for size in (1, 40)}
    return {"rows": ways | {"T300": whole[:1]}}


def repeated_bits(rng: TensorRng) -> Ways:
    """Compute the same pair of products ten times: nothing may depend on timing."""
    model = Model(name="bits", num_experts=4, top_k=2, D=96, F=128) if rng.tiny else Model(
        name="bits", num_experts=64, top_k=8, D=2048, F=768
    )  # fmt: skip
    layer = kernels_experts.Layer.random(rng, model, "dense", 1)
    routed = kernels_experts.route(rng, model, 1, 4 if rng.tiny else 1000)
    x, _ = kernels_experts.random_x(rng, "dense", routed.num_tokens, model.D)
    call = kernels_experts.pair(rng, layer, kernels_experts.as_rows(routed, "dense"), x, None)
    return {"runs": {f"run {i}": call() for i in range(2 if rng.tiny else 10)}}


def items(quick: bool, tiny: bool) -> list[Item]:
    """Return everything that invariant mode rests on."""
    small = kernels_attention.Heads(name="small", heads=4, kv_heads=2, dim=32)
    kinds = [small] if tiny else [kernels_attention.QWEN3, kernels_attention.GPT_OSS, kernels_attention.GPT_OSS_WINDOW]
    shapes = [(80, 64)] if tiny else [(5120, 2048), (2048, 4096), (128, 2048)]
    found = [_bits("products dense", experts_bits, "dense"), _bits("products again", repeated_bits)]
    found += [_bits(f"attention {model.name}", attention_bits, model) for model in kinds]
    found += [_bits(f"linear {N}x{D}", linear_bits, N, D) for N, D in shapes]
    found += [_bits(f"products {format}", experts_bits, format) for format in kernels_checks.FORMATS[1:]]
    return [*found, _bits("attention latent", latent_bits), _bits("norm", norm_bits)]


def _bits(key: str, run: Callable[..., Ways], *arguments: Any) -> Bits:
    return Bits(key, lambda rng: run(rng, *arguments))
