"""The all-to-all that ranks build from their reports, on one or several hosts by name."""

import pytest
from helpers.exchanges import Exchange, take_part
from helpers.ranks import Ranks

from expertwire.comm.all_to_all import backends
from expertwire.comm.group import SoloGroup
from expertwire.comm.topology import backend_times
from expertwire.kernels import registry


@pytest.fixture(scope="module")
def four_ranks():
    with Ranks(4) as ranks:
        yield ranks


def build(group, wanted, nodes, case):
    """Return the backend's name and the choice, or the error; an exchange runs over what was built."""
    try:
        (all_to_all,), choice = backends.build(wanted, case.spec(group), registry.plain(), nodes[group.rank], "cpu")
    except ValueError as error:
        return str(error), ""
    for step in range(2):
        take_part(all_to_all, case, group.rank, group.size, step, lambda: None)
    return type(all_to_all).__name__, choice.why


FEW, MANY = Exchange(top_k=3), Exchange(top_k=3, max_tokens=512)


@pytest.mark.parametrize(
    ("wanted", "nodes", "case", "name", "why"),
    [
        ("auto", "aaaa", FEW, "NvlinkAllToAll", "one machine"),
        ("auto", "aabb", FEW, "ReferenceAllToAll", "share no memory.* 384 routed rows, which is too few"),
        ("auto", "aabb", MANY, "HierarchicalAllToAll", "6144 routed rows.* crosses to another domain once"),
        ("auto", "aaab", MANY, "NcclAllToAll", "which is enough for grouped sending"),
        ("nccl", "aabb", FEW, "HierarchicalAllToAll", "asked for"),
        ("nccl", "abab", FEW, "NcclAllToAll", "asked for"),
        ("reference", "aaaa", FEW, "ReferenceAllToAll", "asked for"),
    ],
)
def test_ranks_agree_on_what_they_build(four_ranks, wanted, nodes, case, name, why):
    answers = four_ranks.run(build, wanted, nodes, case)
    assert {found for found, _ in answers} == {name}
    for _, said in answers:
        with pytest.raises(AssertionError, match=why):
            raise AssertionError(said)


def build_by_table(group, case):
    """Build from times with communicator options, which need another group."""
    times = {"reference": (9.0, {}), "nccl": (5.0, {"max_ctas": 8}), "nvlink": (7.0, {})}
    entries = tuple(
        backend_times.Measurement(ranks=group.size, tokens=64, backend=name, nccl=options, p50_us=us)
        for name, (us, options) in times.items()
    )
    table = backend_times.BackendTimes(name="t", device="cpu", machine="a CPU", row_bytes=64, top_k=2, entries=entries)
    (all_to_all,), choice = backends.build("auto", case.spec(group), registry.plain(), "a", "cpu", table=table)
    take_part(all_to_all, case, group.rank, group.size, 0, lambda: None)
    return type(all_to_all).__name__, choice.why


def test_ranks_build_what_a_table_says(four_ranks):
    for name, why in four_ranks.run(build_by_table, FEW):
        assert name == "NcclAllToAll"
        assert why.endswith("5 us with max_ctas=8, nvlink 7 us, reference 9 us")


def test_all_ranks_refuse_an_unusable_backend(four_ranks):
    for error, _ in four_ranks.run(build, "nvlink", "aabb", FEW):
        assert error == (
            "all2all_backend 'nvlink' cannot be used: the CPU ranks are on 2 nodes and share no memory; "
            "allowed here are auto, reference, nccl"
        )


def test_one_rank_needs_none():
    for wanted in ("auto", "nccl", "nvlink"):
        name, why = build(SoloGroup(), wanted, "a", FEW)
        assert (name, why) == ("ReferenceAllToAll", "there is one rank, and nothing is sent")
