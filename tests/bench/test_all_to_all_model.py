"""Bytes of dispatch and combine against a count of every possible routing, and the model against what was published."""

import itertools
import json
from math import comb

import numpy as np
import pytest

from expertwire.bench.all_to_all import model, published, traffic
from expertwire.comm.all_to_all import cost_model
from expertwire.deploy import cli


@pytest.mark.parametrize(
    ("experts_P", "top_k"), [([2, 2], 1), ([2, 2, 2, 2], 3), ([3, 3, 2], 2), ([1] * 6, 6), ([4, 0, 3], 4)]
)
def test_distinct_ranks_are_those_of_every_choice_of_experts(experts_P, top_k):
    rank_of = np.repeat(np.arange(len(experts_P)), experts_P)
    choices = list(itertools.combinations(range(len(rank_of)), top_k))
    assert len(choices) == comb(len(rank_of), top_k)
    mean = np.mean([len(set(rank_of[list(choice)])) for choice in choices])
    assert cost_model.distinct_ranks(experts_P, top_k) == pytest.approx(mean, rel=1e-12)


@pytest.mark.parametrize("experts_P", [[2, 2, 2], [2, 1]])
def test_expected_bytes_are_the_mean_of_all_counted_ones(experts_P):
    """Each rank in turn is home to one token of every possible choice."""
    top_k, row, ranks = 2, 10, len(experts_P)
    offsets = [0, *np.cumsum(experts_P).tolist()]
    ids_TK = np.array(list(itertools.combinations(range(offsets[-1]), top_k)))
    tokens, copies = len(ids_TK), cost_model.distinct_ranks(experts_P, top_k)
    counts = [traffic.counted(ids_TK, offsets, rank, row) for rank in range(ranks)]
    expected = (
        traffic.expected(tokens, row, copies, ranks),
        traffic.expected(tokens, row, top_k, ranks),
    )
    for phase in (0, 1):
        for field in ("unique", "sent", "wire"):
            mean = np.mean([getattr(count[phase], field) for count in counts])
            assert mean == pytest.approx(getattr(expected[phase], field)), (phase, field)


def test_counts_of_a_routing_worked_out_by_hand():
    """Experts 0-1 on rank 0, 2-3 on rank 1, 4 on rank 2; rank 1 is home."""
    ids_TK = np.array([[0, 1, 2], [3, -1, 2], [-1, -1, -1], [4, 0, 3]])
    out, back = traffic.counted(ids_TK, (0, 2, 4, 5), 1, 100)
    assert (out.unique, out.sent, out.wire) == (300, 600, 300)
    assert (back.unique, back.sent, back.wire) == (300, 800, 400)


def test_the_table_of_copies_and_bounds():
    """The figures of the design: ranks a token, remote copies, and microseconds at 450 GB/s."""
    rows = {4: (3.61, 2.71), 8: (5.30, 4.63), 16: (6.52, 6.12), 32: (7.27, 7.04), 64: (7.68, 7.56), 72: (7.71, 7.60)}
    for ranks, (copies, remote) in rows.items():
        found = cost_model.distinct_ranks(model.experts_of(ranks), 8)
        assert found == pytest.approx(copies, abs=0.011)
        assert found * (ranks - 1) / ranks == pytest.approx(remote, abs=0.011)
        assert cost_model.duplicate_probability(found, 8) == pytest.approx(1 - copies / 8, abs=0.002)
    fp8, bf16 = traffic.row_bytes(7168, "fp8"), traffic.row_bytes(7168, "bf16")
    assert (bf16, fp8, traffic.row_bytes(7168, "mxfp8"), traffic.row_bytes(7168, "nvfp4")) == (
        14336,
        7392,
        7392,
        4032,
    )
    copies = cost_model.distinct_ranks([32] * 8, 8)
    assert traffic.expected(4096, fp8, copies, 8).bound_us(450) == pytest.approx(312, abs=1)
    assert traffic.expected(4096, bf16, 8, 8).bound_us(450) == pytest.approx(913, abs=1)
    assert traffic.expected(4096, bf16, copies, 8).bound_us(450) == pytest.approx(605, abs=1)


def test_an_unknown_format_is_refused():
    with pytest.raises(ValueError, match="format must be one of fp32, bf16, fp8, mxfp8, nvfp4, got 'int8'"):
        traffic.row_bytes(7168, "int8")


@pytest.mark.parametrize("phase", model.PHASES)
@pytest.mark.parametrize("rows", model.held_out())
def test_the_kernel_model_predicts_what_it_was_not_fitted_to(phase, rows):
    kernel = model.fit_published(phase)
    errors = [abs(error) for *_, error in model.residuals(kernel, model.held_out()[rows](), phase)]
    assert len(errors) >= 7
    assert np.median(errors) <= model.BAR


def test_the_fit_finds_the_parameters_it_was_made_with():
    true = model.KernelTime(floor_us=20, start_us=12, rate_gb_s=700, slowing=0.05)
    points = []
    for ranks, tokens in itertools.product((8, 16), (1, 32, 512, 2048)):
        wire = traffic.expected(tokens, 14336, 8, ranks).wire
        points.append((tokens, ranks, wire, true(wire, ranks)))
    found = model.fit(points)
    assert vars(found) == pytest.approx(vars(true))


def test_the_fit_sees_no_row_it_is_held_against():
    held = {(row.num_ranks, row.dispatch_format) for rows in model.held_out().values() for row in rows()}
    assert (8, "bf16") not in held
    assert (16, "bf16") not in held
    assert {(32, "bf16"), (64, "bf16"), (8, "mxfp8"), (8, "nvfp4")} <= held


def test_published_figures_obey_the_bound():
    """Nobody is faster than the wire; a figure typed wrong may be."""
    for row in (*published.one_sided(), *published.one_sided_narrow(), *published.others()):
        if row.hardware:
            for phase in model.PHASES:
                us, line = model.time_of(row, phase), model.LINE_GB_S[row.hardware]
                assert us is None or us > model.wire_of(row, phase) / line / 1e3, (row, phase)


def test_the_command_prints_and_writes_the_same(tmp_path, capsys):
    path = tmp_path / "model.json"
    assert cli.main(["bench", "all-to-all", "--model", "nvl72", "--json", str(path)]) == 0
    text, figures = capsys.readouterr().out, json.loads(path.read_text())
    assert {entry["num_ranks"] for entry in figures["bounds"]} == {8, 16, 32, 36, 64, 72}
    for phase in model.PHASES:
        part = figures["kernel_model"][phase]
        assert f"{part['parameters']['rate_gb_s']:.0f} GB/s" in text
        assert all(errors["median"] <= errors["bar"] for errors in part["held_out"].values())
    assert "BEYOND" not in text
    for library in ("TensorRT-LLM one-sided", "DeepEP V1 low latency", "DeepEP V2, 64 SMs", "Hybrid-EP kernel, 32 SMs"):
        assert library in text
    for entry in figures["beside"]:
        assert (entry["kind"] == "modelled") != ("source" in entry), entry


def test_other_machines_show_their_own_peers(capsys):
    assert cli.main(["bench", "all-to-all", "--model", "hgx8"]) == 0
    text = capsys.readouterr().out
    assert "H200" in text
    assert "GB200" not in text.split("Modelled and published")[1]
