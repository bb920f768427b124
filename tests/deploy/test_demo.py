"""The demonstration as a user runs it."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize("launcher", ["local", pytest.param("ray", marks=pytest.mark.full)])
def test_the_demo_answers_and_ends(launcher):
    command = [sys.executable, "-m", "expertwire.deploy.cli", "demo", "--launcher", launcher]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("answer") >= 8
    assert done.stdout.count("✓") >= 6
    assert "sharded over 2 ranks" in done.stdout
    assert "layer   2 |" in done.stdout
    assert "rank   1  " in done.stdout
