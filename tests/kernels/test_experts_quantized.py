"""Experts in every format and with every activation: each row gets its expert's output, whatever came with it, and what lies in
memory is about what the checkpoint holds."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from expertwire.kernels import formats
from expertwire.kernels.cpu import blocks, elementwise, gemm, routing
from expertwire.kernels.ops import experts
from expertwire.kernels.ops.experts import GroupedMlpWeights
from expertwire.kernels.ops.moe_block import MoeWeights
from expertwire.kernels.ops.variants import Activation, Routing

DTYPES = [torch.float32, torch.bfloat16]
FORMATS = ("dense", *formats.FORMATS)
CLAMPED = Activation("swiglu_clamped", alpha=1.3, limit=1.5)
ACTIVATIONS = {"swiglu": Activation(), "clamped": CLAMPED}
TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 1e-4}, torch.bfloat16: {"rtol": 2**-6, "atol": 4e-2}}
NUM_EXPERTS, WIDTH, INNER = 4, 160, 224  # blocks of 128 are cut off, of gate, up and down, and of columns
COUNTS = (3, 0, 17, 1)


def prepare(*weights, **options):
    return gemm.prepare_experts(GroupedMlpWeights(*weights, **options))


@pytest.fixture(params=[1, 3], ids=["packed", "library"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def normal(*shape, seed, scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weights_of(format, dtype, width=WIDTH, inner=INNER):
    """Rows and experts of different sizes, so that a scale in the wrong place shows."""
    w13 = normal(NUM_EXPERTS, 2 * inner, width, seed=1, scale=width**-0.5)
    w2 = normal(NUM_EXPERTS, width, inner, seed=2, scale=inner**-0.5)
    w13[:, :inner] *= torch.linspace(0.5, 2, inner)[:, None]
    w2 *= torch.linspace(0.5, 1.5, NUM_EXPERTS)[:, None, None]
    w13[:, :, ::7] *= 3
    if format == "dense":
        return w13.to(dtype), w2.to(dtype)
    return formats.quantize(format, w13, (inner, inner)), formats.quantize(format, w2)


def biases_of(width=WIDTH, inner=INNER):
    bias13_eF, bias2_eD = normal(NUM_EXPERTS, 2 * inner, seed=3), normal(NUM_EXPERTS, width, seed=4)
    return {"bias13_eF": bias13_eF.bfloat16(), "bias2_eD": bias2_eD.bfloat16()}


def rows_of(counts, dtype, width=WIDTH):
    x = normal(sum(counts) + 3, width, seed=5).to(dtype)
    index = torch.randint(len(x), (sum(counts),), generator=torch.Generator().manual_seed(6))
    return x, index, np.concatenate(([0], np.cumsum(counts)))


def formula(x, index, offsets, w13, w2, activation, bias13_eF=None, bias2_eD=None):
    """fp64, rounded to x's dtype where layers end; the activation by the published formulas."""
    dtype, rows = x.dtype, []
    for e, (start, end) in enumerate(pairwise(offsets)):
        product = x[index[start:end]].double() @ w13[e].double().T
        product += 0 if bias13_eF is None else bias13_eF[e].double()
        gate, up = product.to(dtype).double().chunk(2, dim=1)
        if activation.kind == "swiglu":
            hidden = (gate * gate.sigmoid()).to(dtype).double() * up
        else:
            gate, up = gate.clamp(max=activation.limit), up.clamp(-activation.limit, activation.limit)
            hidden = (gate * (activation.alpha * gate).sigmoid()).to(dtype).double() * (up + 1)
        y = hidden.to(dtype).double() @ w2[e].double().T
        rows.append(y + (0 if bias2_eD is None else bias2_eD[e].double()))
    return torch.cat(rows)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("biased", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)
