"""`python -m expertwire.bench front`."""

from __future__ import annotations

import json

import pytest

from expertwire.bench.front import run as front
from expertwire.bench.front.latency import added_ms


def test_a_tokens_step_is_the_last_that_came_before_it():
    steps = [10.0, 10.1, 10.2, 10.3, 10.4]
    arrivals = [10.103, 10.201, 10.32]
    assert added_ms(arrivals, steps) == pytest.approx([3, 1, 20])


def test_a_token_that_is_a_step_late():
    steps = [number / 10 for number in range(1000)]
    arrivals = [step + 0.001 for step in steps[7:]]
    arrivals[500] += 0.15
    added = added_ms(arrivals, steps)
    assert (added[0], added[500]) == pytest.approx((1, 151))


def test_steps_that_are_taken_down_late():
    steps = [number / 10 for number in range(1000)]
    arrivals = [step + 0.001 for step in steps[7:]]
    late = [step + 0.03 if number % 20 == 0 else step for number, step in enumerate(steps)]
    added = added_ms(arrivals, late)
    assert sorted(added)[len(added) // 2] == pytest.approx(1)


def test_tokens_without_a_step():
    with pytest.raises(ValueError, match="came before their steps"):
        added_ms([1.0, 2.0], [5.0, 6.0])


def test_a_short_run(tmp_path, capsys):
    path = tmp_path / "front.json"
    cases = ["streams 16", "fronts 2", "bare grpc.aio"]
    assert front.run(["--cases", *cases, "--seconds", "0.3", "--runs", "1", "--json", str(path)]) == 0
    results = json.loads(path.read_text())["results"]
    assert list(results) == cases
    for name in cases:
        assert results[name]["tokens_per_s"] > 0, name
        assert results[name]["runs"][0]["messages_per_cpu_s"] > 0
    assert len(capsys.readouterr().out.splitlines()) == 3
