"""Which implementations are chosen, and that one can read it."""

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
    assert len(lines) == 29 + (ops.fuse_moe is not None) + (ops.fuse_attention is not None)
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
