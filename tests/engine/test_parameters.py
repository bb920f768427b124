"""Parameters are found in a checkpoint however they are stored: alone or fused, by rows or columns, quantized or not.

E experts, D model width, F expert width, e experts here.
"""

import pytest
import torch
from safetensors.torch import save_file

from expertwire.engine.layers import experts
from expertwire.engine.loader import weights
from expertwire.engine.loader.checkpoint import Checkpoint
from expertwire.engine.loader.parameters import ParameterLayout
from expertwire.engine.models.model_config import DEFAULT_NAMES, MoeConfig, QuantizationConfig, TensorNames
from expertwire.kernels.formats import QuantizedWeight, dequantize

E, D, F = 4, 64, 160  # F is no multiple of a block of 128
HERE = (2, 0, 2)  # an expert twice, two of them elsewhere
MOE = MoeConfig(num_experts=E, top_k=2, intermediate_size=F, renormalize=True)
FP8_BLOCK = QuantizationConfig(linear_method="fp8_block", expert_method="fp8_block")
FP8_STATIC = QuantizationConfig(linear_method="fp8_static", expert_method="fp8_static")


def random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


GATE, UP, DOWN = random(E, F, D), random(E, F, D + 1)[..., :D].contiguous(), random(E, D, F)
W13 = torch.cat([GATE, UP], dim=1)
PAIRS = torch.stack([GATE, UP], dim=2).flatten(1, 2)  # gate and up rows alternate


def one_by_one():
    tensors = {}
    for e in range(E):
        for name, stacked in (("gate_proj", GATE), ("up_proj", UP), ("down_proj", DOWN)):
            tensors[f"m.experts.{e}.{name}.weight"] = stacked[e]
    return tensors


def fused(w13, down):
    return {"m.experts.gate_up_proj": w13, "m.experts.down_proj": down}


def declare_experts(names=DEFAULT_NAMES, moe=MOE, here=HERE):
    return lambda layout: experts.declare(layout, "p.", "m.", moe, names, D, here)


def loaded(folder, tensors, declare, quantization=None):
    """The parameters of what is declared, from a checkpoint of these tensors."""
    save_file({name: values.contiguous() for name, values in tensors.items()}, folder / "model.safetensors")
    checkpoint = Checkpoint(folder)
    layout = ParameterLayout(stored=checkpoint.tensors, quantization=quantization)
    declare(layout)
    params = weights.allocate(layout.specs, torch.float32, "cpu")
    weights.load_weights(checkpoint, layout.sources, params, progress=False)
    return layout.loaded(params)


def equal(found, expected):
    found = dequantize(found, torch.float32) if isinstance(found, QuantizedWeight) else found
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("tensors", "names"),
    [
        (one_by_one(), TensorNames()),
        (fused(W13, DOWN), TensorNames()),
        (fused(PAIRS, DOWN), TensorNames(interleaved=True)),
        (fused(W13.mT, DOWN.mT), TensorNames(fused_layout="columns")),
        (fused(PAIRS.mT, DOWN.mT), TensorNames(fused_layout="columns", interleaved=True)),
    ],
    ids=["one by one", "rows", "alternating rows", "columns", "alternating columns"],
)
@pytest.mark.parametrize("quantization", [None, FP8_BLOCK], ids=["", "experts left out of the quantisation"])
def test_experts_as_they_are(tmp_path, tensors, names, quantization):
    found = loaded(tmp_path, tensors, declare_experts(names), quantization)
    equal(found.weight("p.w13"), W13[list(HERE)])
    equal(found.weight("p.w2"), DOWN[list(HERE)])
    assert not found.rest()


@pytest.mark.parametrize("pairs", [False, True])
def test_biases_of_fused_experts(tmp_path, pairs):
    moe = MoeConfig(num_experts=E, top_k=2, intermediate_size=F, renormalize=True, bias=True)
    biases = {"m.experts.gate_up_proj_bias": random(E, 2 * F), "m.experts.down_proj_bias": random(E, D)}
    tensors = fused(PAIRS if pairs else W13, DOWN) | biases
    found = loaded(tmp_path, tensors, declare_experts(TensorNames(interleaved=pairs), moe))
    given = biases["m.experts.gate_up_proj_bias"]
    stacked = torch.cat([given[:, 0::2], given[:, 1::2]], dim=1) if pairs else given
    equal(found.tensor("p.w13_bias"), stacked[list(HERE)])
    equal(found.tensor("p.w2_bias"), biases["m.experts.down_proj_bias"][list(HERE)])


# ---- FP8 in blocks of 128 x 128, of which those at an edge are cut