@pytest.mark.parametrize("format", FORMATS)
def test_forward(format, activation, biased, dtype):
    w13, w2 = weights_of(format, dtype)
    biases = biases_of() if biased else {}
    rows = rows_of(COUNTS, dtype)
    expected = formula(*rows, *(formats.dequantize(w, dtype) for w in (w13, w2)), activation, **biases)
    y = prepare(w13, w2, activation=activation, **biases)(*rows)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), expected, **TOLERANCE[dtype])


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", formats.FORMATS)
def test_bits_are_those_of_unpacked_weights(format, dtype):
    """In every row of a panel, and in panels of which only some columns fill a block."""
    rows, options = rows_of(COUNTS, dtype), {"activation": CLAMPED, **biases_of()}
    w13, w2 = weights_of(format, dtype)
    plain = prepare(formats.dequantize(w13, dtype), formats.dequantize(w2, dtype), **options)
    assert torch.equal(prepare(w13, w2, **options)(*rows), plain(*rows))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", formats.FORMATS)
def test_bits_of_rows_do_not_depend_on_their_company(format, dtype):
    x, index, offsets = rows_of([2, 0, 65, 0], dtype)
    apply = prepare(*weights_of(format, dtype), activation=CLAMPED, **biases_of())
    whole = apply(x, index, offsets)
    for first, last in [(2, 3), (66, 67), (3, 67), (5, 22)]:  # 1, 1, 64 and 17 of 65
        alone = np.array([0, 0, 0, last - first, last - first])
        assert torch.equal(apply(x, index[first:last], alone), whole[first:last]), (first, last)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("format", FORMATS)
def test_an_expert_may_be_rewritten_in_place(format):
    """As when it moves: all of its bytes, in every array, and the next call computes with them."""
    dtype = torch.bfloat16
    apply = prepare(*weights_of(format, dtype), **biases_of())
    x, index, _ = rows_of([5], dtype)
    offsets = [np.array([0, *(5 * (e >= expert) for e in range(NUM_EXPERTS))]) for expert in (0, 2)]
    first, third = (apply(x, index, at) for at in offsets)
    assert not torch.equal(first, third)
    for array in apply.weights:
        assert array.shape[0] == NUM_EXPERTS
        assert array.is_contiguous()
        array[0].copy_(array[2])
    assert torch.equal(apply(x, index, offsets[0]), third)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("format", FORMATS)
def test_bytes_held(format):
    """Within 3 % of the checkpoint's, and these are all."""
    w13, w2 = weights_of(format, torch.bfloat16, 512, 256)
    published = sum(weight.nbytes for weight in (w13, w2))
    apply = prepare(w13, w2)
    held = sum(array.nbytes for array in apply.weights)
    zeros = NUM_EXPERTS * (2 * 256 + 512) * 4  # biases that there are not
    assert published <= held + (format == "nvfp4") * 100 <= 1.03 * published + zeros
    for _ in range(2):
        apply(*rows_of(COUNTS, torch.bfloat16, 512))
        assert sum(array.nbytes for array in apply.weights) == held


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("width", [(48, 40), (64, 24), (100, 64)], ids=str)
@pytest.mark.parametrize("format", ["fp8_block", "fp8_row"])
def test_other_widths(format, width):
    """That panels do not hold."""
    dtype, rows = torch.float32, rows_of(COUNTS, torch.float32, width[0])
    w13, w2 = weights_of(format, dtype, *width)
    expected = formula(*rows, *(formats.dequantize(w, dtype) for w in (w13, w2)), Activation())
    torch.testing.assert_close(prepare(w13, w2)(*rows).double(), expected, **TOLERANCE[dtype])


