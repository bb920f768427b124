"""Correctness in `bench kernels` of fp8 caches, copies of blocks, the sparse indexer and per-head linear layers; see `checks`.

G key/value heads, H query heads.
"""

from __future__ import annotations

from typing import Any

import torch

from expertwire.bench.kernels import attention as kernels_attention
from expertwire.bench.kernels.checks import ROUNDED, Findings, differing, error, item, poisoned
from expertwire.bench.kernels.measure import Item, TensorRng
from expertwire.kernels.gpu import copy_blocks as gpu_copy_blocks
from expertwire.kernels.gpu import heads as gpu_heads
from expertwire.kernels.gpu import index as gpu_index
from expertwire.kernels.gpu import mla as gpu_mla
from expertwire.kernels.ops import attention, copy_blocks, heads, index, mla
from expertwire.kernels.ops.attention import FP8

_BATCHES = {
    "decode": [(1, length) for length in (1, 64, 1025, 5000)],
    "mixed": [(1, 33), (1, 3000), (40, 1100), (70, 70)],
}
_TINY = {"mixed": [(1, 17), (3, 5)]}


def fp8_cache_check(rng: TensorRng, batch: list[tuple[int, int]]) -> Findings:
    """Check attention over keys and values in fp8, with a scale for each head."""
    H, G, dim = (4, 2, 32) if rng.tiny else (32, 4, 128)
    seqs, blocks = kernels_attention.sequences(rng, batch)
    q = rng.normal(sum(num for num, _ in batch), H, dim)
    k, v = (rng.normal(blocks, kernels_attention.BLOCK, G, dim, dtype=FP8) for _ in range(2))
    scales_2G = rng.uniform(0.1, 1.0, 2, G)
    options = attention.AttentionOptions(kv_scales_2G=scales_2G)
    expected = attention.reference(q, k, v, seqs, options)
    found = {}
    for numerics, attend in kernels_attention.ATTENTION.items():
        with poisoned():
            out = attend(q, k, v, seqs, options, device=rng.gpu)
        found[numerics] = error(out, expected), ROUNDED
    return found


def fp8_latent_check(rng: TensorRng, batch: list[tuple[int, int]]) -> Findings:
    """Check latent attention over an fp8 cache."""
    H, rank, rotated = (4, 32, 16) if rng.tiny else (kernels_attention.LATENT_HEADS, 512, 64)
    seqs, blocks = kernels_attention.sequences(rng, batch)
    q = rng.normal(sum(num for num, _ in batch), H, rank + rotated)
    cache = rng.normal(blocks, kernels_attention.BLOCK, rank + rotated, dtype=FP8)
    options: dict[str, Any] = {"rank": rank, "scale": 0.05, "kv_scale": rng.uniform(0.1, 1.0, 1)}
    with poisoned():
        found = gpu_mla.attend(q, cache, seqs, rng.gpu, **options)
    return {"invariant": (error(found, mla.reference(q, cache, seqs, **options)), ROUNDED)}


def index_check(rng: TensorRng, batch: list[tuple[int, int]]) -> Findings:
    """Check the chosen positions exactly: with whole numbers every sum is exact, and many scores are equal."""
    H, dim, top_k = (4, 16, 7) if rng.tiny else (64, 128, 2048)
    seqs, blocks = kernels_attention.sequences(rng, batch)
    num_tokens = sum(num for num, _ in batch)
    q = rng.integers(-3, 4, num_tokens, H, dim).to(rng.dtype)
    cache = rng.integers(-3, 4, blocks, kernels_attention.BLOCK, dim).to(rng.dtype)
    weights = rng.integers(-2, 5, num_tokens, H).float()
    with poisoned():
        found = gpu_index.choose_positions(q, weights, cache, seqs, top_k, rng.gpu)
    return {"positions": (differing(found, index.reference(q, weights, cache, seqs, top_k)), 0.0)}


def heads_check(rng: TensorRng, num_tokens: int) -> Findings:
    """Check per-head linear layers."""
    H, N, K = (3, 40, 24) if rng.tiny else (kernels_attention.LATENT_HEADS, 512, 128)
    x, w = rng.normal(num_tokens, H, K), rng.normal(H, N, K, scale=K**-0.5)
    with poisoned():
        found = gpu_heads.prepare(w, device=rng.gpu)(x)
    return {"values": (error(found, heads.reference(x, w)), ROUNDED)}


def copies_check(rng: TensorRng) -> Findings:
    """Check copied blocks exactly, those of several sizes."""
    sizes = ((9, 16, 4, 128), (9, 16, 4, 128), (9, 1000))
    given = [rng.integers(-99, 99, *size).to(rng.dtype) for size in sizes]
    found, expected = ([blocks.clone() for blocks in given] for _ in range(2))
    source, target = (rng.fixed(blocks, torch.int64) for blocks in ([1, 7, 1], [2, 8, 0]))
    gpu_copy_blocks.prepare(found)(source, target)
    copy_blocks.reference(expected, source, target)
    return {"blocks": (sum(differing(*pair) for pair in zip(found, expected, strict=True)), 0.0)}


def items(quick: bool, tiny: bool) -> list[Item]:
    """Return the items of the suite."""
    found: list[Item] = [
        item(f"{name} {step}", check, None, batch)
        for name, check in (("fp8 cache", fp8_cache_check), ("fp8 latent", fp8_latent_check), ("index", index_check))
        for step, batch in (_TINY if tiny else _BATCHES).items()
    ]
    sizes = (5,) if tiny else (1, 128) if quick else (1, 17, 128, 4096)
    found.append(item("copies of blocks", copies_check, None))
    return found + [item(f"heads T{n}", heads_check, None, n) for n in sizes]
