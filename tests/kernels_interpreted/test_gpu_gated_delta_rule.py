"""The gated delta rule against its reference; bits that do not depend on how steps cut a sequence."""

import functools

import pytest
import torch
from helpers.delta_scenes import Scene, random_cuts

from expertwire.kernels.gpu.gated_delta_rule import gated_delta_rule
from expertwire.kernels.ops.gated_delta_rule import reference

TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 2e-6}, torch.float16: {"rtol": 2**-10, "atol": 2**-12}}
SIZES = {"keys": 2, "heads": 4, "key_size": 16, "value_size": 32}
LENGTHS = [1, 17, 64, 70]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("sizes", [(2, 4, 16, 32), (1, 1, 32, 16), (1, 3, 16, 64)], ids=str)
def test_reference(dtype, sizes):
    keys, heads, key_size, value_size = sizes
    shape = {"keys": keys, "heads": heads, "key_size": key_size, "value_size": value_size, "every": 64}
    expected = Scene(LENGTHS, dtype, **shape).whole(reference)
    found = Scene(LENGTHS, dtype, **shape).whole(gated_delta_rule, unused=2)
    for out, known in zip(found, expected, strict=True):
        assert out.dtype == dtype
        torch.testing.assert_close(out, known, **TOLERANCE[dtype])


@pytest.mark.parametrize(("dtype", "every"), [(torch.float32, 64), (torch.float16, 128)])
def test_bits_do_not_depend_on_cuts(dtype, every):
    scene = Scene([150, 67], dtype, every=every, **SIZES)
    expected = scene.whole(gated_delta_rule)
    cuts = [random_cuts(length, length) for length in (150, 67)]
    steps = [[cut[n] if n < len(cut) else 0 for cut in cuts] for n in range(max(map(len, cuts)))]
    other = Scene([150, 67], dtype, every=every, **SIZES)
    found = other.run(gated_delta_rule, steps, unused=1)
    assert all(torch.equal(out, known) for out, known in zip(found, expected, strict=True)), cuts
    assert all(torch.equal(other.snapshot(i), scene.snapshot(i)) for i in range(2))


def test_one_by_one():
    scene = Scene([70], torch.float32, every=64, **SIZES)
    [expected] = scene.whole(gated_delta_rule)
    [found] = Scene([70], torch.float32, every=64, **SIZES).run(gated_delta_rule, [[1]] * 70)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_fast_decodes(dtype):
    """Beside a prefill, across a chunk's and an interval's end; each keeps for the next what it needs."""
    lengths, fast = [66, 5, 40], functools.partial(gated_delta_rule, fast=True)
    steps = [[62, 1, 30], [1, 1, 9], [1, 1, 1], [1, 1, 0], [1, 1, 0]]
    found = Scene(lengths, dtype, every=64, **SIZES).run(fast, steps, unused=1)
    expected = Scene(lengths, dtype, every=64, **SIZES).run(reference, steps)
    for out, known in zip(found, expected, strict=True):
        torch.testing.assert_close(out, known, **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_fast_prefills(dtype):
    """From any place of a chunk to any other, and of keys that are all alike: then the triangular matrix is full."""
    lengths, fast = [141, 64, 33], functools.partial(gated_delta_rule, fast=True)
    steps = [[9, 64, 31], [50, 0, 2], [7, 0, 0], [75, 0, 0]]
    scenes = [Scene(lengths, dtype, every=64, **SIZES) for _ in range(2)]
    for scene in scenes:
        qkv, _, _ = scene.inputs[1]
        qkv[:, 32:64] = qkv[0, 32:64]
    found, expected = (scene.run(op, steps, unused=1) for scene, op in zip(scenes, (fast, reference), strict=True))
    for out, known in zip(found, expected, strict=True):
        torch.testing.assert_close(out, known, **TOLERANCE[dtype])
    torch.testing.assert_close(*(scene.snapshot(0) for scene in scenes), **TOLERANCE[torch.float32])


def test_a_step_that_ends_a_chunk_and_begins_another():
    """Keys of the former are read while those of the latter are to be kept in the same block."""
    steps = [[50], [90], [1]]
    [expected] = Scene([141], torch.float32, every=64, **SIZES).run(reference, steps)
    [found] = Scene([141], torch.float32, every=64, **SIZES).run(gated_delta_rule, steps)
    torch.testing.assert_close(found, expected, **TOLERANCE[torch.float32])


def test_a_snapshot_is_where_another_sequence_goes_on():
    scene, known = Scene([150, 150], torch.float32, every=64, **SIZES), 128
    scene.inputs[1] = scene.inputs[0]
    first = scene.step(gated_delta_rule, [150, 0])[0]
    scene.states[1, :2] = scene.states[0, :2]
    snapshot, scene.done[1] = scene.cache.state_BHdv[scene.states[0, 1]].clone(), known
    rest = [scene.step(gated_delta_rule, [0, num])[1] for num in (1, 20, 1)]
    assert torch.equal(torch.cat(rest), first[known:])
    assert torch.equal(scene.cache.state_BHdv[scene.states[0, 1]], snapshot)


def test_unused_sequences_write_nothing():
    scene = Scene([3], torch.float32, **SIZES)
    scene.whole(gated_delta_rule, unused=3)
    assert all(tensor[0].isnan().all() for tensor in scene.cache)  # the null block


def test_other_sizes_are_refused():
    with pytest.raises(AssertionError, match="keys of 24"):
        Scene([3], torch.float32, key_size=24).whole(gated_delta_rule)
