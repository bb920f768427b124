"""`python -m expertwire.bench.serving.branches`: branches as a group and as requests of their own."""

import json
import sys

from expertwire.bench.serving import branches


def test_branches_as_a_group_and_as_requests(monkeypatch, tmp_path):
    options = ["--branches", "3", "--prompt", "40", "--output", "4", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["branches", *options, "--json", str(tmp_path / "found.json")])
    assert branches.main() == 0
    found = json.loads((tmp_path / "found.json").read_text())["medians"]
    assert found["group, cache off"]["computed"] < 40 + 3 * 4 + 3
    assert found["requests, cache off"]["computed"] > 3 * 40
