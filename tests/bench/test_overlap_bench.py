"""`python -m expertwire.bench.serving.overlap`: the real controller beside ranks that simulate computing."""

import json
import sys

import pytest

from expertwire.bench.serving import overlap


@pytest.mark.parametrize(
    "computes", [[], pytest.param(["--host-computes"], marks=pytest.mark.slow)], ids=["devices", "hosts"]
)
def test_steps_with_and_without_planning_ahead(monkeypatch, tmp_path, computes):
    options = ["--ranks", "2", "--running", "4", "--step-ms", "1", "--steps", "5", "--rounds", "1", *computes]
    monkeypatch.setattr(sys, "argv", ["overlap", *options, "--json", str(tmp_path / "found.json")])
    assert overlap.main() == 0
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert [row["overlap"] for row in rows] == [True, False]
    assert all(0 < row["period_ms_p50"] <= row["period_ms_p99"] for row in rows)
