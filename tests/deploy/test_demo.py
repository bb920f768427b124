"""The demonstration as a user runs it."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest

from expertwire.deploy.demo import _address, _client
from expertwire.engine.frontend.api import EngineFailed


@pytest.mark.slow
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


def test_the_address_is_found_behind_warnings():
    lines = "(raylet) WARNING: see the workarounds.\nserving demo on 127.0.0.1:5001\n"
    with subprocess.Popen(["printf", lines], stdout=subprocess.PIPE, text=True) as server:
        assert _address(server, io.StringIO(), "starting") == "127.0.0.1:5001"


def test_a_client_s_error_is_a_failure_of_the_demo():
    with pytest.raises(EngineFailed, match="UNAVAILABLE"), _client("127.0.0.1:1") as client:
        client.stats()
