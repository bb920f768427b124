"""The examples run from a checkout."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("file", "line"),
    [
        pytest.param(  # the README's is in test_readme.py
            "offline.py",
            "SUM 40 70 15 ? 40 + 15 = 55 : 70 55 ; 70 + 55 = 25 : 25 ; answer 25",
            marks=pytest.mark.slow,
        ),
        ("own_policy.py", "ShortPromptsFirst"),
        ("own_model.py", "the same as the registry's: True"),
    ],
)
def test_example(file, line):
    done = subprocess.run([sys.executable, f"examples/{file}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert line in done.stdout
