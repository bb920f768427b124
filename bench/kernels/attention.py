"""Attention in `bench kernels`: paged caches of real shapes, our kernels, and torch's fused attention
on contiguous ones.

S sequences, T tokens, H query heads, G key/value heads, d head size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from expertwire.bench.kernels.measure import Call, Item, TensorRng, Timed, TimedCalls, copies
from expertwire.bench.kernels.models import attention_cost, latent_cost
from expertwire.kernels.gpu import attention, mla, prefill
from expertwire.kernels.ops.attention import AttentionMetadata, AttentionOptions, describe

BLOCK = 16  # the engine's default
ATTENTION: Mapping[str, Callable[..., Tensor]] = {"invariant": attention.attend, "fast": prefill.attend}  # by numerics


@dataclass(frozen=True, kw_only=True)
class Heads:
    """A model's attention."""

    name: str
    heads: int
    kv_heads: int
    dim: int
    window: int = 0
    sinks: bool = False


QWEN3 = Heads(name="qwen3-30b", heads=32, kv_heads=4, dim=128)
MIXTRAL = Heads(name="mixtral-8x7b", heads=32, kv_heads=8, dim=128)
GPT_OSS = Heads(name="gpt-oss-120b", heads=64, kv_heads=8, dim=64, sinks=True)
GPT_OSS_WINDOW = Heads(name="gpt-oss-120b window", heads=64, kv_heads=8, dim=64, window=128, sinks=True)
LATENT_HEADS, RANK, ROTATED = 128, 512, 64  # DeepSeek-V3
LATENT_SCALE = 192**-0.5

# Queries and known tokens of each sequence; the bar's step first.
STEPS: Mapping[str, list[tuple[int, int]]] = {
    "decode 64 x 8k": [(1, 8192)] * 64,
    "decode 1 x 1k": [(1, 1024)],
    "decode 64 x 1k": [(1, 1024)] * 64,
    "decode 256 x 1k": [(1, 1024)] * 256,
    "decode 1 x 128k": [(1, 131072)],
    "decode 8 x 32k": [(1, 32768)] * 8,
    "decode 64 ragged": [(1, 1 + 257 * i) for i in range(64)],
    "prefill 8k": [(8192, 8192)],
    "prefill 2k": [(2048, 2048)],
    "chunk 2k at 30k": [(2048, 32768)],
    "mixed": [(1, 4096)] * 32 + [(1024, 1024)] * 2,
}
QUICK_STEPS = (*tuple(STEPS)[:3], "prefill 8k")