def blocks_of(w):
    """Data and scales [..., blocks, blocks] of matrices [..., M, K], and the matrices."""
    M, K = w.shape[-2:]
    data, scales = w.to(torch.float8_e4m3fn), random(*w.shape[:-2], -(-M // 128), -(-K // 128)).abs()
    wide = scales.repeat_interleave(128, -2)[..., :M, :].repeat_interleave(128, -1)[..., :K]
    return data, scales, data.float() * wide


def block_experts():
    right = {}
    tensors = {}
    for name, stacked in (("gate_proj", GATE), ("up_proj", UP), ("down_proj", DOWN)):
        data, scales, right[name] = blocks_of(stacked)
        for e in range(E):
            tensors[f"m.experts.{e}.{name}.weight"] = data[e]
            tensors[f"m.experts.{e}.{name}.weight_scale_inv"] = scales[e]
    return tensors, torch.cat([right["gate_proj"], right["up_proj"]], dim=1), right["down_proj"]


def test_the_blocks_of_up_begin_anew_behind_gate(tmp_path):
    tensors, w13, w2 = block_experts()
    found = loaded(tmp_path, tensors, declare_experts(), FP8_BLOCK)
    equal(found.weight("p.w13"), w13[list(HERE)])
    equal(found.weight("p.w2"), w2[list(HERE)])


def test_stacked_modules_of_a_linear_layer(tmp_path):
    sizes = {"q": 160, "k": 32, "v": 130}
    tensors, right = {}, []
    for name, size in sizes.items():
        tensors[f"{name}.weight"], tensors[f"{name}.weight_scale_inv"], matrix = blocks_of(random(size, D))
        right.append(matrix)
    found = loaded(tmp_path, tensors, lambda layout: layout.matrix("qkv", *sizes.items(), columns=D), FP8_BLOCK)
    equal(found.weight("qkv"), torch.cat(right))


TURNS, PARTS = 2, (256, 256, 512)


def in_turns(parts):
    """The rows of stacked matrices as a module has them: a share of each, in turns."""
    return torch.cat([share for turn in zip(*(part.chunk(TURNS) for part in parts), strict=True) for share in turn])


def declare_in_turns(layout):
    layout.matrix_in_turns("qkv", "m", PARTS, TURNS, columns=D)


@pytest.mark.parametrize("is_quantized", [False, True])
def test_rows_in_turns(tmp_path, is_quantized):
    stored = in_turns(random(sum(PARTS), D).split(PARTS))
    tensors, right = {"m.weight": stored}, stored
    if is_quantized:
        tensors["m.weight"], tensors["m.weight_scale_inv"], right = blocks_of(stored)
    found = loaded(tmp_path, tensors, declare_in_turns, FP8_BLOCK)
    shares = right.split([size // TURNS for size in PARTS] * TURNS)
    equal(found.weight("qkv"), torch.cat([torch.cat(shares[p :: len(PARTS)]) for p in range(len(PARTS))]))


def test_rows_in_turns_that_cut_blocks_are_refused(tmp_path):
    data, scales, _ = blocks_of(random(320, D))
    tensors = {"m.weight": data, "m.weight_scale_inv": scales}
    with pytest.raises(ValueError, match=r"rows in turns of \[80, 80\]: allowed are blocks of fp8"):
        loaded(tmp_path, tensors, lambda layout: layout.matrix_in_turns("x", "m", (160, 160), 2, columns=D), FP8_BLOCK)


def test_norms_that_are_stored_less_one():
    layout = ParameterLayout(stored=None, quantization=None, zero_centred_norms=True)
    layout.norm("norm", ("norm.weight", 3))
    layout.vector("other", ("other.weight", 3))
    assert layout.specs["norm"].dtype == torch.float32
    found = layout.loaded({"norm": torch.tensor([0.0, 0.5, -1.0]), "other": torch.zeros(3)})
    equal(found.tensor("norm"), torch.tensor([1.0, 1.5, 0.0]))
    equal(found.tensor("other"), torch.zeros(3))


def test_modules_that_are_left_out_of_the_quantisation(tmp_path):
    """The tensors show which modules these are, whatever the config says."""
    data, scales, right = blocks_of(random(160, D))
    plain = random(40, D)
    tensors = {"o.weight": data, "o.weight_scale_inv": scales, "head.weight": plain}

    def declare(layout):
        layout.matrix("o", ("o", 160), columns=D)
        layout.matrix("head", ("head", 40), columns=D)

    found = loaded(tmp_path, tensors, declare, FP8_BLOCK)
    equal(found.weight("o"), right)
    equal(found.weight("head"), plain)


# ---- one scale for many rows, in all the shapes that are published


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (160,), (160, 1)], ids=str)
def test_scales_of_a_module(tmp_path, shape):
    data, scales = random(160, D).to(torch.float8_e4m3fn), random(*shape, 1).abs()[..., 0]
    tensors = {"o.weight": data, "o.weight_scale_inv": scales.bfloat16()}
    found = loaded(tmp_path, tensors, lambda layout: layout.matrix("o", ("o", 160), columns=D), FP8_STATIC)
    equal(found.weight("o"), data.float() * scales.bfloat16().float().view(-1, 1))


@pytest.mark.parametrize("shape", [(E,), (E, 1), (E, 1, 1), (E, 2 * F, 1), (E, 2 * F)], ids=str)
def test_scales_of_fused_experts(tmp_path, shape):
    data, scales = W13.to(torch.float8_e4m3fn), random(*shape).abs()
    down, down_scales = DOWN.to(torch.float8_e4m3fn), random(E, 1, 1).abs()
    tensors = fused(data, down) | {
        "m.experts.gate_up_proj_scale_inv": scales,
        "m.experts.down_proj_scale_inv": down_scales,
    }
    tensors |= {
        "m.experts.gate_up_proj_activation_scale": torch.ones(()),
        "m.experts.down_proj_activation_scale": torch.ones(()),
    }
    found = loaded(tmp_path, tensors, declare_experts(), FP8_STATIC)
    equal(found.weight("p.w13"), (data.float() * scales.view(E, -1, 1))[list(HERE)])
    equal(found.weight("p.w2"), (down.float() * down_scales)[list(HERE)])


# ---- what is missing or wrong


@pytest.mark.parametrize("name", ["m.experts.2.up_proj", "m.experts.0.gate_proj", "m.experts.0.down_proj"])
def test_a_scale_that_is_missing_is_named(tmp_path, name):
    tensors, *_ = block_experts()
    del tensors[f"{name}.weight_scale_inv"]
    with pytest.raises(ValueError, match=f"tensors that are missing: {name}.weight_scale_inv$"):
        loaded(tmp_path, tensors, declare_experts(), FP8_BLOCK)


def test_all_scales_of_a_matrix_that_are_missing_are_named(tmp_path):
    declare = lambda layout: layout.matrix("kv", ("k", 32), ("v", 32), columns=D)  # noqa: E731
    tensors = {f"{name}.weight": random(32, D).to(torch.float8_e4m3fn) for name in "kv"}
    with pytest.raises(ValueError, match=r"are missing: k\.weight_scale_inv, v\.weight_scale_inv$"):
        loaded(tmp_path, tensors, declare, FP8_BLOCK)


def test_scales_that_no_config_speaks_of_are_not_known(tmp_path):
    tensors, *_ = block_experts()
    with pytest.raises(
        ValueError, match=r"does not know these tensors: m\.experts\.0\.down_proj\.weight_scale_inv, .* more"
    ):
        loaded(tmp_path, tensors, declare_experts(), None)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("m.experts.2.up_proj.weight_scale_inv", (1, 1), r"is \[1, 1\], expected \[2, 1\]"),
        ("m.experts.2.up_proj.weight", (F, D + 1), r"is \[160, 65\], expected \[160, 64\]"),
    ],
)
def test_a_wrong_shape_is_named(tmp_path, name, shape, message):
    tensors, *_ = block_experts()
    tensors[name] = torch.ones(shape).to(tensors[name].dtype)
    with pytest.raises(ValueError, match=f"wrong shapes: {name.replace('.', '[.]')} {message}$"):
        loaded(tmp_path, tensors, declare_experts(), FP8_BLOCK)


