"""A whole mixture-of-experts layer, on one rank and over several, against the loop over experts."""

import numpy as np
import pytest
import torch
from ranks import Ranks

from expertwire.comm.a2a_reference import ReferenceAllToAll
from expertwire.comm.all_to_all import AllToAllSpec
from expertwire.comm.group import SoloGroup
from expertwire.kernels import experts, linear, registry, routing
from expertwire.moe import reference
from expertwire.moe.layer import MoeLayer
from expertwire.moe.placement import place

D, F, E, K = 64, 32, 6, 3
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


def layer(group, dtype, *, renormalize=True, redundant=0, shared=None):
    placement = place(E, group.size, redundant)
    router, w13, w2 = weights(dtype)
    here = list(placement.experts_of(group.rank))
    ops = registry.choose("cpu")
    spec = AllToAllSpec(
        group=group, rank_offsets=placement.rank_offsets, max_tokens=64, hidden_size=D, top_k=K, dtype=dtype
    )
    return MoeLayer(
        ops=ops,
        router=routing.prepare(router, K, ops.route, renormalize=renormalize),
        experts=experts.prepare(w13[here], w2[here], ops.silu_mul),
        shared=shared,
        all_to_all=ReferenceAllToAll(spec),
        physical_of_E=torch.from_numpy(placement.physical_for(group.rank)),
        load_E=np.zeros(E, np.int64),
    )


def expected(x, dtype, *, renormalize=True, shared=None):
    router, w13, w2 = weights(dtype)
    ids, weights_TK = routing.reference(linear.reference(x, router), K, renormalize=renormalize)
    return reference.moe(x, ids, weights_TK, w13, w2, None if shared is None else shared(x)), ids


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("shared", [None, torch.sin], ids=["routed", "shared"])
def test_alone(dtype, renormalize, shared):
    moe = layer(SoloGroup(), dtype, renormalize=renormalize, shared=shared)
    load = np.zeros(E, np.int64)
    for count in (0, 1, 50):
        x = tokens(0, count, dtype)
        y, ids = expected(x, dtype, renormalize=renormalize, shared=shared)
        torch.testing.assert_close(moe.forward(x, [count]), y, **TOLERANCE[dtype])
        load += np.bincount(ids.flatten(), minlength=E)
        assert moe.load_E.tolist() == load.tolist()


def forward(group, counts, dtype, redundant):
    moe = layer(group, dtype, redundant=redundant)
    y = moe.forward(tokens(group.rank, counts[group.rank], dtype), counts)
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
            alone = layer(SoloGroup(), dtype).forward(tokens(1, 20, dtype), [20])
            spread = ranks.run(forward, [0, 20, 0, 0][:size], dtype, 0)[1][0]
            assert torch.equal(alone, spread), "bits depend on where the experts are"
