"""Ranks that share one GPU exchange rows: all in one process, and each in its own."""

import pytest
import torch

pytest.importorskip("triton")

from expertwire.bench.all_to_all import processes, shared

pytestmark = pytest.mark.gpu

SHAPE = {"num_experts": 32, "top_k": 8, "hidden_size": 2048}


@pytest.mark.parametrize("format", ["bf16", "fp8"])
@pytest.mark.parametrize("tokens", [1, 16, 1024])
@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_in_one_process(num_ranks, tokens, format):
    with torch.inference_mode():
        rows = list(shared.run(num_ranks, tokens, format, steps=3, **SHAPE))
    assert [row["graph"] for row in rows] == [False, True]


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_as_processes(num_ranks, monkeypatch):
    monkeypatch.setenv("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "1")
    processes.run(num_ranks, 16, steps=5, device="cuda", timeout_s=120.0, **SHAPE)
