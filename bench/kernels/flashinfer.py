"""FlashInfer's attention, called as the engine calls it, beside ours on the same caches: agreement and time.

Times are of a step that is already planned. It has never run.
"""

from __future__ import annotations

import importlib

import torch

from expertwire.bench.kernels import attention as kernels_attention
from expertwire.bench.kernels.attention import ATTENTION, BLOCK, QWEN3, Heads
from expertwire.bench.kernels.checks import ROUNDED, error
from expertwire.bench.kernels.measure import Call, TensorRng, median_us
from expertwire.kernels.gpu.device import describe
from expertwire.kernels.gpu.flashinfer import FlashInfer

STEPS = ("prefill 8k", "decode 64 x 8k", "chunk 2k at 30k", "decode 256 x 1k")


def compare(step: str) -> dict[str, float]:
    """Return {"error", "allowed", "ours_us" in fast numerics, "theirs_us"} for Qwen3-30B-A3B's heads in bf16."""
    rng = TensorRng.of("cuda", describe("cuda"), torch.bfloat16, 0, step)
    theirs, ours = calls(rng, QWEN3, kernels_attention.STEPS[step])
    return {
        "error": error(theirs(), ours()),
        "allowed": ROUNDED,
        "ours_us": median_us([ours])["median"],
        "theirs_us": median_us([theirs])["median"],
    }


def calls(rng: TensorRng, model: Heads, batch: list[tuple[int, int]]) -> tuple[Call, Call]:
    """Return theirs, which plans when it is first called, and ours: attention [T, H, d] of a step."""
    library = FlashInfer(importlib.import_module("flashinfer"), importlib.import_module("flashinfer.mla"), rng.device)
    seqs, blocks = kernels_attention.sequences(rng, batch)
    q = rng.normal(sum(num for num, _ in batch), model.heads, model.dim)
    k, v = (rng.normal(blocks, BLOCK, model.kv_heads, model.dim) for _ in range(2))
    return lambda: library.attend(q, k, v, seqs), lambda: ATTENTION["fast"](q, k, v, seqs, device=rng.gpu)
