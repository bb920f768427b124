"""`python -m expertwire.bench crossover`: its models, the crossover that it finds, its plot, and one small run."""

import json

import pytest

from expertwire.bench.serving import crossover


def result(hybrid, attention):
    """Times of both models at contexts of 1,000, 2,000, ... tokens."""
    rows = []
    for name, times in (("hybrid", hybrid), ("attention", attention)):
        for number, seconds in enumerate(times):
            values = dict.fromkeys(("ttft_cpu_s", "ttft_wall_s", "tpot_cpu_s", "tpot_wall_s"), seconds)
            rows.append({"model": name, "context": 1000 * 2**number, **values, "samples": [values]})
    return {
        "machine": {"cpu": "a processor"},
        "note": "busy",
        "active parameters": {"hybrid": 10**6, "attention": 10**6},
        "rows": rows,
    }


@pytest.mark.parametrize(
    ("hybrid", "attention", "expected"),
    [
        ([2, 2, 2], [1, 4, 8], 2000 / 2**0.5),  # half as fast, then twice as fast
        ([1, 2, 3], [2, 4, 6], 1000),
        ([2, 2, 2], [1, 1, 1], None),
        ([1, 2, 2], [2, 1, 4], 4000 / 2**0.5),  # only the last crossing lasts
    ],
)
def test_the_crossover_lies_where_the_hybrid_becomes_faster_for_good(hybrid, attention, expected):
    found = crossover.crossover(result(hybrid, attention), "ttft_cpu_s")
    assert found == (expected if expected is None else pytest.approx(expected))


def test_the_models_have_nearly_equal_active_parameters():
    with crossover._folders() as folders:
        hybrid, attention = (crossover._active(folders[name]) for name in ("hybrid", "attention"))
    assert abs(hybrid - attention) < 0.02 * attention


def test_the_plot_of_a_file_shows_both_models_and_the_claims(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    file = tmp_path / "found.json"
    file.write_text(json.dumps(result([2, 2, 2], [1, 4, 8])))
    assert crossover.run(["--plot", str(file), "--png", str(tmp_path / "found.png")]) == 0
    assert (tmp_path / "found.png").stat().st_size > 10_000
    assert "the hybrid is faster from 1,414 tokens on" in capsys.readouterr().out
    first, second = crossover.plot(json.loads(file.read_text())).axes
    assert {text.get_text()[:9] for text in first.get_legend().get_texts()} == {"hybrid, 1", "attention"}
    assert len(first.texts) == 2 and not second.texts


@pytest.mark.slow
def test_a_small_run(tmp_path):
    file = tmp_path / "found.json"
    options = ["--contexts", "40", "80", "--output", "5", "--rounds", "2", "--note", "a test"]
    assert crossover.run([*options, "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert found["note"] == "a test"
    assert [(row["model"], row["context"]) for row in found["rows"]] == [
        (name, context) for context in (40, 80) for name in ("hybrid", "attention")
    ]
    assert all(len(row["samples"]) == 2 for row in found["rows"])
    assert all(0 < sample[name] < 60 for row in found["rows"] for sample in row["samples"] for name in sample)
