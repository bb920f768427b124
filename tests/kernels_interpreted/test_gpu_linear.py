"""The dense product: against its reference, and bit for bit for any number of rows."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from expertwire.kernels import formats
from expertwire.kernels.gpu import linear as gpu
from expertwire.kernels.gpu.device import Device
from expertwire.kernels.ops import linear

DEVICE = Device(arch=90, num_sms=4)


def inputs(tokens, rows, width, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(*shape, generator=generator).to(dtype) for shape in ((tokens, width), (rows, width), (rows,))
    )


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Fill memory that a kernel fails to write, or reads before it is written, with NaN."""
    empty = torch.Tensor.new_empty

    def poisoned(self, *args, **kwargs):
        done = empty(self, *args, **kwargs)
        return done.fill_(torch.nan) if done.is_floating_point() else done

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("tokens", "rows", "width"), [(0, 8, 16), (1, 1, 1), (3, 65, 130), (17, 128, 256), (130, 70, 96), (2, 40, 1100)]
)
def test_product(dtype, bias, tokens, rows, width):
    x, w, b = inputs(tokens, rows, width, dtype)
    b = b if bias else None
    done = gpu.prepare(w, b, device=DEVICE)(x)
    assert done.dtype == dtype
    torch.testing.assert_close(
        done, linear.reference(x, w, b), rtol=2e-3 if dtype == torch.float16 else 1e-4, atol=1e-4
    )


@pytest.mark.parametrize(("rows", "width"), [(96, 1024), (200, 600)])
def test_a_row_has_the_same_bits_alone_and_in_a_batch(rows, width):
    x, w, b = inputs(200, rows, width, torch.float16)
    apply = gpu.prepare(w, b, device=DEVICE, out_dtype=torch.float32)
    plans = [gpu.tile_config(tokens, rows, width, torch.float16, DEVICE) for tokens in (1, 200)]
    assert plans[0].splits == plans[1].splits > 1
    assert plans[0].side_by_side > plans[1].side_by_side
    whole = apply(x)
    for tokens in (1, 20, 100):
        assert torch.equal(apply(x[:tokens]), whole[:tokens])
    assert torch.equal(apply(x[57:58]), whole[57:58])


def test_the_counters_are_ready_for_the_next_call():
    x, w, _ = inputs(3, 70, 1024, torch.float32)
    apply = gpu.prepare(w, device=DEVICE)
    assert torch.equal(apply(x), apply(x))


def test_fp32_results_are_not_rounded_and_rows_of_a_wider_tensor_are_read_in_place():
    x, w, _ = inputs(5, 33, 192, torch.float16)
    done = gpu.prepare(w[:, :128].contiguous(), device=DEVICE, out_dtype=torch.float32)(x[:, :128])
    torch.testing.assert_close(done, x[:, :128].float() @ w[:, :128].float().T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 140])
def test_an_fp32_weight_in_three_terms_is_exact(tokens, monkeypatch):
    """Activations would be bf16; for the interpreter, their values and the terms' are held in fp32."""
    x, w, _ = inputs(tokens, 66, 256, torch.float32)
    x = x.bfloat16().float()
    terms = gpu.three_terms(w)
    assert torch.equal(sum(term.double() for term in terms), w.double())
    weight = torch.cat([term.float() for term in terms], dim=1)
    y, counters = x.new_empty(tokens, 66), torch.zeros(2, dtype=torch.int32)
    gpu._launch(x, gpu.Matrix(format="dense", data=weight), None, y, counters, DEVICE)
    torch.testing.assert_close(y.double(), x.double() @ w.double().T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("tokens", "width"), [(1, 72), (140, 1000), (3, 64)])
def test_an_fp32_weight_of_any_width_meets_bf16_activations(tokens, width, monkeypatch):
    """As a router in fp32 does. For the interpreter, values in bf16 are held in fp32."""
    launch = gpu._launch
    widened = lambda x, matrix, *rest: launch(x.float(), replace(matrix, data=matrix.data.float()), *rest)  # noqa: E731
    monkeypatch.setattr(gpu, "_launch", widened)
    monkeypatch.setattr(gpu, "tile_config", partial(_of_bf16, gpu.tile_config))
    x, w, b = inputs(tokens, 8, width, torch.float32)
    x = x.bfloat16()
    done = gpu.prepare(w, b, device=DEVICE, x_dtype=torch.bfloat16, out_dtype=torch.float32)(x)
    torch.testing.assert_close(done, linear.reference(x.float(), w, b), rtol=1e-5, atol=1e-4)


def _of_bf16(tile_config, num_tokens, num_rows, depth, dtype, device):
    return tile_config(num_tokens, num_rows, depth, torch.bfloat16, device)


@pytest.mark.parametrize("format", ["fp8_block", "fp8_row"])
@pytest.mark.parametrize(
    ("tokens", "parts", "width"),
    [(1, (128, 64), 256), (3, (70, 130, 1), 200), (130, (96,), 320), (2, (40, 33), 1100), (140, (200,), 1100)],
)
def test_an_fp8_weight_is_kept_and_gives_the_bits_of_the_unpacked_one(monkeypatch, format, tokens, parts, width):
    """Stacked parts begin new blocks wherever they end; 1,100 inputs are cut into splits, in one program or several."""
    x, w, b = inputs(tokens, sum(parts), width, torch.float16)
    weight = formats.quantize(format, w * torch.linspace(0.1, 9, len(w))[:, None], parts)
    expected = gpu.prepare(formats.dequantize(weight, x.dtype), b, device=DEVICE)(x)
    monkeypatch.setattr(gpu, "unpacked", lambda *_: pytest.fail("it was unpacked"))
    done = gpu.prepare(weight, b, device=DEVICE, dtype=x.dtype)(x)
    assert torch.equal(done, expected)
    reference = linear.reference(x, formats.dequantize(weight, x.dtype), b)
    torch.testing.assert_close(done, reference, rtol=2e-3, atol=5e-3)


def test_other_formats_are_unpacked():
    x, w, _ = inputs(3, 64, 256, torch.float16)
    weight = formats.quantize("mxfp4", w)
    expected = gpu.prepare(formats.dequantize(weight, x.dtype), device=DEVICE)(x)
    assert torch.equal(gpu.prepare(weight, device=DEVICE, dtype=x.dtype)(x), expected)


def test_what_the_kernel_cannot_do_is_refused():
    _, w, _ = inputs(1, 8, 16, torch.float32)
    with pytest.raises(ValueError, match=r"dtype is float32.*allowed is bfloat16"):
        gpu.prepare(w, device=Device(arch=100, num_sms=4))
    with pytest.raises(AssertionError, match=r"float16 for 16"):
        gpu.prepare(w, device=DEVICE)(torch.zeros(1, 16, dtype=torch.float16))