def sequences(rng: TensorRng, batch: list[tuple[int, int]], block: int = BLOCK) -> tuple[AttentionMetadata, int]:
    """Return attention metadata with blocks in a random order, and the number of blocks; block 0
    belongs to no sequence.
    """
    counts = [-(-length // block) for _, length in batch]
    width, total = max(counts), sum(counts)
    if rng.is_meta:
        table = rng.integers(0, 1, len(batch), width)
    else:
        ids = 1 + torch.randperm(total, generator=rng.generator, device=rng.device).int()
        table = torch.zeros(len(batch), width, dtype=torch.int32, device=rng.device)
        for row, part in zip(table, ids.split(counts), strict=True):
            row[: len(part)] = part
    nums = [num for num, _ in batch]
    return describe(nums, [length for _, length in batch], table), total + 1


def heads_work(rng: TensorRng, model: Heads, step: str) -> TimedCalls:
    """Time our kernels in both numerics modes, and torch's where it has such an attention."""
    batch = STEPS[step]
    nums, lengths = ([sequence[i] for sequence in batch] for i in (0, 1))
    cost = attention_cost(lengths, nums, heads=model.heads, kv_heads=model.kv_heads, dim=model.dim, window=model.window)
    number = (
        1
        if rng.is_meta
        else copies(sum(min(length, model.window or length) for length in lengths) * 4 * model.kv_heads * model.dim)
    )
    sinks_H = rng.normal(model.heads) if model.sinks else None
    calls: dict[str, list[Call]] = {}
    for _ in range(number):
        seqs, blocks = sequences(rng, batch)
        q = rng.normal(sum(nums), model.heads, model.dim)
        k, v = (rng.normal(blocks, BLOCK, model.kv_heads, model.dim) for _ in range(2))
        options = AttentionOptions(window=model.window, sinks_H=sinks_H)
        found = {
            name: _ours(rng, q, k, v, seqs, options, numerics)
            for name, numerics in (("ours", "invariant"), ("ours, fast", "fast"))
        }
        if not model.window and not model.sinks and not rng.is_meta and len(set(batch)) == 1:
            found |= _peers(rng, model, len(batch), *batch[0])
        for name, call in found.items():
            calls.setdefault(name, []).append(call)
    labels = {"model": model.name, "step": step}
    return TimedCalls(calls=calls, cost=cost, peers=frozenset(calls) - {"ours", "ours, fast"}, labels=labels)


def _ours(
    rng: TensorRng, q: Tensor, k: Tensor, v: Tensor, seqs: AttentionMetadata, options: AttentionOptions, numerics: str
) -> Call:
    return lambda: ATTENTION[numerics](q, k, v, seqs, options, device=rng.gpu)


def _peers(rng: TensorRng, model: Heads, batch: int, num: int, length: int) -> dict[str, Call]:
    """Return torch's choice and its flash attention, on contiguous caches, which is less work than paged ones."""
    if 1 < num < length:
        return {}
    q = rng.normal(batch, model.heads, num, model.dim)
    k, v = (rng.normal(batch, model.kv_heads, length, model.dim) for _ in range(2))

    def torchs() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=num > 1, enable_gqa=True)

    def flash() -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return torchs()

    return {"SDPA": torchs, "SDPA flash": flash}


def latent_work(rng: TensorRng, step: str) -> TimedCalls:
    """Time DeepSeek-V3's latent attention; torch has none."""
    batch = STEPS[step]
    nums, lengths = ([sequence[i] for sequence in batch] for i in (0, 1))
    cost = latent_cost(lengths, nums, heads=LATENT_HEADS, rank=RANK, rotated=ROTATED)
    calls = []
    for _ in range(1 if rng.is_meta else copies(sum(lengths) * (RANK + ROTATED) * 2)):
        seqs, blocks = sequences(rng, batch)
        q = rng.normal(sum(nums), LATENT_HEADS, RANK + ROTATED)
        cache = rng.normal(blocks, BLOCK, RANK + ROTATED)
        calls.append(_latent(rng, q, cache, seqs))
    return TimedCalls(calls={"ours": calls}, cost=cost, labels={"model": "deepseek-v3 latent", "step": step})


def _latent(rng: TensorRng, q: Tensor, cache: Tensor, seqs: AttentionMetadata) -> Call:
    return lambda: mla.attend(q, cache, seqs, rng.gpu, rank=RANK, scale=LATENT_SCALE)


def items(quick: bool) -> list[Item]:
    """Return the items of grouped-query attention, that of the bar first."""
    steps = QUICK_STEPS if quick else tuple(STEPS)
    found: list[Item] = [_heads_item(QWEN3, step) for step in steps]
    for model in (MIXTRAL, GPT_OSS, GPT_OSS_WINDOW):
        found += [_heads_item(model, step) for step in ("decode 64 x 8k", "prefill 8k")[: 1 if quick else 2]]
    return found


def latent_items(quick: bool) -> list[Item]:
    """Return the items of latent attention."""
    steps = ("decode 64 x 8k", "decode 64 x 1k", "decode 1 x 128k", "prefill 2k")[: 1 if quick else None]
    return [_latent_item(step) for step in steps]


def _heads_item(model: Heads, step: str) -> Timed:
    return Timed(f"{model.name} {step}", lambda rng: heads_work(rng, model, step))


def _latent_item(step: str) -> Timed:
    return Timed(f"deepseek-v3 latent {step}", lambda rng: latent_work(rng, step))
