"""Loading weights into parameters: right values, only the bytes that are needed, everything refused before a byte is read."""

import json
import os
from pathlib import Path

import pytest
import torch
from helpers import tiny_checkpoints as tiny
from safetensors.torch import load_file, save_file

from expertwire.engine.loader import reader, weights
from expertwire.engine.loader.checkpoint import Checkpoint
from expertwire.engine.loader.param_specs import ParamSpec
from expertwire.engine.loader.parameters import Destination

# A little model: D width 6, F expert width 5, E 4 experts, fused query and value (4 + 2 rows), one replicated expert.
D, F, E = 6, 5, 4
SPECS = {
    "qv": ParamSpec(shape=(6, D), fan_in=D),
    "w13": ParamSpec(shape=(3, 2 * F, D), fan_in=D),  # experts 1, 2 and 1 again
    "columns": ParamSpec(shape=(3, 4), fan_in=4),
    "norm": ParamSpec(shape=(D,), fan_in=None),
}
SHAPES = {"q": (4, D), "v": (2, D), "left": (3, 1), "right": (3, 3), "norm": (D,), "head": (9, D)}
SHAPES |= {f"{expert}.{name}": (F, D) for expert in range(E) for name in ("w1", "w3")}


def to(param, *region):
    return (Destination(param=param, region=region),)


def weight_map():
    gate, up = slice(0, F), slice(F, 2 * F)
    names = {"q": to("qv", slice(0, 4)), "v": to("qv", slice(4, 6)), "norm": to("norm"), "head": ()}
    names |= {"left": to("columns", slice(0, 3), slice(0, 1)), "right": to("columns", slice(0, 3), slice(1, 4))}
    for expert, slots in ((0, ()), (1, (0, 2)), (2, (1,)), (3, ())):
        for name, rows in (("w1", gate), ("w3", up)):
            names[f"{expert}.{name}"] = tuple(Destination(param="w13", region=(slot, rows)) for slot in slots)
    return names


