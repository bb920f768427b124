"""The demonstration as a user runs it, and its chart."""

from __future__ import annotations

import subprocess
import sys

import pytest

from expertwire.deploy.demo import spread_lines


@pytest.mark.parametrize("launcher", ["local", pytest.param("ray", marks=pytest.mark.full)])
def test_the_demo_answers_and_ends(launcher):
    command = [sys.executable, "-m", "expertwire.deploy.cli", "demo", "--launcher", launcher]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("answer") >= 8
    assert done.stdout.count("✓") >= 6
    assert "sharded over 2 ranks" in done.stdout
    assert "layer 2   rank 0" in done.stdout


def test_the_chart_has_a_bar_an_expert_and_the_shares_of_the_ranks():
    # Five experts on two ranks: three and two. The second layer is dense.
    assert spread_lines([[80, 40, 0, 10, 20], [], [1, 1, 1, 1, 4]], 2) == [
        "  layer 0   rank 0 █▄·  80%   rank 1 ▁▂  20%",
        "  layer 2   rank 0 ▂▂▂  38%   rank 1 ▂█  62%",
    ]
