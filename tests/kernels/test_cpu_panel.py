"""The product of a few rows with a panel, of every kind that the processor can multiply, whichever of them `multiply` chooses."""

import numpy as np
import pytest
import torch

from expertwire.kernels.cpu._llvm import LANES, PANEL, add_product, allocating_jit, as_array, empty, panels

NUM_K = 96
PAIRS = pytest.param(
    torch.bfloat16,
    torch.bfloat16,
    marks=pytest.mark.skipif(not panels.MULTIPLIES_PAIRS, reason="the processor does not multiply pairs of bf16"),
    id="pairs",
)
KINDS = [
    pytest.param(torch.float32, torch.float32, id="numbers"),
    pytest.param(torch.float32, torch.bfloat16, id="numbers by pairs"),
    PAIRS,
]


@allocating_jit
def _multiply(num_rows, x, w, num_k, y):
    done = 0
    while done < num_rows:
        done += panels.multiply_rows(num_rows - done, x, done * x.shape[1], x.shape[1], w, 0, 0, num_k, y, done * PANEL)
    return done


def multiply(x, w):
    """Rows of x [M, K] by a panel of w [32, K]."""
    stored = as_array(w)
    stored = stored.view(np.uint32) if w.dtype == torch.bfloat16 else stored
    packed = empty((1, stored.shape[1], PANEL), stored.dtype)
    panels.pack_rows(stored, np.array([0, LANES]), packed)
    found = np.full((len(x) + 1, PANEL), 7, np.float32)
    assert _multiply(len(x), as_array(x), packed, packed.shape[1], found) == len(x)
    assert (found[-1] == 7).all()
    return torch.from_numpy(found[:-1])


@pytest.mark.parametrize(("dtype", "weights"), KINDS)
@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 5, 8, 12, 31])
def test_rows_by_a_panel(num_rows, dtype, weights):
    x, w = torch.randn(num_rows, NUM_K).to(dtype), torch.randn(PANEL, NUM_K).to(weights)
    torch.testing.assert_close(multiply(x, w), (x.double() @ w.double().T).float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dtype", "weights"), KINDS)
def test_a_row_has_the_same_bits_in_any_company(dtype, weights):
    x, w = torch.randn(31, NUM_K).to(dtype), torch.randn(PANEL, NUM_K).to(weights)
    whole = multiply(x, w)
    for num_rows in (1, 2, 5, 13):
        for first in (0, 7):
            found = multiply(x[first : first + num_rows].contiguous(), w)
            torch.testing.assert_close(found, whole[first : first + num_rows], rtol=0, atol=0)


@pytest.mark.parametrize(("dtype", "weights"), [PAIRS])
def test_both_numbers_of_a_pair_count_in_full(dtype, weights):
    """Products that fp32 holds and bf16 does not, each number's alone."""
    x, w = torch.zeros(2, NUM_K, dtype=dtype), torch.zeros(PANEL, NUM_K, dtype=weights)
    x[0, 10], x[1, 11], w[:, 10], w[:, 11] = 1.0078125, 1.0078125, 1.0078125, -2.0156250
    expected = torch.tensor([1.0078125**2, -1.0078125 * 2.015625])
    torch.testing.assert_close(multiply(x, w), expected[:, None].expand(2, PANEL), rtol=0, atol=0)


@allocating_jit
def _add_product(x, num_k, w, num_n, y):
    add_product(x, 1, x.shape[1], len(x), num_k, w, 0, w.shape[1], num_n, y, 2, y.shape[1])


@pytest.mark.parametrize("num_rows", [1, 2, 3, 5, 12, 13, 31])
@pytest.mark.parametrize("num_k", [0, 1, 17])
def test_product_with_a_part_of_a_matrix(num_rows, num_k):
    """It begins at any element, is added to what there is, and writes nothing else."""
    x, w, y = torch.randn(num_rows, 20), torch.randn(18, 70), torch.randn(num_rows, 80)
    expected = y.clone()
    expected[:, 2:66] += x[:, 1 : 1 + num_k] @ w[:num_k, :64]
    _add_product(x.numpy(), num_k, w.numpy(), 64, y.numpy())
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    for m in range(num_rows):
        alone = torch.zeros(1, 80)
        _add_product(x[m : m + 1].numpy(), num_k, w.numpy(), 64, alone.numpy())
        rows = torch.zeros(num_rows, 80)
        _add_product(x.numpy(), num_k, w.numpy(), 64, rows.numpy())
        assert torch.equal(alone[0], rows[m])
