"""Runs each file of tests/kernels_interpreted in a process in which Triton interprets its kernels."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.slow import slow_but

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "tests" / "kernels_interpreted").glob("test_*.py"))
# What `make test` runs of them: the interpreter itself and files that take seconds.
KEPT = (
    "test_interpreter", "test_gpu_combine", "test_gpu_rms_norm", "test_gpu_grouped_gemm_tiles", "test_gpu_gated_rms_norm",
)  # fmt: skip


@pytest.mark.parametrize("name", slow_but(KEPT, [file.stem for file in FILES]))
def test_interpreted(name):
    file = ROOT / "tests" / "kernels_interpreted" / f"{name}.py"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, f"{done.stdout[-8000:]}\n{done.stderr[-2000:]}"


def test_there_are_files():
    assert FILES
