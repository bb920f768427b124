"""The bench of the all-to-all measures what it says, with rows checked, and picks the fastest."""

import json

import numpy as np
import pytest
import torch

from expertwire.bench.all_to_all import run as all_to_all
from expertwire.bench.all_to_all import text as all_to_all_text
from expertwire.bench.all_to_all import traffic
from expertwire.bench.all_to_all.ranks import Candidate, Setting
from expertwire.comm.all_to_all import cost_model
from expertwire.comm.group import NcclOptions
from expertwire.comm.topology import backend_times
from expertwire.comm.topology.backend_choice import BACKENDS
from expertwire.deploy import cli

SMALL = ["--ranks", "2", "--tokens", "1", "4", "--hidden-size", "16", "--steps", "3", "--runs", "2"]


def test_figures_are_complete_and_add_up(tmp_path, capsys):
    path, table = tmp_path / "figures.json", tmp_path / "table.json"
    options = [*SMALL, "--sweep", str(table), "--json", str(path)]
    assert cli.main(["bench", "all-to-all", *options]) == 0
    figures = json.loads(path.read_text())
    assert {(row["backend"], row["tokens"]) for row in figures["rows"]} == {
        (name, tokens) for name in BACKENDS for tokens in (1, 4)
    }
    for row in figures["rows"]:
        for phase in ("dispatch", "combine"):
            part = row[phase]
            assert 0 < part["p50_us"] <= part["p99_us"]
            assert part["bytes"]["wire"] <= part["bytes"]["sent"]
            assert part["bytes"]["unique"] == row["tokens"] * 16 * 2
            assert part["gb_s"]["sent"] == pytest.approx(part["bytes"]["sent"] / part["p50_us"] / 1e3)
        assert row["combine"]["bytes"]["sent"] == row["tokens"] * 8 * 16 * 2
    read = backend_times.read(str(table))
    assert {(entry.backend, entry.tokens) for entry in read.entries} == {
        (name, tokens) for name in BACKENDS for tokens in (1, 4)
    }
    assert (read.device, read.nbytes(4)) == ("cpu", 4 * 8 * 2 * 32)
    fastest = read.fastest(2, read.nbytes(4), BACKENDS)
    assert [entry.p50_us for entry in fastest] == sorted(entry.p50_us for entry in read.entries if entry.tokens == 4)
    out = capsys.readouterr().out
    assert "nothing about GPUs" in out
    assert len(out.splitlines()) == 3 + 2 * len(figures["rows"])


def test_the_backends_that_were_asked_for(tmp_path, capsys):
    """In both formats, of which one is half as many bytes on the way out."""
    options = [*SMALL, "--backends", "nvlink", "--formats", "bf16", "fp8", "--hidden-size", "128"]
    assert cli.main(["bench", "all-to-all", *options, "--json", str(tmp_path / "figures.json")]) == 0
    rows = json.loads((tmp_path / "figures.json").read_text())["rows"]
    assert {row["candidate"] for row in rows} == {"nvlink", "nvlink fp8"}
    plain, fp8 = ({row["tokens"]: row for row in rows if row["candidate"] == name} for name in ("nvlink", "nvlink fp8"))
    for tokens, row in fp8.items():
        assert row["dispatch"]["bytes"]["sent"] / plain[tokens]["dispatch"]["bytes"]["sent"] == 132 / 256
        assert row["combine"]["bytes"] == plain[tokens]["combine"]["bytes"]


def test_rows_without_whole_groups_cannot_go_out_in_fp8(capsys):
    assert cli.main(["bench", "all-to-all", *SMALL, "--formats", "fp8"]) == 2
    assert "--hidden-size must be a multiple of 128 with --formats fp8, got 16" in capsys.readouterr().err


def answers(us):
    """Return the answers of two ranks for one candidate; us [2 ranks][steps][dispatch, combine]."""
    traffic = [[{"unique": 1.0, "sent": 4.0, "wire": wire * phase} for phase in (1, 2)] for wire in (2e3, 3e3)]
    same = {"candidate": "nccl", "backend": "nccl", "format": "bf16", "nccl": {}, "graph": False, "tokens": 4}
    return [[same | {"us": us[rank], "bytes": traffic[rank], "copy_gb_s": 2.0 - rank}] for rank in (0, 1)]


