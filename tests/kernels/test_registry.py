"""Which implementations are chosen, and that one can read it."""

from types import SimpleNamespace

import pytest
import torch

from expertwire.kernels import registry
from expertwire.kernels.gpu.device import B200, H200


@pytest.mark.parametrize(
    ("ops", "folder"),
    [(registry.choose("cpu"), "expertwire.kernels.cpu."), (registry.plain(), "expertwire.kernels.")],
    ids=["cpu", "plain"],
)
def test_the_choice_can_be_read(ops, folder):
    why, *lines = ops.explain().splitlines()
    assert why == ops.why
    assert len(lines) == 30 + (ops.fuse_moe is not None) + (ops.fuse_attention is not None)
    assert sum(f": {folder}" in line for line in lines) >= 7, lines


def test_a_gpu_runs_triton():
    lines = registry.triton(H200).explain().splitlines()[1:]
    assert [line for line in lines if ": expertwire.kernels.gpu." not in line] == []


def test_fp32_on_blackwell_is_refused_with_what_is_allowed():
    with pytest.raises(ValueError, match=r"dtype is float32.*allowed is bfloat16"):
        registry.triton(B200).linear(torch.zeros(64, 64))


def test_rows_are_quantised_for_4_bit_experts_only_on_blackwell_and_only_if_that_is_chosen():
    """It changes results, so the choice is an option's, and says so."""
    for gpu, fast in ((H200, False), (H200, True), (B200, False), (B200, True)):
        ops = registry.triton(gpu, fast=fast)
        quantises = (gpu, fast) == (B200, True)
        assert ops.experts.keywords["scale_rows"] == quantises
        assert ("MXFP8" in ops.explain().splitlines()[0]) == quantises


@pytest.mark.parametrize(
    ("capability", "is_supported"), [((8, 9), False), ((9, 0), True), ((10, 3), True), ((12, 0), False)]
)
def test_gpus_without_kernels_are_refused_by_name(monkeypatch, capability, is_supported):
    """Workstations' Blackwell has other matrix instructions and half the shared memory: launches would fail one by one."""
    major, minor = capability
    properties = SimpleNamespace(major=major, minor=minor, multi_processor_count=188)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    if is_supported:
        assert registry.choose("cuda:0").on_device
    else:
        with pytest.raises(
            ValueError, match=rf"a card of compute capability {major}.{minor}; allowed are 9.x and 10.x"
        ):
            registry.choose("cuda:0")