@pytest.mark.usefixtures("one_thread")
def test_every_code_and_extreme_scales():
    """All 256 bytes of each 4-bit format and all finite e4m3, beside scales that leave the normal numbers."""
    every = torch.arange(256, dtype=torch.uint8).repeat(2, 64, 1)
    exponents = torch.tensor([0, 1, 2, 126, 127, 254, 0, 90] * 2, dtype=torch.uint8).expand(2, 64, 16)
    fp8 = torch.where(every & 127 == 127, 0, every).to(torch.uint8).view(formats.FP8)
    cases = {
        "mxfp4": formats.QuantizedWeight(format="mxfp4", data=every, scales=exponents, parts=(32, 32)),
        "int4": formats.QuantizedWeight(
            format="int4", data=every.view(torch.int32), scales=exponents.float().bfloat16() / 7, parts=(32, 32)
        ),
        "fp8_row": formats.QuantizedWeight(
            format="fp8_row", data=fp8, scales=torch.logspace(-44, 35, 64).expand(2, 64), parts=(32, 32)
        ),
    }
    for format, w13 in cases.items():
        w2 = formats.quantize(format, normal(2, w13.shape[2], 32, seed=1))
        x = torch.zeros(w13.shape[2], w13.shape[2])
        x.fill_diagonal_(1)
        rows = x, torch.arange(len(x)), np.array([0, len(x), len(x)])
        plain = prepare(formats.dequantize(w13, torch.float32), formats.dequantize(w2, torch.float32))(*rows)
        assert torch.equal(prepare(w13, w2)(*rows).nan_to_num(7), plain.nan_to_num(7)), format


@pytest.mark.usefixtures("one_thread")
def test_weights_that_are_no_numbers():
    w13, w2 = weights_of("fp8_row", torch.float32)
    w2.data.view(torch.uint8)[3, 5, 7] = 0xFF
    with pytest.raises(ValueError, match=r"fp8_row.*NaN"):
        prepare(w13, w2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_gates(dtype):
    """The clamps hold, one-sided for gates; sigmoids of what is far out are 0 and 1."""
    gate = torch.tensor([-1e30, -100.0, -7.0, 0.0, 6.9, 7.0, 7.1, 1e30])[:, None].expand(8, 8).flatten()
    up = torch.tensor([-1e30, -7.1, -1.0, 0.0, 3.0, 7.0, 7.1, 1e30]).repeat(8)
    found = experts.gate_reference(torch.cat((gate, up)).to(dtype)[None], Activation("swiglu_clamped"))[0].double()
    gate, up = gate.to(dtype).double().clamp(max=7), up.to(dtype).double().clamp(-7, 7)
    expected = gate / (1 + torch.exp(-1.702 * gate)) * (up + 1)
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-6)


@pytest.mark.usefixtures("one_thread")
def test_fused_with_its_router():
    """The bits of the ops, one by one."""
    dtype = torch.bfloat16
    router = gemm.prepare_linear(normal(NUM_EXPERTS, WIDTH, seed=7).to(dtype))
    apply = prepare(*weights_of("mxfp4", dtype), activation=CLAMPED, **biases_of())
    norm, x, load = torch.rand(WIDTH).to(dtype), normal(9, WIDTH, seed=8).to(dtype), np.zeros(NUM_EXPERTS, np.int64)
    weights = MoeWeights(
        router=router,
        routing=Routing(top_k=2, renormalize=True),
        choice_bias=None,
        experts=apply,
        shared=None,
        norm_D=norm,
        eps=1e-6,
        log2phy_E=torch.arange(NUM_EXPERTS),
    )
    block = blocks.fuse_moe(weights)
    assert block is not None
    ids_TK, weights_TK = routing.route(router(x), weights.routing)
    order = ids_TK.flatten().sort(stable=True).indices
    offsets = np.concatenate(([0], np.cumsum(np.bincount(ids_TK.flatten(), minlength=NUM_EXPERTS))))
    rows_TKD = torch.empty(18, WIDTH, dtype=dtype)
    rows_TKD[order] = apply(x, order // 2, offsets)
    mixed = elementwise.combine(rows_TKD.unflatten(0, (9, 2)), weights_TK)
    expected = elementwise.add_rms_norm(x, mixed, norm, 1e-6)
    assert all(torch.equal(*pair) for pair in zip(block(x, x, load), expected, strict=True))
