"""Correctness in `bench kernels` of fp8 caches, the sparse indexer and linear layers of each head; see `kernels_checks`."""

from __future__ import annotations

from typing import Any

from expertwire.bench.kernels import attention as kernels_attention
from expertwire.bench.kernels.checks import ROUNDED, Findings, differing, error, item, poisoned
from expertwire.bench.kernels.work import Draw, Item
from expertwire.kernels.gpu import heads as gpu_heads
from expertwire.kernels.gpu import index as gpu_index
from expertwire.kernels.gpu import mla as gpu_mla
from expertwire.kernels.ops import attention, heads, index, mla
from expertwire.kernels.ops.attention import FP8

_BATCHES = {
    "decode": [(1, length) for length in (1, 64, 1025, 5000)],
    "mixed": [(1, 33), (1, 3000), (40, 1100), (70, 70)],
}
_TINY = {"mixed": [(1, 17), (3, 5)]}


def fp8_cache_check(draw: Draw, batch: list[tuple[int, int]]) -> Findings:
    """Attention over keys and values in fp8, with a scale for each head, against the reference."""
    H, G, dim = (4, 2, 32) if draw.tiny else (32, 4, 128)
    seqs, blocks = kernels_attention.sequences(draw, batch)
    q = draw.normal(sum(num for num, _ in batch), H, dim)
    k, v = (draw.normal(blocks, kernels_attention.BLOCK, G, dim, dtype=FP8) for _ in range(2))
    scales_2G = draw.uniform(0.1, 1.0, 2, G)
    expected = attention.reference(q, k, v, seqs, kv_scales_2G=scales_2G)
    found = {}
    for numerics, attend in kernels_attention.ATTENTION.items():
        with poisoned():
            out = attend(q, k, v, seqs, draw.gpu, kv_scales_2G=scales_2G)
        found[numerics] = error(out, expected), ROUNDED
    return found


def fp8_latent_check(draw: Draw, batch: list[tuple[int, int]]) -> Findings:
    """Latent attention over a cache in fp8, against the reference."""
    H, rank, rotated = (4, 32, 16) if draw.tiny else (kernels_attention.LATENT_HEADS, 512, 64)
    seqs, blocks = kernels_attention.sequences(draw, batch)
    q = draw.normal(sum(num for num, _ in batch), H, rank + rotated)
    cache = draw.normal(blocks, kernels_attention.BLOCK, rank + rotated, dtype=FP8)
    options: dict[str, Any] = {"rank": rank, "scale": 0.05, "kv_scale": draw.uniform(0.1, 1.0, 1)}
    with poisoned():
        found = gpu_mla.attend(q, cache, seqs, draw.gpu, **options)
    return {"invariant": (error(found, mla.reference(q, cache, seqs, **options)), ROUNDED)}


def index_check(draw: Draw, batch: list[tuple[int, int]]) -> Findings:
    """The chosen positions, exactly: of whole numbers every sum is exact, and many scores are equal."""
    H, dim, top_k = (4, 16, 7) if draw.tiny else (64, 128, 2048)
    seqs, blocks = kernels_attention.sequences(draw, batch)
    num_tokens = sum(num for num, _ in batch)
    q = draw.integers(-3, 4, num_tokens, H, dim).to(draw.dtype)
    cache = draw.integers(-3, 4, blocks, kernels_attention.BLOCK, dim).to(draw.dtype)
    weights = draw.integers(-2, 5, num_tokens, H).float()
    with poisoned():
        found = gpu_index.choose_positions(q, weights, cache, seqs, top_k, draw.gpu)
    return {"positions": (differing(found, index.reference(q, weights, cache, seqs, top_k)), 0.0)}


def heads_check(draw: Draw, num_tokens: int) -> Findings:
    """A linear layer of each head against the reference."""
    H, N, K = (3, 40, 24) if draw.tiny else (kernels_attention.LATENT_HEADS, 512, 128)
    x, w = draw.normal(num_tokens, H, K), draw.normal(H, N, K, scale=K**-0.5)
    with poisoned():
        found = gpu_heads.prepare(w, device=draw.gpu)(x)
    return {"values": (error(found, heads.reference(x, w)), ROUNDED)}


def items(quick: bool, tiny: bool) -> list[Item]:
    """All of these."""
    found = [
        item(f"{name} {step}", check, None, batch)
        for name, check in (("fp8 cache", fp8_cache_check), ("fp8 latent", fp8_latent_check), ("index", index_check))
        for step, batch in (_TINY if tiny else _BATCHES).items()
    ]
    sizes = (5,) if tiny else (1, 128) if quick else (1, 17, 128, 4096)
    return found + [item(f"heads T{n}", heads_check, None, n) for n in sizes]
