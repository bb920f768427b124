"""Parts of a step take turns: the same order on every rank, and the same results as one after the other."""

import numpy as np
import pytest
import torch
from helpers.exchanges import build
from helpers.ranks import Ranks
from test_layer import layer, tokens

from expertwire.comm.all_to_all.base import RankStalled
from expertwire.engine.runner.micro_batch import split_tokens
from expertwire.moe.micro_batch import interleave, run

BACKENDS = ("reference", "nccl over gloo", "nvlink over shared memory")


def stages(name, count, seen):
    for i in range(count):
        seen.append(f"{name}{i}")
        yield
    return name


def test_turns():
    seen = []
    assert interleave([stages("a", 3, seen), stages("b", 1, seen), stages("c", 2, seen)]) == ["a", "b", "c"]
    assert seen == ["a0", "b0", "c0", "a1", "c1", "a2"]
    assert run(stages("d", 2, seen)) == "d"
    assert interleave([]) == []


def test_every_rank_has_its_tokens_in_some_part():
    for num_micro_batches in (1, 2, 3):
        parts = split_tokens([0, 1, 2, 7, 12], num_micro_batches)
        assert np.sum(parts, axis=0).tolist() == [0, 1, 2, 7, 12]
        assert all(np.ptp(of_rank) <= 1 for of_rank in np.transpose(parts)), parts
    assert split_tokens([5, 0, 1], 2) == [[3, 0, 1], [2, 0, 0]]


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request):
    with Ranks(request.param) as ranks:
        yield ranks


class Watched:
    """An all-to-all that writes down what is asked of it."""

    def __init__(self, inner, name, calls):
        self._inner, self._name, self._calls = inner, name, calls

    def __getattr__(self, phase):
        def call(*args):
            self._calls.append(self._name + phase)
            return getattr(self._inner, phase)(*args)

        return call


def whole_and_in_parts(group, backend, counts, dtype):
    """The layer's outputs and loads both ways, and the calls of the latter."""
    calls = []

    def make(spec):
        return [Watched(build(backend, spec), name, calls) for name in "ab"]

    moe = layer(group, dtype, redundant=3, shared=torch.sin, make=make)
    counts = counts[: group.size]
    x = tokens(group.rank, counts[group.rank], dtype)
    whole, load = moe.forward(x, x, counts), moe.load_E.copy()
    moe.load_E[:] = 0
    calls.clear()
    parts, begin = [], 0
    for part, num_tokens_P in enumerate(split_tokens(counts, 2)):
        mine = x[begin : begin + num_tokens_P[group.rank]]
        begin += len(mine)
        parts.append(moe.micro_batch(mine, mine, num_tokens_P, part))
    found = interleave(parts)
    same = [torch.equal(a, torch.cat(b)) for a, b in zip(whole, zip(*found, strict=True), strict=True)]
    return same, (load == moe.load_E).all() and load.sum() == 3 * len(x), calls


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_part_computes_while_the_other_travels(ranks, backend):
    phases = ("dispatch_send", "dispatch_recv", "combine_send", "combine_recv")
    expected = [name + phase for both in (phases[:1], phases[1:3], phases[3:]) for name in "ab" for phase in both]
    for counts in ([9, 4, 1, 0], [0, 33, 0, 2], [1, 0, 0, 0], [0, 0, 0, 0]):
        for same, counted, calls in ranks.run(whole_and_in_parts, backend, counts, torch.bfloat16):
            assert all(same), f"{counts}: bits depend on the parts"
            assert counted
            assert calls == expected


def test_a_layer_counts_on_the_device_if_its_ops_are_there(ranks):
    for load, expected in ranks.run(count_on_device):
        assert isinstance(load, torch.Tensor)
        assert load.tolist() == expected.tolist()


def count_on_device(group):
    loads = []
    for on_device in (False, True):
        moe = layer(group, torch.float32, redundant=3, on_device=on_device)
        x = tokens(group.rank, 20, torch.float32)
        moe.forward(x, x, [20] * group.size)
        loads.append(moe.load_E)
    return loads[1], loads[0]


def test_the_first_wait_of_all_is_the_cause():
    """Within an exchange ranks wait for the dispatch of each part, then for each one's combine."""
    waits = [(1, "dispatch", 0), (1, "dispatch", 1), (1, "combine", 0), (1, "combine", 1), (2, "dispatch", 0)]
    orders = [RankStalled(3, exchange, phase, 0, 1.0, part).order for exchange, phase, part in waits]
    assert orders == sorted(orders)
    assert {order[-1] for order in orders} == {3}
