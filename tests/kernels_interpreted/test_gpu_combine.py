"""The combine kernel: the reference's bits."""

import pytest
import torch

from expertwire.kernels.gpu import combine as gpu
from expertwire.kernels.ops import combine


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    ("tokens", "top_k", "width"), [(0, 2, 64), (1, 1, 8), (3, 8, 1000), (2, 22, 1025), (5, 6, 2880)]
)
def test_bits(dtype, shared, tokens, top_k, width):
    generator = torch.Generator().manual_seed(width)
    rows = torch.randn(tokens, top_k, width, generator=generator).to(dtype)
    weights = torch.rand(tokens, top_k, generator=generator)
    extra = torch.randn(tokens, width, generator=generator).to(dtype) if shared else None
    done = gpu.combine(rows, weights, extra)
    assert torch.equal(done, combine.reference(rows, weights, extra))
    assert done.dtype == dtype


def test_the_order_is_that_of_k():
    """1 is lost beside 2^25, unless the large rows have cancelled each other before."""
    large = 2.0**25
    rows = torch.tensor([[[large], [-large], [1.0]], [[large], [1.0], [-large]]]).expand(2, 3, 16).contiguous()
    assert gpu.combine(rows, torch.ones(2, 3))[:, 0].tolist() == [1.0, 0.0]


def test_shapes_that_do_not_belong_together_are_refused():
    with pytest.raises(AssertionError, match=r"\(2, 3\) weights"):
        gpu.combine(torch.zeros(2, 4, 16), torch.zeros(2, 3))
