"""Loading weights into parameters: right values, only the bytes that are needed, everything refused before a byte is read."""

import json
import os
from pathlib import Path

import pytest
import tiny_checkpoints as tiny
import torch
from safetensors.torch import load_file, save_file

from expertwire.engine import weights
from expertwire.engine.checkpoint import Checkpoint
from expertwire.engine.weight_map import Destination, ParamSpec

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
    monkeypatch.setattr(weights, "CHUNK_BYTES", chunk_bytes)
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
    made = {name: torch.empty(checkpoint.shape(name)) for name in checkpoint.names()}
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
    made = {name: torch.empty(checkpoint.shape(name)) for name in first}
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


@pytest.mark.parametrize("stored", [torch.float64, torch.int8, torch.float8_e4m3fn, torch.bool])
def test_an_unsupported_stored_type_is_refused(tmp_path, stored):
    values = {**tensors(), "1.w3": torch.ones(F, D).to(stored)}
    refused(
        tmp_path,
        values,
        weight_map(),
        params(),
        r"types other than F32, BF16, F16 are not supported yet: 1\.w3 \(\w+\)$",
    )


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


# ---- random weights


def dummy(specs, dtype=torch.float32, seed=0):
    made = weights.allocate(specs, dtype, "cpu")
    weights.dummy_weights(specs, made, seed)
    return made


def test_random_weights_have_the_scale_of_their_fan_in():
    specs = {
        "big": ParamSpec(shape=(3, 700, 1001), fan_in=1001),  # more than one chunk, no multiple of it
        "small": ParamSpec(shape=(7, 64), fan_in=16),
        "norm": ParamSpec(shape=(64,), fan_in=None),
        "none": ParamSpec(shape=(0, 8), fan_in=8),
    }
    made = dummy(specs)
    assert made["big"].numel() > weights.NOISE_SIZE
    assert made["big"].std() == pytest.approx(1001**-0.5, rel=0.01)
    assert abs(made["big"].mean()) < 1e-4
    assert made["small"].std() == pytest.approx(0.25, rel=0.15)
    assert (made["norm"] == 1).all()
    first, second, *_ = made["big"].view(-1).split(weights.NOISE_SIZE)
    assert not torch.equal(first[:1000], second[:1000])


def test_random_weights_depend_on_seed_and_name_alone():
    spec = ParamSpec(shape=(30, 20), fan_in=20)
    first = dummy({"a": spec, "b": spec})
    assert not torch.equal(first["a"], first["b"])
    assert not torch.equal(first["a"], dummy({"a": spec}, seed=1)["a"])
    assert torch.equal(first["b"], dummy({"b": spec})["b"])
    assert torch.equal(first["b"].bfloat16(), dummy({"b": spec}, torch.bfloat16)["b"])


# ---- memory


def test_the_bytes_of_parameters():
    made = weights.allocate(SPECS, torch.bfloat16, "cpu")
    assert weights.nbytes(SPECS, torch.bfloat16) == sum(values.nbytes for values in made.values())
    assert all(values.dtype == torch.bfloat16 and values.is_contiguous() for values in made.values())


def test_weights_that_do_not_fit_are_refused():
    free = weights.free_memory("cpu")
    assert free > 0
    weights.check_memory(1 << 20, "cpu", sharers=4)
    with pytest.raises(
        ValueError, match=r"need 900000\.00 GB, but only [\d.]+ GB .* free on cpu; use more ranks .*ep_size"
    ):
        weights.check_memory(9 * 10**14, "cpu")
    with pytest.raises(ValueError, match=r"GB on each of 1000000 ranks, but only"):
        weights.check_memory(free // 1000, "cpu", sharers=1_000_000)


def group(folder, limit, usage, stat, version):
    folder.mkdir(parents=True)
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    for name, value in zip((*names, "memory.stat"), (limit, usage, stat), strict=True):
        (folder / name).write_text(f"{value}\n")


def test_limits_of_control_groups(tmp_path):
    membership, mount = tmp_path / "cgroup", tmp_path / "mount"
    assert weights.cgroup_free(membership, mount) == []
    membership.write_text("4:cpu,memory:/a/b\n3:cpuset:/\n0::/c/d\n")
    group(mount / "memory/a", 1000, 900, "total_active_file 5\ntotal_inactive_file 20\nactive_file 1", 1)
    group(mount / "c/d", "max", 7, "anon 7", 2)
    assert weights.cgroup_free(membership, mount) == [125]
    (mount / "c/memory.max").write_text("500\n")
    (mount / "c/memory.current").write_text("480\n")
    (mount / "c/memory.stat").write_text("anon 400\nactive_file 30\ninactive_file 40\n")
    assert sorted(weights.cgroup_free(membership, mount)) == [90, 125]
