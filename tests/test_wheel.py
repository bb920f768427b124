"""The wheel has what a user needs, and works where there is no checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("expertwire", "scheduler", "strategies", "kernels", "comm", "moe", "engine", "deploy", "bench")
BUILD = "import sys, setuptools.build_meta as backend; backend.build_wheel(sys.argv[1])"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder into which the wheel, built from a copy of the tree, is unpacked."""
    source, wheels, target = (tmp_path_factory.mktemp(name) for name in ("source", "wheels", "target"))
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run([sys.executable, "-c", BUILD, str(wheels)], cwd=source, check=True, capture_output=True)
    (wheel,) = wheels.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(target)
    return target


def run(installed, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    command = [sys.executable, "-P", *arguments]
    done = subprocess.run(command, cwd=installed.parent, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_file_is_in_the_wheel(installed):
    here = {
        Path(name if name == "expertwire" else f"expertwire/{name}") / path.relative_to(ROOT / name)
        for name in FOLDERS
        for path in (ROOT / name).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and "results" not in path.parts
    }
    there = {path.relative_to(installed) for path in (installed / "expertwire").rglob("*") if path.is_file()}
    assert there == here
    assert Path("expertwire/deploy/proto/expertwire_v1.proto") in there
    assert Path("expertwire/deploy/ray_cluster.sh") in there
    assert Path("expertwire/demo_model/model.safetensors") in there


def test_it_works_in_another_folder(installed):
    where = run(installed, "-c", "import expertwire.deploy.demo as demo; print(demo.__file__)")
    assert Path(where.strip()).is_relative_to(installed)
    assert "--ep-size" in run(installed, "-m", "expertwire.deploy.cli", "demo", "--help")
    model = str(installed / "expertwire" / "demo_model")
    assert run(installed, "-m", "expertwire.deploy.cli", "inspect", model).startswith("Qwen3MoeForCausalLM")