def tensors(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


def save(folder, values):
    save_file(values, folder / "model.safetensors")
    return Checkpoint(folder)


def params(dtype=torch.float32):
    made = weights.allocate(SPECS, dtype, "cpu")
    for values in made.values():
        values.fill_(torch.nan)
    return made


def untouched(made):
    return all(values.isnan().all() for values in made.values())


@pytest.mark.parametrize("chunk_bytes", [1, 50, 1 << 20])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_region_gets_its_tensor(tmp_path, monkeypatch, dtype, stored, chunk_bytes):
    monkeypatch.setattr(reader, "CHUNK_BYTES", chunk_bytes)
    values, made = tensors(stored), params(dtype)
    weights.load_weights(save(tmp_path, values), weight_map(), made, progress=False)
    w13 = [torch.cat([values[f"{expert}.w1"], values[f"{expert}.w3"]]) for expert in (1, 2, 1)]
    expected = {
        "qv": torch.cat([values["q"], values["v"]]),
        "w13": torch.stack(w13),
        "columns": torch.cat([values["left"], values["right"]], dim=1),
        "norm": values["norm"],
    }
    for name, want in expected.items():
        torch.testing.assert_close(made[name], want.to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("shards", [1, 3])
def test_a_whole_checkpoint_round_trips(shards):
    folder = tiny.cached("qwen3_moe", dtype="bfloat16", shards=shards)
    checkpoint = Checkpoint(folder)
    made = {name: torch.empty(stored.shape) for name, stored in checkpoint.tensors.items()}
    weights.load_weights(checkpoint, {name: to(name) for name in made}, made, progress=False)
    for file in folder.glob("*.safetensors"):
        for name, values in load_file(file).items():
            torch.testing.assert_close(made.pop(name), values.float(), rtol=0, atol=0)
    assert not made


def test_scalars_and_empty_tensors(tmp_path):
    checkpoint = save(tmp_path, {"scalar": torch.tensor(3.0), "empty": torch.empty(0, 4), "hollow": torch.empty(4, 0)})
    made = {
        "scalar": torch.zeros(()),
        "empty": torch.empty(0, 4),
        "hollow": torch.empty(4, 0),
        "no expert": torch.empty(0, 2),
    }
    names = {name: to(name) for name in ("scalar", "empty", "hollow")}
    weights.load_weights(checkpoint, names, made, progress=False)
    assert made["scalar"] == 3


def bytes_read():
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


def test_only_the_own_experts_are_read(tmp_path):
    experts, size = 16, 1 << 16  # 256 KiB each
    checkpoint = save(tmp_path, {f"e{i}": torch.full((size,), float(i)) for i in range(experts)})
    mine = {3: 0, 9: 1}
    names = {f"e{i}": to("w", mine[i]) if i in mine else () for i in range(experts)}
    made = {"w": torch.empty(2, size)}
    before = bytes_read()
    weights.load_weights(checkpoint, names, made, progress=False)
    read = bytes_read() - before
    assert (made["w"][0] == 3).all() and (made["w"][1] == 9).all()
    assert 0 <= read - 2 * size * 4 < 16_000, f"{read} bytes read for {2 * size * 4}"


def test_files_of_other_ranks_are_not_opened(tmp_path):
    folder = tiny.make("qwen3", tmp_path / "checkpoint", shards=2)
    checkpoint = Checkpoint(folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    (folder / "model-00002-of-00002.safetensors").unlink()  # after the headers were verified
    first = [name for name, file in index.items() if file.startswith("model-00001")]
    made = {name: torch.empty(checkpoint.tensors[name].shape) for name in first}
    names = {name: to(name) if name in made else () for name in index}
    weights.load_weights(checkpoint, names, made, progress=False)
    assert all(values.isfinite().all() for values in made.values())


def refused(folder, values, names, made, message):
    with pytest.raises(ValueError, match=message):
        weights.load_weights(save(folder, values), names, made, progress=False)
    assert untouched(made)


def test_a_tensor_that_the_map_does_not_know_is_refused(tmp_path):
    refused(
        tmp_path, {**tensors(), "mtp.fc": torch.ones(2)}, weight_map(), params(), "does not know these tensors: mtp.fc$"
    )


def test_ten_names_are_listed_and_the_rest_counted(tmp_path):
    extra = {f"x{i:02}": torch.ones(1) for i in range(13)}
    refused(tmp_path, {**tensors(), **extra}, weight_map(), params(), "x00, x01, .*x09 and 3 more$")


def test_a_tensor_that_is_needed_must_be_there(tmp_path):
    values = tensors()
    del values["2.w3"], values["v"]
    refused(tmp_path, values, weight_map(), params(), "tensors that are missing: v, 2.w3$")


def test_a_tensor_that_is_not_read_here_may_be_missing(tmp_path):
    values, made = tensors(), params()
    del values["head"], values["3.w1"]
    weights.load_weights(save(tmp_path, values), weight_map(), made, progress=False)
    assert all(filled.isfinite().all() for filled in made.values())


@pytest.mark.parametrize("shape", [(D, F), (F, D + 1), (F * D,), (F, D, 1), (F + 1, D), ()])
def test_a_wrong_shape_is_refused(tmp_path, shape):
    values = {**tensors(), "1.w3": torch.ones(shape)}
    message = rf"wrong shapes: 1\.w3 is {list(shape)}, expected \[5, 6\]$".replace(str(list(shape)), rf"\{list(shape)}")
    refused(tmp_path, values, weight_map(), params(), message)


def test_a_parameter_that_stays_unfilled_is_refused(tmp_path):
    names = weight_map()
    names["2.w3"] = ()
    made = {**params(), "bias": torch.full((3,), torch.nan)}
    refused(tmp_path, tensors(), names, made, r"unfilled: w13 \(150 of 180 elements\), bias \(0 of 3 elements\)$")


@pytest.mark.parametrize(
    ("stored", "name"),
    [(torch.float64, "F64"), (torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3"), (torch.bool, "BOOL")],
)
def test_an_unsupported_stored_type_is_refused(tmp_path, stored, name):
    values = {**tensors(), "1.w3": torch.ones(F, D).to(stored)}
    message = rf"a type that is not supported there: 1\.w3 \({name}, allowed: F32, BF16, F16, F8_E8M0\)$"
    refused(tmp_path, values, weight_map(), params(), message)


def test_an_unsupported_type_that_is_not_read_does_no_harm(tmp_path):
    made = params()
    values = {**tensors(), "head": torch.ones(9, D, dtype=torch.float64)}
    weights.load_weights(save(tmp_path, values), weight_map(), made, progress=False)
    assert all(filled.isfinite().all() for filled in made.values())


@pytest.mark.parametrize(
    ("name", "destination"),
    [
        ("v", Destination(param="qv", region=(slice(3, 5),))),  # overlaps q; a row of the parameter has no source
        ("v", Destination(param="qv", region=(slice(5, 7),))),  # beyond the parameter
        ("v", Destination(param="nowhere")),
        ("2.w1", Destination(param="w13", region=(0, slice(0, F)))),  # where expert 1 is
    ],
)
def test_a_wrong_map_is_an_assertion(tmp_path, name, destination):
    with pytest.raises(AssertionError):
        weights.load_weights(save(tmp_path, tensors()), weight_map() | {name: (destination,)}, params(), progress=False)


def test_a_file_that_shrinks_after_it_was_opened(tmp_path):
    checkpoint = save(tmp_path, tensors())
    os.truncate(tmp_path / "model.safetensors", (tmp_path / "model.safetensors").stat().st_size // 2)
    with pytest.raises(ValueError, match=r"model\.safetensors became shorter while it was read"):
        weights.load_weights(checkpoint, weight_map(), params(), progress=False)


@pytest.mark.parametrize("progress", [True, False])
def test_the_progress_bar_counts_tensors_and_bytes(tmp_path, capsys, progress):
    weights.load_weights(save(tmp_path, tensors()), weight_map(), params(), progress=progress)
    shown = capsys.readouterr().err
    assert ("loading weights" in shown and "9/9 tensors" in shown) if progress else shown == ""


# ---- parts of tensors: experts that are fused, transposed, or alternate; scales that are repeated


@pytest.fixture(params=[1, 50, 1 << 20])
def chunk_bytes(request, monkeypatch):
    monkeypatch.setattr(reader, "CHUNK_BYTES", request.param)


def filled(folder, values, names, made):
    """The parameters, of what was nowhere before."""
    for param in made.values():
        param.view(torch.uint8).fill_(0xFF)
    weights.load_weights(save(folder, values), names, made, progress=False)
    return made


def several(param, *regions_and_sources, **more):
    return tuple(Destination(param=param, region=r, source=s, **more) for r, s in regions_and_sources)


@pytest.mark.usefixtures("chunk_bytes")
def test_parts_of_a_tensor(tmp_path):
    """Experts 2 and 0 out of all, gate rows above up rows, which alternate in the file."""
    whole = torch.randn(E, 2 * F, D)
    parts = [((slot, slice(p * F, p * F + F)), (e, slice(p, None, 2))) for slot, e in enumerate((2, 0)) for p in (0, 1)]
    names = {"all": several("w13", *parts, stored=tuple(whole.shape))}
    made = filled(tmp_path, {"all": whole}, names, {"w13": torch.empty(2, 2 * F, D)})
    expected = [torch.cat([whole[e, 0::2], whole[e, 1::2]]) for e in (2, 0)]
    assert torch.equal(made["w13"], torch.stack(expected))


@pytest.mark.usefixtures("chunk_bytes")
def test_transposed_parts(tmp_path):
    whole = torch.randn(E, D, 2 * F)
    parts = [((0, slice(p * F, p * F + F)), (3, slice(None), slice(p * F, p * F + F))) for p in (1, 0)]
    names = {"all": several("w13", *parts, stored=tuple(whole.shape), transposed=True)}
    made = filled(tmp_path, {"all": whole.bfloat16()}, names, {"w13": torch.empty(1, 2 * F, D)})
    assert torch.equal(made["w13"][0], whole[3].T.bfloat16().float())


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_number_is_repeated(tmp_path, shape):
    scale = torch.full(shape, 0.75)
    names = {
        "a": (Destination(param="scales", region=(0, slice(0, 5)), stored=shape, repeated=True),),
        "b": (Destination(param="scales", region=(0, slice(5, 7)), stored=(2, 1), repeated=True),),
    }
    made = filled(tmp_path, {"a": scale, "b": torch.tensor([[2.0], [3.0]])}, names, {"scales": torch.empty(1, 7)})
    assert made["scales"].tolist() == [[0.75] * 5 + [2.0, 3.0]]


def test_one_number_of_each_expert_is_repeated(tmp_path):
    values = {"all": torch.arange(4.0).view(4, 1, 1).bfloat16()}
    names = {"all": several("scales", ((0,), (3,)), ((1,), (1,)), stored=(4, 1, 1), repeated=True)}
    made = filled(tmp_path, values, names, {"scales": torch.empty(2, 5)})
    assert made["scales"].tolist() == [[3.0] * 5, [1.0] * 5]


def test_what_4_bits_and_exponents_are_called(tmp_path):
    """Bytes may be signed, and powers of two are kept as exponents, or become numbers where a parameter holds these."""
    powers = torch.tensor([0.25, 1.0, 8.0])
    values = {"bytes": torch.tensor([-1, 2], dtype=torch.int8), "kept": powers.to(torch.float8_e8m0fnu)}
    values["numbers"] = values["kept"].clone()
    made = {
        "bytes": torch.empty(2, dtype=torch.uint8),
        "kept": torch.empty(3, dtype=torch.uint8),
        "numbers": torch.empty(3),
    }
    made = filled(tmp_path, values, {name: to(name) for name in made}, made)
    assert made["bytes"].tolist() == [255, 2]
    assert made["kept"].tolist() == [125, 127, 130]
    assert torch.equal(made["numbers"], powers)


@pytest.mark.parametrize(
    ("dtype", "stored", "allowed"),
    [
        (torch.float8_e4m3fn, torch.bfloat16, "F8_E4M3"),
        (torch.int32, torch.int64, "I32"),
        (torch.uint8, torch.float8_e4m3fn, "U8, I8, F8_E8M0"),
        (torch.float8_e4m3fn, torch.uint8, "F8_E4M3"),
    ],
)
def test_packed_data_are_never_converted(tmp_path, dtype, stored, allowed):
    checkpoint = save(tmp_path, {"w": torch.ones(2, 3).to(stored)})
    message = rf"a type that is not supported there: w \(\w+, allowed: {allowed}\)$"
    with pytest.raises(ValueError, match=message):
        weights.load_weights(checkpoint, {"w": to("w")}, {"w": torch.empty(2, 3, dtype=dtype)}, progress=False)


def test_a_wrong_shape_of_fused_experts_is_refused(tmp_path):
    names = {"all": several("w", ((0,), (1,)), stored=(3, F, D))}
    made = {"w": torch.full((1, F, D), torch.nan)}
    refused(
        tmp_path, {"all": torch.ones(2, F, D)}, names, made, r"wrong shapes: all is \[2, 5, 6\], expected \[3, 5, 6\]$"
    )


def test_only_the_own_experts_of_a_fused_tensor_are_read(tmp_path):
    size = 1 << 15
    whole = torch.arange(16.0)[:, None, None].expand(16, 2, size).contiguous()
    names = {"all": several("w", ((0, slice(0, 2)), (3,)), ((1, slice(0, 2)), (9,)), stored=(16, 2, size))}
    checkpoint, made = save(tmp_path, {"all": whole}), {"w": torch.empty(2, 2, size)}
    before = bytes_read()
    weights.load_weights(checkpoint, names, made, progress=False)
    read = bytes_read() - before
    assert torch.equal(made["w"], whole[[3, 9]])
    assert 0 <= read - made["w"].nbytes < 16_000, f"{read} bytes read for {made['w'].nbytes}"


def test_tensors_that_are_skipped_by_name(tmp_path):
    values, made = {**tensors(), "mtp.0.fc": torch.ones(2), "a.vision": torch.ones(2, dtype=torch.int64)}, params()
    patterns = [r"mtp\..*", ".*vision"]
    weights.load_weights(save(tmp_path, values), weight_map(), made, ignored=patterns, progress=False)
    assert not any(param.isnan().any() for param in made.values())
    with pytest.raises(ValueError, match=r"does not know these tensors: a\.vision$"):
        # A pattern is of the whole name.
        weights.load_weights(
            save(tmp_path, values), weight_map(), params(), ignored=[r"mtp\..*", "vision"], progress=False
        )


def test_checking_needs_no_memory(tmp_path):
    checkpoint = save(tmp_path, tensors())
    on_meta = {name: torch.empty(spec.shape, device="meta") for name, spec in SPECS.items()}
    weights.check(checkpoint, weight_map(), on_meta)
    with pytest.raises(ValueError, match=r"are missing: more$"):
        weights.check(checkpoint, weight_map() | {"more": to("norm")}, on_meta)


def test_parameters_are_contiguous_and_of_the_models_dtype():
    made = weights.allocate(SPECS, torch.bfloat16, "cpu")
    assert all(values.dtype == torch.bfloat16 and values.is_contiguous() for values in made.values())
