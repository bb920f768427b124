"""Copies of blocks against torch's."""

import pytest
import torch

from expertwire.kernels.gpu import copy_blocks
from expertwire.kernels.ops.copy_blocks import reference

SHAPES = [
    ((7, 16, 2, 64), torch.float16),
    ((7, 5000), torch.int32),
    ((7, 16, 3), torch.float8_e4m3fn),
    ((7, 1), torch.float32),
]


def test_blocks_of_all_tensors_are_copied():
    """Those of different sizes, of more words than a program copies at once, and of one."""
    generator = torch.Generator().manual_seed(0)
    found = [torch.randint(0, 99, shape, generator=generator).to(dtype) for shape, dtype in SHAPES]
    expected = [tensor.clone() for tensor in found]
    source, target = torch.tensor([1, 5, 1]), torch.tensor([4, 0, 6])
    copy_blocks.prepare(found)(source, target)
    reference(expected, source, target)
    for blocks, others in zip(found, expected, strict=True):
        assert torch.equal(blocks.view(torch.uint8), others.view(torch.uint8))
    assert torch.equal(found[0][[4, 0, 6]], found[0][[1, 5, 1]])


def test_blocks_that_are_no_words_are_refused():
    with pytest.raises(AssertionError, match="blocks of 6 bytes"):
        copy_blocks.prepare([torch.zeros(3, 6, dtype=torch.uint8)])
