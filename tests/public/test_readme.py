"""The documents are true: examples run, links lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
OFFLINE, CLIENT = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def run(code: str) -> str:
    """Return the output of a program that is started in the checkout."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_python_example():
    lines = run(OFFLINE).splitlines()
    assert [line.startswith("SUM ") for line in lines] == [True, True, False]
    assert lines[0].endswith("answer 25 stop") and lines[1].endswith("answer 3 stop") and lines[2].endswith("answer 25")


@pytest.mark.slow
def test_the_client_example():
    command = [sys.executable, "-P", "-m", "expertwire.deploy.cli", "serve", "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        address = server.stdout.readline().split()[-1]
        text, tokens, model = run(CLIENT.replace("127.0.0.1:50051", address)).splitlines()
    finally:
        server.terminate()
        assert server.wait(60) == 0
    assert (text[-9:], tokens, model) == ("answer 25", "20 tokens", "Qwen3MoeForCausalLM True")


@pytest.mark.parametrize(
    "document",
    [
        str(file.relative_to(ROOT))
        for folder in (".", "docs", "docs/adr", "examples")
        for file in sorted((ROOT / folder).glob("*.md"))
    ],
)
def test_links_lead_somewhere(document):
    file = ROOT / document
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", file.read_text()):
        assert (file.parent / target).exists(), f"{document} links to {target}"
