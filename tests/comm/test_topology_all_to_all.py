"""Dispatch across domains: same bytes as other backends, and a row crosses to a domain once."""

import pytest
import torch
from helpers.exchanges import Exchange, run_exchange, take_part
from helpers.ranks import Ranks

from expertwire.comm.all_to_all.hierarchical import HierarchicalAllToAll
from expertwire.comm.all_to_all.nccl import NcclAllToAll
from expertwire.comm.all_to_all.nvlink import build as nvlink_over_shared_memory
from expertwire.comm.all_to_all.reference import ReferenceAllToAll
from expertwire.comm.topology import topology
from expertwire.comm.topology.topology import RankLocation, Topology

BACKENDS = {"reference": ReferenceAllToAll, "nccl": NcclAllToAll, "nvlink": nvlink_over_shared_memory}


@pytest.fixture(scope="module")
def four_ranks():
    with Ranks(4) as ranks:
        yield ranks


def of_domains(*sizes):
    places = [
        RankLocation(domain=f"d{d}", node=f"d{d}", failure_domain=f"d{d}")
        for d, size in enumerate(sizes)
        for _ in range(size)
    ]
    return Topology(name="t", locations=tuple(places))


def test_rails():
    assert of_domains(2, 2, 2).rails() == ([0, 0, 1, 1, 2, 2], [0, 1, 0, 1, 0, 1])
    assert topology.read("nvl72").rails() is None
    assert of_domains(2, 3).rails() is None
    assert of_domains(1, 1).rails() is None, "a rank alone in its domain has nobody to hand rows to"
    pair = of_domains(1, 1).locations
    assert Topology(name="t", locations=(*pair, *pair)).rails() is None, "ranks take turns among the domains"


CASES = [
    Exchange(form="bf16", top_k=3, ids="holes", redundant=4),
    Exchange(form="odd widths", top_k=1),
    Exchange(tokens=None, max_tokens=6, num_experts=7, top_k=5),
    Exchange(ids="none"),
    Exchange(ids="last", top_k=3, form="fp8 and scales"),
    Exchange(tokens=(0, 0, 0, 0)),
]


def run(group, backend, steps):
    domain_P, place_P = of_domains(2, 2).rails()
    across, within = group.split(place_P), group.split(domain_P)
    for case in CASES:  # making the parts takes longer than all of this
        all_to_all = HierarchicalAllToAll(case.spec(group), across=across, within=within, make=BACKENDS[backend])
        for step in range(steps):
            take_part(all_to_all, case, group.rank, group.size, step, lambda: None)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_byte_arrives_where_it_should(four_ranks, backend):
    four_ranks.run(run, backend, 4)


class Counting:
    """A group that counts the rows that leave this rank."""

    def __init__(self, group):
        self._group, self.rank, self.size, self.left = group, group.rank, group.size, []

    def exchange(self, out, rows, out_counts, counts):
        if rows.dtype == torch.uint8:  # the ids that the reference tells everybody are no rows
            self.left.append(sum(counts) - counts[self.rank])
        return self._group.exchange(out, rows, out_counts, counts)


def count_crossings(group, case):
    domain_P, place_P = of_domains(2, 2).rails()
    across = Counting(group.split(place_P))
    all_to_all = HierarchicalAllToAll(
        case.spec(group), across=across, within=group.split(domain_P), make=ReferenceAllToAll
    )
    take_part(all_to_all, case, group.rank, group.size, 0, lambda: None)
    return across.left[0]


def test_a_row_crosses_to_a_domain_once(four_ranks):
    """With 3 of 8 experts a token, most tokens have several in the other domain, on both of its ranks."""
    case = Exchange(num_experts=8, top_k=3)
    found = four_ranks.run(count_crossings, case)
    for rank, left in enumerate(found):
        _, ids = case.sent(rank, 0, 4)
        other = (ids < 4) if rank >= 2 else (ids >= 4)
        assert left == other.any(axis=1).sum()
        assert left < (other.sum() if other.sum() > other.any(axis=1).sum() else left + 1)


def parts(group):
    across = group.split([0, 1, 0, 1])
    alone = group.split([0, 1, 2, 3])
    rows = torch.tensor([[group.rank]])
    ones = [1] * across.size
    got = torch.empty(across.size, 1, dtype=torch.int64)
    across.exchange(got, rows.repeat(across.size, 1), ones, ones).wait()
    return across.rank, across.size, got.flatten().tolist(), alone.size


def test_a_group_splits_by_color(four_ranks):
    assert four_ranks.run(parts) == [(0, 2, [0, 2], 1), (0, 2, [1, 3], 1), (1, 2, [0, 2], 1), (1, 2, [1, 3], 1)]


def test_the_suite_itself_still_uses_all_ranks(four_ranks):
    """Split groups do not disturb the whole group."""
    four_ranks.run(run_exchange, "nccl over gloo", Exchange(top_k=3), 2)
