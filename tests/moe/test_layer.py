"""A whole mixture-of-experts layer, on one rank and over several, against the loop over experts."""

import dataclasses
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.ranks import Ranks

from expertwire.comm.all_to_all.base import AllToAllSpec
from expertwire.comm.all_to_all.reference import ReferenceAllToAll
from expertwire.comm.group import SoloGroup
from expertwire.kernels import registry
from expertwire.kernels.ops import linear, routing
from expertwire.kernels.ops.experts import GroupedMlpWeights
from expertwire.kernels.ops.moe_block import DenseMlp
from expertwire.kernels.ops.variants import ExpertGroups, Routing
from expertwire.moe import reference
from expertwire.moe.eplb.placement import place
from expertwire.moe.layer import exchanges, prepare

D, F, E, K, EPS = 64, 32, 8, 3, 1e-6
OPS = registry.choose("cpu")
TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 2e-5}, torch.bfloat16: {"rtol": 2**-6, "atol": 3e-2}}


def weights(dtype):
    """Router [E, D], w13 [E, 2F, D], w2 [E, D, F]."""
    generator = torch.Generator().manual_seed(1)
    shapes = (E, D), (E, 2 * F, D), (E, D, F)
    return [(torch.randn(s, generator=generator) * 1.5 / s[-1] ** 0.5).to(dtype) for s in shapes]


def tokens(rank, count, dtype):
    """[count, D], none so near to choosing other experts that rounding decides."""
    x = torch.randn(10 * count, D, generator=torch.Generator().manual_seed(10 + rank)).to(dtype)
    best = (x.double() @ weights(dtype)[0].double().T).topk(K + 1).values
    margin = best[:, K - 1] - best[:, K]
    return x[margin > 0.1][:count]


def norm(dtype):
    return torch.linspace(0.5, 1.5, D).to(dtype)


SHARED = ["swiglu", "swiglu with a gate", "relu2"]


def shared_expert(kind, dtype):
    """Return an MLP for all tokens, or None."""
    if kind is None:
        return None
    is_gated, width = kind != "relu2", 2 * 48 if kind == "swiglu" else 64

    def linear(rows, columns, seed):
        weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * columns**-0.5
        return OPS.linear(weight.to(dtype))

    return DenseMlp(
        up=linear(width * (1 + is_gated), D, 1),
        down=linear(D, width, 2),
        silu_mul=OPS.silu_mul if is_gated else None,
        gate=linear(1, D, 3) if "with" in kind else None,
        sigmoid_mul=OPS.sigmoid_mul,
    )


ROUTING = {
    "softmax": (Routing(top_k=K, renormalize=True), None),
    "as it is": (Routing(top_k=K, renormalize=False), None),
    "sigmoid": (
        Routing(
            top_k=K, renormalize=True, score="sigmoid", groups=ExpertGroups(number=4, kept=2, by="two_best"), scale=2.5
        ),
        torch.linspace(-0.1, 0.1, E),
    ),
}


def layer(
    group,
    dtype,
    *,
    renormalize=True,
    routing=None,
    redundant=0,
    shared=None,
    on_device=False,
    make=None,
    exchange_tokens=None,
):
    """`make`: the all-to-alls of a spec; `routing`: options and a bias for the choice."""
    rule, choice_bias = routing or (Routing(top_k=K, renormalize=renormalize), None)
    placement = place(E, group.size, redundant)
    router, w13, w2 = weights(dtype)
    here = list(placement.experts_of(group.rank))
    spec = AllToAllSpec(
        group=group,
        rank_offsets=placement.rank_offsets,
        max_tokens=exchange_tokens or 512,
        hidden_size=D,
        top_k=K,
        dtype=dtype,
    )
    return prepare(
        router,
        GroupedMlpWeights(w13[here], w2[here]),
        norm(dtype),
        ops=dataclasses.replace(OPS, on_device=on_device, fuse_moe=None if on_device else OPS.fuse_moe),
        routing=rule,
        choice_bias=choice_bias,
        eps=EPS,
        placement=placement,
        rank=group.rank,
        all_to_alls=[ReferenceAllToAll(spec)] if make is None else make(spec),
        shared=shared,
        exchange_tokens=exchange_tokens,
    )


def mixture(moe, x, counts):
    """Return what the layer adds to a residual of zero, after checking the norm behind it."""
    y, normed = moe.forward(torch.zeros_like(x), x, counts)
    assert torch.equal(normed, OPS.rms_norm(y, norm(x.dtype), EPS))
    return y


