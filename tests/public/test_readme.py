"""What the documents say is true: examples run, options are those of the command line, links lead somewhere."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

import pytest

from expertwire.deploy import cli

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
OFFLINE, CLIENT = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def run(code: str) -> str:
    """What a program prints that is started in the checkout."""
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


def test_the_options_are_those_of_the_command_line():
    [commands] = [a for a in cli.make_parser()._actions if isinstance(a, argparse._SubParsersAction)]
    serve = commands.choices["serve"]
    rows = [
        f"| {', '.join(f'`{flag}`' for flag in action.option_strings)} | {serve._get_formatter()._expand_help(action)} |"
        for action in serve._actions
        if action.option_strings and action.dest != "help"
    ]
    [table] = re.findall(r"\| option \| meaning \|\n\|---\|---\|\n(.*?)\n\n", README, re.DOTALL)
    assert table.splitlines() == rows
    for name in ("generate", "bench throughput"):
        command = commands.choices[name.split()[0]]
        if name.startswith("bench"):
            [benches] = [a for a in command._actions if isinstance(a, argparse._SubParsersAction)]
            command = benches.choices["throughput"]
        flags = {flag for action in command._actions for flag in action.option_strings if flag.startswith("--")}
        assert all(f"`{flag}`" in README or f"{flag} " in README for flag in flags - {"--help"}), name


@pytest.mark.parametrize("document", ["README.md", *(f"docs/{file.name}" for file in sorted(ROOT.glob("docs/*.md")))])
def test_links_lead_somewhere(document):
    file = ROOT / document
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", file.read_text()):
        assert (file.parent / target).exists(), f"{document} links to {target}"
