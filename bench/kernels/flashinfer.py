"""FlashInfer's attention, as an engine that was asked for it calls it, beside ours on the same caches: whether they agree, and
how long each takes once a step is planned. Never run by us."""

from __future__ import annotations

import importlib

import torch

from expertwire.bench.kernels import attention as kernels_attention
from expertwire.bench.kernels.attention import ATTENTION, BLOCK, QWEN3, Heads
from expertwire.bench.kernels.checks import ROUNDED, error
from expertwire.bench.kernels.work import Call, Draw, median_us
from expertwire.kernels.gpu.device import describe
from expertwire.kernels.gpu.flashinfer import FlashInfer

STEPS = ("prefill 8k", "decode 64 x 8k", "chunk 2k at 30k", "decode 256 x 1k")


def compare(step: str) -> dict[str, float]:
    """{"error", "allowed", "ours_us" of the fast numerics, "theirs_us"} for Qwen3-30B-A3B's heads in bf16."""
    draw = Draw.of("cuda", describe("cuda"), torch.bfloat16, 0, step)
    theirs, ours = calls(draw, QWEN3, kernels_attention.STEPS[step])
    return {
        "error": error(theirs(), ours()),
        "allowed": ROUNDED,
        "ours_us": median_us([ours])["median"],
        "theirs_us": median_us([theirs])["median"],
    }


def calls(draw: Draw, model: Heads, batch: list[tuple[int, int]]) -> tuple[Call, Call]:
    """Theirs, which plans when it is first called, and ours: attention [T, H, d] over keys and values of a step."""
    library = FlashInfer(importlib.import_module("flashinfer"), importlib.import_module("flashinfer.mla"), draw.device)
    seqs, blocks = kernels_attention.sequences(draw, batch)
    q = draw.normal(sum(num for num, _ in batch), model.heads, model.dim)
    k, v = (draw.normal(blocks, BLOCK, model.kv_heads, model.dim) for _ in range(2))
    return lambda: library.attend(q, k, v, seqs), lambda: ATTENTION["fast"](q, k, v, seqs, draw.gpu)
