"""Runs each file of tests/kernels_interpreted in a process in which Triton interprets its kernels."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "tests" / "kernels_interpreted").glob("test_*.py"))
# What `make test` runs of them, in one process: the interpreter itself and files that take seconds.
SMALL = (
    "test_interpreter", "test_gpu_combine", "test_gpu_rms_norm", "test_gpu_grouped_gemm_tiles", "test_gpu_gated_rms_norm",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", [file.stem for file in FILES if file.stem not in SMALL])
def test_interpreted(name):
    run(name)


def test_small_files():
    run(*SMALL)


def run(*names):
    files = [str(ROOT / "tests" / "kernels_interpreted" / f"{name}.py") for name in names]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, f"{done.stdout[-8000:]}\n{done.stderr[-2000:]}"


def test_there_are_files():
    assert {file.stem for file in FILES} > set(SMALL)
