"""Conformance of all-to-all backends: exact rows in the specified order in dispatch, and in their slots in combine.

The ranks run a case and return their rows; the expected ones are computed here from all ranks' inputs.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch
from helpers.exchanges import FORMATS, Exchange, Threads, build, physical_ids, run_exchange
from helpers.ranks import Ranks

from expertwire.comm.all_to_all.base import AllToAllSpec
from expertwire.comm.group import SoloGroup
from expertwire.kernels.ops import combine, experts
from expertwire.moe import reference
from expertwire.moe.eplb.placement import place

# Over what the ranks are joined, how many they are, and the backend.
RUNS = [
    *(("processes", size, backend) for size in (1, 2, 4, 8) for backend in ("reference", "nvlink over shared memory")),
    *(("processes", size, "nccl over gloo") for size in (2, 4, 8)),
    *(("threads", size, "nvlink over slices") for size in (1, 2, 3, 4, 8)),
]
SLOW = (("processes", 8, "reference"), ("processes", 8, "nccl over gloo"))  # the other backends have 8 ranks, too
D, F = 24, 16


@dataclass(frozen=True, kw_only=True)
class Case:
    """Tokens of the ranks (of the first ranks, if there are fewer) and their logical expert ids."""

    tokens: tuple[int, ...] = (5, 3, 7, 4, 0, 1, 9, 2)
    num_experts: int = 8
    top_k: int = 2
    redundant: int = 0
    ids: str = "random"
    dtype: torch.dtype = torch.float32

    def inputs(self, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return x [T, D], logical ids [T, K], weights [T, K] of one rank."""
        rng = np.random.default_rng([7, rank])
        shape = (self.tokens[rank], self.top_k)
        ids = np.array([rng.permutation(self.num_experts)[: self.top_k] for _ in range(shape[0])], np.int64).reshape(
            shape
        )
        if self.ids == "holes":
            ids[rng.random(shape) < 0.4] = -1
        elif self.ids == "none":
            ids[:] = -1
        elif self.ids == "last":
            ids[:] = np.arange(self.num_experts - self.top_k, self.num_experts)
        x = torch.from_numpy(rng.standard_normal((shape[0], D))).to(self.dtype)
        return x, torch.from_numpy(ids), torch.from_numpy(rng.random(shape)).float()

    def weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return w13 [E, 2F, D], w2 [E, D, F]."""
        rng = np.random.default_rng(8)
        shapes = (self.num_experts, 2 * F, D), (self.num_experts, D, F)
        return tuple(torch.from_numpy(rng.standard_normal(s) * 0.3).to(self.dtype) for s in shapes)


CASES = {
    "even": Case(tokens=(4, 4, 4, 4) * 2),
    "uneven": Case(tokens=(1, 9, 2, 30) * 2),
    "bf16": Case(dtype=torch.bfloat16),
    "first has none": Case(tokens=(0, 5, 0, 3) * 2),
    "only the last has tokens": Case(tokens=(0, 0, 0, 6) * 2),
    "nobody has tokens": Case(tokens=(0, 0, 0, 0) * 2),
    "holes": Case(ids="holes", top_k=3),
    "no token has an expert": Case(ids="none"),
    "all to one expert": Case(ids="last", top_k=1),
    "all to the same experts": Case(ids="last", top_k=3),
    "one expert a token": Case(top_k=1),
    "every expert": Case(top_k=8),
    "uneven experts": Case(num_experts=7, top_k=3),
    "replicas": Case(num_experts=5, redundant=3, ids="holes"),
    "fewer experts than ranks": Case(num_experts=2, top_k=2, tokens=(3, 0, 8, 1) * 2),
    "one expert, bf16": Case(num_experts=1, top_k=1, dtype=torch.bfloat16),
}


@pytest.fixture(scope="module")
def pools():
    """Yield ranks by kind and number, started once for all tests."""
    with contextlib.ExitStack() as closing:
        made = {}

        def pool(kind, size):
            if (kind, size) not in made:
                made[kind, size] = closing.enter_context({"processes": Ranks, "threads": Threads}[kind](size))
            return made[kind, size]

        yield pool


@pytest.fixture
def ranks(pools, request):
    return pools(*request.param)


every_run = pytest.mark.parametrize(
    ("ranks", "backend"),
    [
        pytest.param(
            (kind, size), backend, id=f"{backend}, {size} ranks", marks=pytest.mark.slow if run in SLOW else ()
        )
        for run in RUNS
        for kind, size, backend in [run]
    ],
    indirect=["ranks"],
)


def placed(case, size):
    """Return the placement; one rank cannot hold a second copy of an expert."""
    return place(case.num_experts, size, case.redundant if size > 1 else 0)


def run_case(group, backend, case, steps=1):
    """Return a rank's dispatched rows, their offsets, combined rows, and the layer's output."""
    placement = placed(case, group.size)
    all_to_all = build(backend, spec(group, case, placement.rank_offsets))
    x, ids, weights = case.inputs(group.rank)
    physical = torch.from_numpy(physical_ids(placement, group.rank, ids.numpy()))
    w13, w2 = case.weights()
    here = placement.experts_of(group.rank)
    for _ in range(steps):
        handle = all_to_all.dispatch_send(x, physical, case.tokens[: group.size])
        arrived = all_to_all.dispatch_recv(handle)
        rows = arrived.x_UD[arrived.row_index_R]
        y = torch.empty_like(rows)
        for e, (start, end) in enumerate(pairwise(arrived.expert_offsets)):
            for r in range(start, end):  # one by one: the specification below has other neighbours
                y[r] = experts.reference(
                    rows, torch.tensor([r]), np.array([0, 1]), w13[here[e]][None], w2[here[e]][None]
                )[0]
        home = all_to_all.combine_recv(all_to_all.combine_send(handle, y))
    return rows, list(arrived.expert_offsets), home.clone(), combine.combine(home, weights)


def spec(group, case, rank_offsets):
    tokens = max(case.tokens)
    return AllToAllSpec(
        group=group, rank_offsets=rank_offsets, max_tokens=tokens, hidden_size=D, top_k=case.top_k, dtype=case.dtype
    )


@every_run
@pytest.mark.parametrize("name", CASES)
def test_rows_are_dispatched_and_combined(ranks, backend, name):
    case, size = CASES[name], ranks.size
    answers = ranks.run(run_case, backend, case)
    check_arrivals(case, size, answers)
    w13, w2 = case.weights()
    for rank, (*_, home, y) in enumerate(answers):
        x, ids, weights = case.inputs(rank)
        assert home.shape == (case.tokens[rank], case.top_k, D)
        assert not home[ids == -1].any()
        expected = [
            reference.moe(*(part[t : t + 1] for part in (x, ids, weights)), w13, w2) for t in range(case.tokens[rank])
        ]
        assert y.dtype == case.dtype
        assert torch.equal(y, torch.cat([x[:0], *expected])), f"rank {rank}"


def check_arrivals(case, size, answers):
    """Return rows sorted by expert, then home rank, token, k."""
    placement = placed(case, size)
    inputs = [case.inputs(home) for home in range(size)]
    physical = [physical_ids(placement, home, inputs[home][1].numpy()) for home in range(size)]
    for rank, (rows, offsets, *_) in enumerate(answers):
        first, last = placement.rank_offsets[rank : rank + 2]
        expected, expected_offsets = [torch.empty(0, D, dtype=case.dtype)], [0]
        for expert in range(first, last):
            for home in range(size):
                expected.append(inputs[home][0][np.nonzero(physical[home] == expert)[0]])
            expected_offsets.append(sum(map(len, expected)))
        assert offsets == expected_offsets, f"rank {rank}"
        assert torch.equal(rows, torch.cat(expected)), f"rank {rank}"


EXCHANGES = {
    **{form: Exchange(form=form, top_k=3, ids="holes") for form in FORMATS},
    "22 experts a token": Exchange(num_experts=32, top_k=22),
    "one expert a token": Exchange(top_k=1, redundant=5),
    "all to one expert": Exchange(ids="last", top_k=1, form="bf16"),
    "no token has an expert": Exchange(ids="none"),
    "full": Exchange(tokens=(32,) * 8, top_k=8),
    "nobody has tokens": Exchange(tokens=(0,) * 8),
}


@every_run
@pytest.mark.parametrize("name", EXCHANGES)
def test_every_byte_arrives_where_it_should(ranks, backend, name):
    ranks.run(run_exchange, backend, EXCHANGES[name], 3)


@pytest.mark.slow
@every_run
def test_hundreds_of_steps_with_stragglers(ranks, backend):
    """The number of tokens varies by step, sometimes 0, in the same buffers."""
    case = Exchange(tokens=None, max_tokens=12, num_experts=12, redundant=4, top_k=3, ids="holes", form="bf16")
    ranks.run(run_exchange, backend, case, 200, 0.02)


@pytest.mark.full
@every_run
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("top_k", [1, 2, 8, 22])
@pytest.mark.parametrize("ids", ["random", "holes", "last"])
def test_matrix(ranks, backend, form, top_k, ids):
    case = Exchange(tokens=None, num_experts=24, redundant=8, top_k=top_k, ids=ids, form=form)
    ranks.run(run_exchange, backend, case, 40, 0.02)


@every_run
def test_many_layers_in_a_row(ranks, backend):
    once, often = (ranks.run(run_case, backend, CASES["replicas"], steps) for steps in (1, 20))
    for first, last in zip(once, often, strict=True):
        assert torch.equal(first[-1], last[-1])


@pytest.mark.parametrize("backend", ["reference", "nvlink over shared memory"])
def test_wrong_token_counts_are_refused(backend):
    case = Case(tokens=(4,))
    all_to_all = build(backend, spec(SoloGroup(), case, (0, 8)))
    x, ids, _ = case.inputs(0)
    with pytest.raises(AssertionError, match="rank 0 has 4 tokens"):
        all_to_all.dispatch_send(x, ids, [3])
    with pytest.raises(AssertionError, match="5 tokens, built for 4"):
        all_to_all.dispatch_send(x[[0, 0, 1, 2, 3]], ids[[0, 0, 1, 2, 3]], [5])


def fail(group, rank):
    if group.rank == rank:
        raise ValueError("on purpose")
    group.barrier()


def test_a_failing_rank_is_named_and_the_next_run_has_new_ones():
    with Ranks(2) as ranks:
        with pytest.raises(RuntimeError, match=r"(?s)rank 1:.*on purpose"):
            ranks.run(fail, 1)
        assert ranks.run(fail, -1) == [None, None]