def test_a_wrong_shape_of_fused_experts_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"m\.experts\.gate_up_proj is \[4, 64, 320\], expected \[4, 320, 64\]$"):
        loaded(tmp_path, fused(W13.mT, DOWN), declare_experts())


def test_a_width_that_a_format_cannot_have(tmp_path):
    layout = ParameterLayout(stored=None, quantization=QuantizationConfig(linear_method="nvfp4", expert_method="nvfp4"))
    with pytest.raises(ValueError, match="o is stored as nvfp4: its 40 columns must be a multiple of 16"):
        layout.matrix("o", ("o", 8), columns=40)


# ---- what this rank does not hold, and no checkpoint at all


def test_only_experts_that_are_here_are_read(tmp_path):
    names = block_experts()[0]
    save_file(names, tmp_path / "model.safetensors")
    layout = ParameterLayout(stored=Checkpoint(tmp_path).tensors, quantization=FP8_BLOCK)
    declare_experts()(layout)
    assert layout.sources.keys() == names.keys()
    read = {name for name, destinations in layout.sources.items() if destinations}
    assert read == {name for name in names if name.split(".")[2] in "02"}


@pytest.mark.parametrize("method", ["fp8_block", "fp8_static", "int4", "mxfp4", "nvfp4"])
def test_random_weights_of_a_format(method):
    """Without a checkpoint the config says what is quantised; experts are the same wherever they are, and of usual size."""
    quantization = QuantizationConfig(linear_method=method, expert_method=method, ignored_modules=("head", "*.o"))

    def made(here):
        layout = ParameterLayout(stored=None, quantization=quantization)
        declare_experts(here=here)(layout)
        layout.matrix("a.q", ("a.q", 32), columns=D)
        layout.matrix("a.o", ("a.o", 32), columns=D)
        params = weights.allocate(layout.specs, torch.bfloat16, "cpu")
        weights.dummy_weights(layout.specs, params, seed=0)
        return layout.loaded(params)

    some, all_of_them = made(HERE), made(range(E))
    assert isinstance(some.weight("a.q"), QuantizedWeight)
    assert isinstance(some.weight("a.o"), torch.Tensor)
    for name, columns in (("p.w13", D), ("p.w2", F)):
        few, every = some.weight(name), all_of_them.weight(name)
        assert isinstance(few, QuantizedWeight)
        few, every = dequantize(few, torch.float32), dequantize(every, torch.float32)
        assert torch.equal(few, every[list(HERE)])
        assert 0.4 < every.nan_to_num().std() * columns**0.5 < 2.5
