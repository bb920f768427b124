"""The page on test-time compute is true: its names, its options and its example."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path
from types import ModuleType

from helpers.simulated_groups import run_group, scripted

from expertwire.strategies.base import Budget
from expertwire.strategies.record import Recorded, replay
from expertwire.strategies.registry import ANSWERS, STRATEGIES, parse_strategy, strategy_from_dict
from expertwire.strategies.verifiers import VerifierPolicy

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "test_time_compute.md").read_text()


def test_the_page_has_every_strategy_twice():
    """Once in the table and once with a paragraph."""
    table = PAGE.partition("## Options")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == set(STRATEGIES)
    assert set(re.findall(r"^\*\*(\w+)\*\*", PAGE, re.MULTILINE)) >= set(STRATEGIES)


def test_the_options_exist():
    assert set(re.findall(r"`budget\.(\w+)`", PAGE)) == {field.name for field in dataclasses.fields(Budget)}
    policy = {field.name for field in dataclasses.fields(VerifierPolicy)}
    assert policy == set(re.findall(r"`verifier_policy\.(\w+)`", PAGE)) | {"max_batch"}
    assert all(f"`{name}`" in PAGE for name in ANSWERS)


def test_the_command_lines_are_strategies():
    examples = re.findall(r'`(majority_vote:[^`]*|\{"strategy[^`]*\})`', PAGE)
    assert len(examples) == 2
    for example in examples:
        strategy_from_dict(parse_strategy(example))


def test_the_example_of_an_own_strategy_runs_and_replays(monkeypatch):
    (code,) = (each for each in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "class UntilShort" in each)
    module = ModuleType("page_on_test_time_compute")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # where dataclasses look
    exec(code, module.__dict__)
    strategies = {**STRATEGIES, "until_short": module.UntilShort}
    strategy = strategy_from_dict(parse_strategy("until_short:limit=3"), strategies=strategies)
    outcome = run_group(strategy, scripted("long", "longer", "a"))
    assert outcome.text == "a"
    assert len(run_group(strategy, scripted("long")).group.branches) == 8
    lines: list[str] = []
    recorded = Recorded(strategy, lines.append)
    for group, _ in outcome.decisions:
        recorded.decide(group)
    recorded.select(outcome.group)
    assert len(replay(lines, strategy)) == len(outcome.decisions) + 1
