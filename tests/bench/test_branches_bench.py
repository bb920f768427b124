"""`python -m expertwire.bench.serving.branches`: branches as a group and as requests of their own."""

import json
import sys

import pytest

from expertwire.bench.serving import branches


def test_branches_as_a_group_and_as_requests(monkeypatch, tmp_path):
    options = ["--branches", "3", "--prompt", "40", "--output", "4", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["branches", *options, "--json", str(tmp_path / "found.json")])
    assert branches.main() == 0
    found = json.loads((tmp_path / "found.json").read_text())["medians"]
    assert found["group, cache off"]["computed"] < 40 + 3 * 4 + 3
    assert found["requests, cache off"]["computed"] > 3 * 40


@pytest.mark.parametrize("step", [16, 56, 120])
def test_a_step_in_tokens_of_a_prompt(step):
    token_s = 2e-5
    group_s, requests_s = [(prompts * 512 + 127 * step) * token_s for prompts in (1, 16)]
    assert branches.step_in_prompt_tokens(group_s, requests_s, 16, 512, 128) == pytest.approx(step)
    assert (requests_s / group_s >= 1.99) == (step <= 56)