def expected(x, dtype, *, renormalize=True, shared=None):
    router, w13, w2 = weights(dtype)
    ids, weights_TK = routing.reference(linear.reference(x, router), Routing(top_k=K, renormalize=renormalize))
    return reference.moe(x, ids, weights_TK, w13, w2, None if shared is None else shared(x)), ids


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("shared", [None, *SHARED])
def test_alone(dtype, renormalize, shared):
    shared = shared_expert(shared, dtype)
    moe = layer(SoloGroup(), dtype, renormalize=renormalize, shared=shared)
    load = np.zeros(E, np.int64)
    for count in (0, 1, 50):
        x = tokens(0, count, dtype)
        y, ids = expected(x, dtype, renormalize=renormalize, shared=shared)
        torch.testing.assert_close(mixture(moe, x, [count]), y, **TOLERANCE[dtype])
        load += np.bincount(ids.flatten(), minlength=E)
        assert moe.load_E.tolist() == load.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("routing", "shared"), list(zip([*ROUTING, "softmax"], [None, *SHARED], strict=True)))
@pytest.mark.parametrize("count", [0, 1, 2, 9, 30, 64, 300])
def test_the_fused_layer_has_the_bits_of_the_ops_one_by_one(dtype, routing, shared, count):
    moe = layer(SoloGroup(), dtype, routing=ROUTING[routing], shared=shared_expert(shared, dtype))
    assert moe.block is not None
    by_ops = dataclasses.replace(moe, block=None, load_E=np.zeros(E, np.int64))
    normed = tokens(0, count, dtype)
    x = normed.flip(0)
    for found, expected in zip(moe.forward(x, normed, [count]), by_ops.forward(x, normed, [count]), strict=True):
        assert torch.equal(found, expected)
    assert moe.load_E.tolist() == by_ops.load_E.tolist()


def test_a_fused_layer_needs_all_experts_here_and_packed_weights():
    shared = shared_expert("swiglu", torch.float32)
    assert layer(SoloGroup(), torch.float32, shared=shared).block is not None
    not_packed = dataclasses.replace(shared, down=torch.sin)
    assert layer(SoloGroup(), torch.float32, shared=not_packed).block is None
    with Ranks(2) as ranks:
        assert ranks.run(has_fused) == [False, False]


def has_fused(group):
    return layer(group, torch.float32).block is not None


@pytest.mark.parametrize(("rank", "size", "share"), [(0, 1, 1.0), (3, 4, 3 / 8)])
def test_as_many_rows_are_expected_as_even_routing_brings(monkeypatch, rank, size, share):
    """With 8 experts, 3 a token: of a rank's tokens all; from each of four ranks 3/4 of a row a token, where two can come."""
    given, make = [], OPS.experts
    spy = dataclasses.replace(OPS, experts=lambda *args, **options: given.append(options) or make(*args, **options))
    monkeypatch.setattr(sys.modules[__name__], "OPS", spy)
    layer(SimpleNamespace(rank=rank, size=size), torch.float32)
    assert [options["expected"] for options in given] == [share]


def forward(group, counts, dtype, redundant, exchange_tokens=None):
    moe = layer(group, dtype, redundant=redundant, exchange_tokens=exchange_tokens)
    y = mixture(moe, tokens(group.rank, counts[group.rank], dtype), counts)
    return y, moe.load_E


@pytest.mark.parametrize("size", [2, 4])
def test_over_ranks(size):
    with Ranks(size) as ranks:
        for dtype in TOLERANCE:
            for counts in ([5, 17, 1, 0], [0, 33, 0, 2], [0, 0, 0, 0]):
                for redundant in (0, 3):
                    answers = ranks.run(forward, counts[:size], dtype, redundant)
                    for rank, (y, load) in enumerate(answers):
                        right, ids = expected(tokens(rank, counts[rank], dtype), dtype)
                        torch.testing.assert_close(y, right, **TOLERANCE[dtype])
                        assert load.tolist() == np.bincount(ids.flatten(), minlength=E).tolist()
        for dtype in TOLERANCE:
            alone = mixture(layer(SoloGroup(), dtype), tokens(1, 20, dtype), [20])
            spread = ranks.run(forward, [0, 20, 0, 0][:size], dtype, 0)[1][0]
            assert torch.equal(alone, spread), "bits depend on where the experts are"
            for counts in ([33, 0, 2, 9], [8, 8, 0, 8], [0, 17, 16, 1]):
                whole, cut = (ranks.run(forward, counts[:size], dtype, 3, most) for most in (None, 8))
                for (y, load), (y_cut, load_cut) in zip(whole, cut, strict=True):
                    assert torch.equal(y, y_cut), "bits depend on the exchanges that a step takes"
                    assert load.tolist() == load_cut.tolist()


def test_all_ranks_take_as_many_exchanges():
    assert list(exchanges([5, 0, 17], None)) == [(0, [5, 0, 17])]
    assert list(exchanges([5, 0, 17], 8)) == [(0, [5, 0, 8]), (8, [0, 0, 8]), (16, [0, 0, 1])]
    assert list(exchanges([0, 0], 8)) == [(0, [0, 0])]
    assert list(exchanges([8, 3], 8)) == [(0, [8, 3])]
