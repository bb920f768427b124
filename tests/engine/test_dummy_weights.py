"""Random weights without a checkpoint, and whether weights fit in memory."""

import pytest
import torch

from expertwire.engine.loader import weights
from expertwire.engine.loader.param_specs import ParamSpec


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


def test_random_weights_of_other_kinds():
    """A value instead of random numbers, random bits of packed numbers, and experts by their logical ids."""
    specs = {
        "scales": ParamSpec(shape=(4, 2), fan_in=None, value=0.25, dtype=torch.bfloat16),
        "exponents": ParamSpec(shape=(4,), fan_in=None, value=125, dtype=torch.uint8),
        "codes": ParamSpec(shape=(3, 64, 64), fan_in=None, value=None, dtype=torch.uint8, experts=(5, 1, 5)),
        "words": ParamSpec(shape=(64, 64), fan_in=None, value=None, dtype=torch.int32),
        "fp8": ParamSpec(shape=(64, 64), fan_in=1, dtype=torch.float8_e4m3fn),
        "w": ParamSpec(shape=(3, 8, 8), fan_in=8, experts=(5, 1, 5)),
    }
    made = dummy(specs)
    assert {name: param.dtype for name, param in made.items()} == {
        name: spec.dtype or torch.float32 for name, spec in specs.items()
    }
    assert (made["scales"] == 0.25).all() and (made["exponents"] == 125).all()
    assert len(made["codes"].unique()) == 256 and len(made["words"].unique()) > 4000
    assert made["fp8"].float().std() == pytest.approx(1, rel=0.05)
    for name in ("codes", "w"):
        assert torch.equal(made[name][0], made[name][2])
        assert not torch.equal(made[name][0], made[name][1])
        alone = dummy({name: ParamSpec(**{**vars(specs[name]), "shape": (1, *specs[name].shape[1:]), "experts": (1,)})})
        assert torch.equal(alone[name][0], made[name][1])


def test_random_weights_depend_on_seed_and_name_alone():
    spec = ParamSpec(shape=(30, 20), fan_in=20)
    first = dummy({"a": spec, "b": spec})
    assert not torch.equal(first["a"], first["b"])
    assert not torch.equal(first["a"], dummy({"a": spec}, seed=1)["a"])
    assert torch.equal(first["b"], dummy({"b": spec})["b"])
    assert torch.equal(first["b"].bfloat16(), dummy({"b": spec}, torch.bfloat16)["b"])


# ---- memory


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
