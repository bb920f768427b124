"""The gated delta rule: every implementation against the recurrence and transformers; bits that steps do not change."""

import pytest
import torch
from helpers.delta_scenes import Scene, random_cuts
from transformers.models.qwen3_next import modeling_qwen3_next as qwen3_next

from expertwire.kernels import registry
from expertwire.kernels.ops import attention, gated_delta_rule
from expertwire.kernels.ops.recurrent import StateMetadata

OPS = {"cpu": registry.choose("cpu"), "torch": registry.plain()}
DTYPES = [torch.float32, torch.bfloat16]
LENGTHS = [1, 17, 63, 64, 65, 70, 300]
TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 2e-6}, torch.bfloat16: {"rtol": 2**-8, "atol": 1e-6}}


def heads_of(scene, i):
    """q, k and v of a sequence, in fp64 and for each value head; g and beta."""
    keys, heads, key_size, _ = scene.sizes
    qkv, a, b = (x.double() for x in scene.inputs[i])
    q, k, v = gated_delta_rule.split(qkv, keys, key_size, heads)
    q, k = (x.repeat_interleave(heads // keys, 1) for x in (q, k))
    g = scene.A.double() * torch.nn.functional.softplus(a + scene.dt_bias.double())
    return q, k, v, g, b.sigmoid()


def recurrence(scene, i):
    """Outputs and last state by the definition, a token at a time."""
    q, k, v, g, beta = heads_of(scene, i)
    q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    state, outputs = q.new_zeros(q.shape[1], q.shape[2], v.shape[2]), []
    for t in range(len(q)):
        state = state * g[t].exp()[:, None, None]
        u = beta[t][:, None] * (v[t] - torch.einsum("hk,hkv->hv", k[t], state))
        state = state + torch.einsum("hk,hv->hkv", k[t], u)
        outputs.append(torch.einsum("hk,hkv->hv", q[t], state) / q.shape[2] ** 0.5)
    return torch.stack(outputs).flatten(1), state


@pytest.mark.parametrize("ops", OPS.values(), ids=OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("sizes", [(2, 4, 32, 32), (1, 1, 64, 32), (2, 6, 16, 48), (1, 3, 5, 7)], ids=str)
def test_the_recurrence(ops, dtype, length, sizes):
    keys, heads, key_size, value_size = sizes
    scene = Scene([length], dtype, keys=keys, heads=heads, key_size=key_size, value_size=value_size)
    [out] = scene.whole(ops.gated_delta_rule)
    assert out.dtype == dtype
    expected, _ = recurrence(scene, 0)
    torch.testing.assert_close(out.double(), expected, **TOLERANCE[dtype])


@pytest.mark.parametrize("ops", OPS.values(), ids=OPS)
@pytest.mark.parametrize("length", [64, 128, 256])
def test_the_state_after_whole_chunks(ops, length):
    scene = Scene([length], torch.float32)
    scene.whole(ops.gated_delta_rule)
    torch.testing.assert_close(scene.snapshot(0).double(), recurrence(scene, 0)[1], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("ops", OPS.values(), ids=OPS)
@pytest.mark.parametrize("rule", ["torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"])
def test_transformers(ops, rule):
    scene = Scene([150], torch.float32, every=64)
    [out] = scene.whole(ops.gated_delta_rule)
    q, k, v, g, beta = (x[None].float() for x in heads_of(scene, 0))
    expected, _ = getattr(qwen3_next, rule)(q, k, v, g=g, beta=beta, use_qk_l2norm_in_kernel=True)
    torch.testing.assert_close(out, expected[0].flatten(1), rtol=1e-4, atol=5e-6)


@pytest.mark.parametrize("ops", OPS.values(), ids=OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("every", [64, 128, 256])
def test_bits_do_not_depend_on_cuts(ops, dtype, every):
    """Neither on other sequences of the step, nor on which blocks hold the state."""
    for length in LENGTHS:
        alone = Scene([length], dtype, every=every)
        [expected], scenes = alone.whole(ops.gated_delta_rule), []
        for cuts in ([1] * length, random_cuts(length, 1), random_cuts(length, 2, largest=200)):
            scenes.append(Scene([length], dtype, every=every))
            [out] = scenes[-1].run(ops.gated_delta_rule, [[cut] for cut in cuts])
            assert torch.equal(out, expected), f"{length} tokens in steps of {cuts}"
        for scene in scenes:
            assert torch.equal(scene.snapshot(0), alone.snapshot(0))


@pytest.mark.parametrize("ops", OPS.values(), ids=OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_other_sequences(ops, dtype):
    lengths = [1, 65, 300, 70]
    expected = []
    for i in range(len(lengths)):
        scene = Scene(lengths, dtype)
        expected += scene.run(ops.gated_delta_rule, [[n if j == i else 0 for j, n in enumerate(lengths)]])[i : i + 1]
    cuts = [random_cuts(length, length) for length in lengths]
    steps = [[cut[n] if n < len(cut) else 0 for cut in cuts] for n in range(max(map(len, cuts)))]
    found = Scene(lengths, dtype).run(ops.gated_delta_rule, steps)
    assert all(torch.equal(out, alone) for out, alone in zip(found, expected, strict=True))


@pytest.mark.parametrize("ops", OPS.values(), ids=OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_snapshot_is_where_another_sequence_goes_on(ops, dtype):
    """Its own blocks hold its state and chunks; the snapshot stays as it is."""
    scene, known = Scene([300, 300], dtype), 256
    scene.inputs[1] = scene.inputs[0]
    [first], rest = scene.run(ops.gated_delta_rule, [[300, 0]])[:1], []
    scene.states[1, : known // scene.every] = scene.states[0, : known // scene.every]
    snapshot, scene.done[1] = scene.cache.state_BHdv[scene.states[0, 1]].clone(), known
    for num in (1, 20, 300 - known - 21):
        rest.append(scene.step(ops.gated_delta_rule, [0, num])[1])
    assert torch.equal(torch.cat(rest), first[known:])
    assert torch.equal(scene.cache.state_BHdv[scene.states[0, 1]], snapshot)


@pytest.mark.parametrize("ops", OPS.values(), ids=OPS)
def test_an_interval_that_has_begun_has_the_state_before_it(ops):
    scene = Scene([130], torch.float32)
    scene.whole(ops.gated_delta_rule)
    before, after = scene.cache.state_BHdv[scene.states[0, :2]]
    assert torch.equal(before, after)


@pytest.mark.parametrize("ops", OPS.values(), ids=OPS)
def test_a_sequence_that_begins_reads_nothing(ops):
    """Its blocks may hold anything: they are NaN here."""
    [out] = Scene([3], torch.float32).whole(ops.gated_delta_rule)
    assert out.isfinite().all()


@pytest.mark.parametrize("ops", OPS.values(), ids=OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_decays(ops, dtype):
    """A state that is forgotten at once, one that never is, and inputs of zeros."""
    scene = Scene([100], dtype)
    qkv, a, _ = scene.inputs[0]
    a[:, 0], a[:, 1] = 1000.0, -1000.0
    qkv[:50:3] = 0
    [out] = scene.whole(ops.gated_delta_rule)
    torch.testing.assert_close(out.double(), recurrence(scene, 0)[0], **TOLERANCE[dtype])


@pytest.mark.parametrize("decay", [0.5, 1.3, 21.0])
def test_a_state_that_decays_holds_no_subnormal_numbers(decay):
    """Each product with one takes some processors 150 cycles."""
    scene = Scene([128], torch.float32)
    scene.A, scene.dt_bias = torch.full_like(scene.A, -decay), torch.ones_like(scene.dt_bias)
    _, a, b = scene.inputs[0]
    a[:], b[64:] = 0.0, -1000.0  # the second chunk adds nothing
    scene.whole(OPS["cpu"].gated_delta_rule)
    size = scene.snapshot(0).abs()
    assert not ((size > 0) & (size < torch.finfo(torch.float32).tiny)).any()


@pytest.mark.parametrize("ops", OPS.values(), ids=OPS)
def test_no_tokens(ops):
    scene = Scene([5], torch.float32)
    width = scene.inputs[0][0].shape[1]
    states = scene.states[:0]
    metadata = StateMetadata(seqs=attention.describe([], [], states), interval=128, chunk_blocks_S=states[:, 0])
    nothing = torch.empty(0, 4)
    out = ops.gated_delta_rule(torch.empty(0, width), nothing, nothing, scene.A, scene.dt_bias, scene.cache, metadata)
    assert out.shape == (0, 4 * 32)
