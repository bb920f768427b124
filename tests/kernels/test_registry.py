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
    assert len(lines) == 14
    assert sum(f": {folder}" in line for line in lines) >= 7, lines


def test_a_gpu_runs_triton_but_for_the_indexer():
    lines = registry.triton(H200).explain().splitlines()[1:]
    assert [line for line in lines if ": expertwire.kernels.gpu." not in line] == [
        "rotate_and_store_index: expertwire.kernels.index.rotate_and_store",
        "choose_positions: expertwire.kernels.index.choose_positions_on_device",
    ]


def test_fp32_on_blackwell_is_refused_with_what_is_allowed():
    with pytest.raises(ValueError, match=r"dtype is float32.*allowed is bfloat16"):
        registry.triton(B200).linear(torch.zeros(64, 64))
