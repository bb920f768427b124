"""Rotary embedding: the tables give the formula's rotation, and dot products depend on distances only."""

import math

import pytest
import torch

from expertwire.kernels.ops import rotary
from expertwire.kernels.ops.variants import Rope


@pytest.mark.parametrize("dim", [2, 24, 128])
@pytest.mark.parametrize("theta", [1e4, 1e6])
def test_tables_give_the_formula(dim, theta):
    positions = torch.tensor([0, 1, 2, 17, 999, 4095])
    x = torch.randn(6, 3, dim, generator=torch.Generator().manual_seed(0))
    cos, sin = (table[positions].unsqueeze(1) for table in rotary.tables(4096, Rope(theta=theta, size=dim), "cpu"))
    # fp32 angles: at position p the rounding of p * frequency is up to 2^-24 * p.
    torch.testing.assert_close(rotary.rotate(x, cos, sin), rotary.reference(x, positions, theta), rtol=1e-3, atol=1e-3)


def test_the_reference_by_hand():
    x = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])
    a, b = 5.0, 5.0 / 10  # theta^(-2i/d) = 1, 0.1
    expected = [
        math.cos(a) - 3 * math.sin(a),
        2 * math.cos(b) - 4 * math.sin(b),
        3 * math.cos(a) + math.sin(a),
        4 * math.cos(b) + 2 * math.sin(b),
    ]
    turned = rotary.reference(x, torch.tensor([5]), 100.0)
    torch.testing.assert_close(turned.flatten(), torch.tensor(expected))


def test_dot_products_depend_on_distance():
    q, k = (torch.randn(1, 1, 16, generator=torch.Generator().manual_seed(s)).double() for s in (1, 2))

    def dot(i, j):
        turned = (rotary.reference(x, torch.tensor([p]), 1e4) for x, p in ((q, i), (k, j)))
        return float(torch.mul(*turned).sum())

    assert dot(3, 10) == pytest.approx(dot(503, 510), abs=1e-9)
    assert abs(dot(3, 10) - dot(3, 11)) > 1e-3
