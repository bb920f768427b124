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
    assert len(lines) == 10
    assert sum(f": {folder}" in line for line in lines) >= 7, lines


def test_a_gpu_runs_triton_and_nothing_else():
    lines = registry.triton(H200).explain().splitlines()[1:]
    assert all(": expertwire.kernels.gpu." in line for line in lines), lines


def test_fp32_on_blackwell_is_refused_with_what_is_allowed():
    with pytest.raises(ValueError, match=r"dtype is float32.*allowed is bfloat16"):
        registry.triton(B200).linear(torch.zeros(64, 64))
