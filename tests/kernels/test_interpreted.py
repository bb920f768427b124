"""Runs each file of tests/kernels_interpreted in a process in which Triton interprets its kernels, as many at once as there are
cores for it."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cores import NUM_CORES

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "tests" / "kernels_interpreted").glob("test_*.py"))


def run(file):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)


@pytest.fixture(scope="session")
def runs(request):
    """Of each file that is selected, the process that runs it."""
    selected = [
        item.callspec.params["file"] for item in request.session.items if item.originalname == "test_interpreted"
    ]
    pool = ThreadPoolExecutor(NUM_CORES)
    yield {file: pool.submit(run, file) for file in selected}
    pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("file", FILES, ids=[file.stem for file in FILES])
def test_interpreted(file, runs):
    done = runs[file].result()
    assert done.returncode == 0, f"{done.stdout[-8000:]}\n{done.stderr[-2000:]}"


def test_there_are_files():
    assert FILES
