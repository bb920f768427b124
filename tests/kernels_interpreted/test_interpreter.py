"""`bench.kernels.interpreter`: what bit tests take for granted of Triton's interpreter, on any CPU and with any numpy."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter as tritons

from expertwire.bench.kernels import interpreter


@triton.jit
def sum_kernel(number_ptr, out_ptr):
    total = 0
    for i in range(tl.load(number_ptr)):  # a number that was read is an index
        total += i
    tl.store(out_ptr, total)


def test_a_loaded_number_bounds_a_loop():
    out = torch.zeros(1, dtype=torch.int32)
    sum_kernel[(1,)](torch.tensor([5], dtype=torch.int32), out)
    assert out.item() == 10


def test_it_also_does_where_the_interpreter_makes_an_int_of_an_array(monkeypatch):
    """As Triton 3.6.0's does, which numpy 2.4 refuses."""
    monkeypatch.setattr(tritons, "_patch_lang_tensor", _as_in_triton_3_6(tritons._patch_lang_tensor))
    monkeypatch.setattr(tritons.InterpreterBuilder, "create_dot", None)
    with pytest.raises(Exception, match="scalars"):
        test_a_loaded_number_bounds_a_loop()
    interpreter.prepare()
    test_a_loaded_number_bounds_a_loop()


def _as_in_triton_3_6(patch_tensor):
    def patch(tensor, scope):
        patch_tensor(tensor, scope)

        def index(self):
            raise TypeError("only 0-dimensional arrays can be converted to Python scalars")

        scope.set_attr(tensor, "__index__", index)

    return patch


@triton.jit
def dot_kernel(a_ptr, b_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    k = tl.arange(0, K)
    a = tl.load(a_ptr + tl.arange(0, M)[:, None] * K + k[None, :])
    b = tl.load(b_ptr + k[:, None] + tl.arange(0, N)[None, :] * K)
    c = tl.dot(a, b, input_precision="ieee")
    tl.store(out_ptr + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :], c)


def dot(a, b):
    out = torch.full((len(a), len(b)), torch.nan)
    dot_kernel[(1,)](a, b, out, len(a), len(b), a.shape[1])
    return out


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_bits_of_a_product_do_not_depend_on_its_width(dtype):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(128, 256, generator=generator).to(dtype) for _ in range(2))
    whole = dot(a, b)
    np.testing.assert_allclose(whole, (a.double() @ b.double().T).float(), rtol=1e-5, atol=1e-5)
    for size in (16, 32, 64):
        assert torch.equal(dot(a, b[:size]), whole[:, :size])
        assert torch.equal(dot(a[:size], b), whole[:size])
