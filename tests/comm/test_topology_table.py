"""Choice of the all-to-all backend by measured times; times of other ranks are refused."""

import json
from dataclasses import replace

import pytest
from test_topology_choice import BOARDS, HOST, ranks

from expertwire.comm.topology.backend_choice import choose
from expertwire.comm.topology.backend_times import read

ROW = 4096


def entry(backend, us, *, tokens=128, size=4, **nccl):
    return {"ranks": size, "tokens": tokens, "backend": backend, "nccl": nccl, "p50_us": us}


ENTRIES = [
    entry("nvlink", 30.0, tokens=1),
    entry("reference", 20.0, tokens=1),
    entry("padded", 5.0, tokens=1),
    entry("nccl", 900.0),
    entry("nccl", 800.0, max_ctas=8),
    entry("nvlink", 700.0),
    entry("nccl", 1.0, size=2),
]
FILE = {"machine": {"device": "cpu", "name": "a CPU", "cores": 2}, "row_bytes": ROW, "top_k": 8, "entries": ENTRIES}


@pytest.fixture
def table(tmp_path):
    def write(**changes):
        path = tmp_path / "table.json"
        path.write_text(json.dumps(FILE | changes))
        return read(str(path))

    return write


def step(tokens, row_bytes=ROW):
    """Return the conditions of four CPU ranks with `tokens` tokens each."""
    return replace(HOST, step_rows=4 * tokens * 8, row_bytes=row_bytes)


@pytest.mark.parametrize(
    ("here", "name", "why"),
    [
        (step(128), "nvlink", "128 tokens, 4.19 MB a rank: 700 us, nccl 800 us$"),
        (step(1), "reference", "measured on a CPU with 4 ranks of 1 tokens, 0.0328 MB a rank: 20 us, nvlink 30 us$"),
        (step(16), "nvlink", "128 tokens"),  # the next in factors
        (step(8), "reference", "1 tokens"),
        (step(8, 16 * ROW), "nvlink", "128 tokens"),  # bytes count, not tokens
        (replace(step(128), buffer_bytes=2_000_000, shared_bytes=1_500_000), "nccl", "800 us with max_ctas=8$"),
        (replace(step(10**6), topology=ranks("aa")), "nccl", "with 2 ranks"),
    ],
)
def test_the_fastest_at_this_size_that_these_ranks_can_use(table, here, name, why):
    choice = choose("auto", here, table())
    assert choice.name == name
    assert choice.nccl == ({"max_ctas": 8} if "max_ctas" in why else {})
    with pytest.raises(AssertionError, match=why):
        raise AssertionError(choice.why)


@pytest.mark.parametrize(
    ("here", "message"),
    [
        (replace(step(1), topology=ranks("aaa")), "measured with 2 and 4 ranks, not with 3"),
        (replace(step(1), topology=ranks("aa"), libraries=()), "no time of nvlink with 2 ranks, only of nccl"),
        (replace(step(1), device="cuda"), "measured on cpu, the ranks are on cuda"),
        (BOARDS, "measured on cpu"),
        (replace(step(1), topology=ranks("aabb")), "measured on one machine, the ranks are in 2 domains"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(table, here, message):
    with pytest.raises(ValueError, match=f"^all2all_table.*{message}"):
        choose("auto", here, table())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"entries": []}, "entries must be a list with at least one entry"),
        ({"top_k": 0}, "top_k must be an integer >= 1, got 0"),
        ({"row_bytes": "4096"}, "row_bytes must be an integer"),
        ({"machine": {"device": "tpu", "name": "a"}}, "device of machine must be one of cpu, cuda, got 'tpu'"),
        ({"machine": "a"}, "machine must be an object with device, name"),
        ({"entries": [entry("nccl", 0)]}, "p50_us of an entry must be a number > 0, got 0"),
        (
            {"entries": [entry("nccl", 1, fast=True)]},
            "nccl of an entry has 'fast'; allowed are max_ctas, min_ctas",
        ),
        ({"entries": [entry("nccl", 1) | {"tokens": 1.5}]}, "tokens of an entry must be an integer"),
        ({"best": []}, "the file has 'best'; allowed are entries"),
    ],
)
def test_invalid_fields_are_named(table, changes, message):
    with pytest.raises(ValueError, match=f"^all2all_table '.*table.json': {message}"):
        table(**changes)


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match=r"^all2all_table must be a readable file, got '/no/such': "):
        read("/no/such")
    (tmp_path / "text").write_text("{")
    with pytest.raises(ValueError, match=r"^all2all_table '.*text' is not JSON: "):
        read(str(tmp_path / "text"))