def test_the_slowest_rank_counts_and_runs_are_summed_up_by_their_median():
    """Steps of three runs: p50 of each is 10, 20 and 90 us, where one rank is slow; the median of those is 20."""
    slow = [[10, 1], [10, 1], [20, 1], [20, 1], [90, 1], [90, 1]]
    fast = [[1, 2]] * 6
    setting = Setting(candidates=(Candidate(backend="nccl"),), tokens=(4,), steps=2, runs=3)
    (row,) = all_to_all.summarise(answers([slow, fast]), setting)
    assert row["ranks"] == 2
    assert row["dispatch"]["p50_us"] == 20
    assert row["combine"]["p50_us"] == 2
    # The rank with the most on the wire, at the rate of the slowest copy.
    assert row["dispatch"]["bound_us"] == pytest.approx(3e3 / 1.0 / 1e3)
    assert row["combine"]["ratio"] == pytest.approx(2 / 6)


def test_the_table_has_both_phases_together_and_the_fastest_first():
    def row(backend, dispatch, combine, tokens=1):
        phases = {"dispatch": {"p50_us": dispatch}, "combine": {"p50_us": combine}}
        return {"ranks": 2, "tokens": tokens, "backend": backend, "nccl": {"max_ctas": 4}, **phases}

    rows = [row("nccl", 5, 9), row("reference", 6, 7), row("nccl", 1, 1, tokens=2)]
    table = all_to_all.table({"machine": {}, "setting": {"hidden_size": 16, "top_k": 8}, "rows": rows})
    found = [(entry["tokens"], entry["backend"], entry["p50_us"]) for entry in table["entries"]]
    assert found == [(1, "reference", 13), (1, "nccl", 14), (2, "nccl", 2)]


@pytest.mark.parametrize("reached", [True, False])
def test_a_sweep_on_gpus_tries_limits_of_thread_blocks_and_copy_engines(monkeypatch, reached):
    """And memory of peers, if they reach each other's."""
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: reached or (a, b) != (1, 2))
    names = [str(candidate) for candidate in all_to_all.sweep("cuda", 3)]
    assert {"reference", "nccl", "nccl max_ctas=8"} <= set(names)
    assert ("nvlink" in names) == reached
    assert len(names) == len(set(names))
    assert str(Candidate(backend="nccl", nccl=NcclOptions(min_ctas=2, max_ctas=4))) == "nccl min_ctas=2 max_ctas=4"


def test_on_gpus_graphs_are_beside_launches():
    names = [str(candidate) for candidate in all_to_all._candidates(BACKENDS, ["bf16", "fp8"], "cuda")]
    assert {"nvlink", "nvlink graph", "nvlink fp8 graph", "nccl fp8"} <= set(names)
    assert not {"nccl graph", "reference graph"} & set(names)


def test_what_is_checked_has_no_times():
    machine = {"name": "an H200", "label": "too few GPUs to measure anything"}
    setting = {"hidden_size": 16, "top_k": 8, "num_experts": 256, "routing": "uniform", "runs": 3, "steps": 10}
    checked = [{"ranks": 4, "tokens": 32, "format": "bf16", "graph": graph, "steps": 10} for graph in (False, True)]
    text = "\n".join(all_to_all_text.measured({"machine": machine, "setting": setting, "rows": [], "checked": checked}))
    assert "correctness only, no times" in text
    assert "from graphs" in text
    assert "GB/s" not in text


@pytest.mark.parametrize("options", [["--sweep", "table.json"], ["--backends", "nccl"]])
def test_ranks_that_share_a_gpu_are_not_measured(monkeypatch, capsys, options):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert cli.main(["bench", "all-to-all", *SMALL, *options]) == 2
    assert "--ranks must be in [1, 1], the GPUs here, got [2]; several ranks on one GPU" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--tokens", "--ranks", "--steps", "--hidden-size"])
def test_numbers_below_one_are_refused(option, capsys):
    assert cli.main(["bench", "all-to-all", option, "0"]) == 2
    assert f"error: {option} must be >= 1" in capsys.readouterr().err


def test_bytes_of_a_routing_are_close_to_the_expected_ones():
    """Uniform routing as the bench draws it: 64 experts, 8 of them a token, on 8 ranks."""
    rng = np.random.default_rng(3)
    ids_TK = np.array([rng.permutation(64)[:8] for _ in range(4000)])
    offsets = tuple(range(0, 65, 8))
    out, back = traffic.counted(ids_TK, offsets, 3, 100)
    copies = cost_model.distinct_ranks([8] * 8, 8)
    assert out.wire == pytest.approx(traffic.expected(4000, 100, copies, 8).wire, rel=0.02)
    assert back.wire == pytest.approx(traffic.expected(4000, 100, 8, 8).wire, rel=0.02)
