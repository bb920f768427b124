"""`expertwire calibrate`: a cascade's policy from a decision log, and a table of strategies from runs of the demo model."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import re

import numpy as np
import pytest

from expertwire.deploy import demo_verifiers
from expertwire.deploy.cli import main
from expertwire.deploy.demo_task import make_problem
from expertwire.strategies import calibrate_cascade
from expertwire.strategies.cascade import Cascade, fit_router
from expertwire.strategies.cascade_log import DecisionRecord, Leg, evaluate_thresholds
from expertwire.strategies.cascade_policy import cascade_to_json, read_cascade
from expertwire.strategies.compute_optimal import ComputeOptimal
from expertwire.strategies.decision_log import read_records
from expertwire.strategies.registry import strategy_from_dict

BASE = Cascade(small="s", large="l", version="base", random_share=1.0)


def record(rng: random.Random, number: int) -> DecisionRecord:
    """A request of which the small model is wrong if it is long, and half of the time if its output is unsure."""
    is_long, is_unsure = rng.random() < 0.3, rng.random() < 0.3
    right = not is_long and not (is_unsure and rng.random() < 0.5)
    legs = (
        Leg(model="s", tokens=10, complete=True, prompt_tokens=5, cost=15.0),
        Leg(model="l", tokens=10, complete=True, prompt_tokens=5, cost=150.0),
    )
    return DecisionRecord(
        request_id=str(number), policy_version="base", candidates=("s", "l"), scores={}, thresholds={}, chosen="s",
        reason="kept", legs=legs, features={"log_tokens": 3.0 if is_long else 1.0},
        minima=((3, -2.0 - rng.random() if is_unsure else -0.1 * rng.random()),),
        outcomes={"s": float(right), "l": 1.0}, in_random_slice=True, propensity=1.0,
    )  # fmt: skip


@pytest.fixture
def files(tmp_path):
    rng = random.Random(4)
    log, policy = tmp_path / "log", tmp_path / "policy"
    log.write_text("".join(record(rng, number).to_json() + "\n" for number in range(400)))
    policy.write_text(cascade_to_json(BASE))
    return str(log), str(policy), str(tmp_path / "new")


def test_the_policy_routes_what_is_long_and_aborts_what_is_unsure(files, capsys):
    log, policy, new = files
    assert main(["calibrate", "cascade", log, "--cascade", policy, "--out", new]) == 0
    cascade = read_cascade(new)
    assert cascade.version != "base"
    assert cascade.routes_to_large({"log_tokens": 3.0})
    assert not cascade.routes_to_large({"log_tokens": 1.0})
    assert -2.1 < cascade.confidence_threshold < 0
    out = capsys.readouterr().out
    quality, large = map(float, re.search(r"quality ([\d.]+).*alone ([\d.]+)", out).groups())
    cost, large_cost = map(float, re.search(r"request ([\d.]+); of l alone ([\d.]+)", out).groups())
    assert quality > large - 0.03
    assert cost < 0.65 * large_cost
    assert 0.3 < float(re.search(r"escalated ([\d.]+)", out)[1]) < 0.7


@pytest.fixture
def verified(tmp_path):
    """A log whose verifier tells right outputs from wrong ones, but has failed now and then, and its policy."""
    rng, judge = random.Random(4), random.Random(5)
    log, policy = tmp_path / "verified", tmp_path / "verified_policy"
    with log.open("w") as lines:
        for number in range(400):
            made = record(rng, number)
            score = judge.uniform(0.6, 1.0) if made.outcomes["s"] else judge.uniform(0.0, 0.5)
            scores = {"verifier": None if judge.random() < 0.02 else score}
            lines.write(dataclasses.replace(made, scores=scores).to_json() + "\n")
    policy.write_text(cascade_to_json(dataclasses.replace(BASE, verifier="exact", verifier_threshold=0.99)))
    return str(log), str(policy), str(tmp_path / "new")


def test_the_verifiers_threshold_is_chosen_where_the_policy_has_one(files, verified, capsys):
    costs, thresholds = [], []
    for log, policy, new in (files, verified):
        assert main(["calibrate", "cascade", log, "--cascade", policy, "--out", new]) == 0
        thresholds.append(read_cascade(new).verifier_threshold)
        found = re.search(r"quality ([\d.]+).*alone ([\d.]+).*\n.*request ([\d.]+);", capsys.readouterr().out)
        quality, large, cost = map(float, found.groups())
        assert quality > large - 0.03
        costs.append(cost)
    cascade = read_cascade(verified[2])
    assert cascade.verifier == "exact"
    assert thresholds[0] is None
    assert 0.5 < thresholds[1] < 0.75
    assert cascade.routes_to_large({"log_tokens": 3.0})
    assert costs[1] < costs[0] - 5, "right outputs that are unsure are kept"


@pytest.mark.parametrize("verifies", [False, True])
@pytest.mark.parametrize("shortfall", [0.0, 0.1, 0.4])
def test_the_cheapest_thresholds_are_found(verified, monkeypatch, verifies, shortfall):
    monkeypatch.setattr(calibrate_cascade, "_QUANTILES", [0.0, 0.3, 0.6])
    records = read_records(verified[0])[0][:60]
    router = fit_router([each.features for each in records], [each.outcomes["s"] >= 0.5 for each in records])
    records = calibrate_cascade._rescored(records, router, verifies=verifies)
    scores = {name: np.array([each.scores.get(name, np.inf) for each in records]) for name in ("router", "verifier")}
    scores["confidence"] = np.array([each.minima[-1][1] for each in records])
    target = sum(each.outcomes["l"] for each in records) / len(records) - shortfall - 1e-9
    costs = []
    for values in itertools.product(*([None, *calibrate_cascade._thresholds(each)] for each in scores.values())):
        thresholds = {name: value for name, value in zip(scores, values, strict=True) if value is not None}
        found = evaluate_thresholds(records, thresholds)
        if found.quality.value >= target:
            costs.append(found.cost)
    chosen = evaluate_thresholds(records, calibrate_cascade._choose(records, shortfall))
    assert chosen.quality.value >= target
    assert chosen.cost <= min(costs, default=np.inf) + 1e-9


def test_a_shortfall_makes_it_cheaper(files, capsys):
    log, policy, new = files
    costs = []
    for shortfall in ("0", "0.2", "1"):
        assert main(["calibrate", "cascade", log, "--cascade", policy, "--out", new, "--shortfall", shortfall]) == 0
        costs.append(float(re.search(r"request ([\d.]+);", capsys.readouterr().out)[1]))
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] == 15.0, "the small model alone"


def test_mistakes_have_messages(files, tmp_path, capsys):
    log, policy, new = files
    assert main(["calibrate", "cascade", log, "--cascade", policy, "--out", new, "--shortfall", "2"]) == 2
    few = tmp_path / "few"
    few.write_text(record(random.Random(1), 1).to_json())
    assert main(["calibrate", "cascade", str(few), "--cascade", policy, "--out", new]) == 2
    (tmp_path / "other").write_text(cascade_to_json(Cascade(small="a", large="b", version="1")))
    assert main(["calibrate", "cascade", log, "--cascade", str(tmp_path / "other"), "--out", new]) == 2
    (tmp_path / "judged").write_text(cascade_to_json(dataclasses.replace(BASE, verifier="v", verifier_threshold=0.5)))
    assert main(["calibrate", "cascade", log, "--cascade", str(tmp_path / "judged"), "--out", new]) == 2
    errors = capsys.readouterr().err
    assert "shortfall must be a finite number >= 0 and <= 1, got 2.0" in errors
    assert "at least 20 requests of the random slice" in errors
    assert "records must be of the policy's models a and b" in errors
    assert "records must have the verifier's scores, as the policy has a verifier_threshold" in errors


def vote(n):
    options = {"strategy": "majority_vote", "n": n, "answer": {"type": "regex", "pattern": r"(\d+)\s*$"}}
    return json.dumps(options)


@pytest.fixture
def study(tmp_path):
    """The command on problems of two difficulties, without the options that tests change."""
    prompts, module = tmp_path / "prompts.jsonl", tmp_path / "graders.py"
    problems = [make_problem("SUM", size, seed) for size in (3, 6) for seed in range(40_000, 40_016)]
    prompts.write_text("".join(json.dumps({"prompt": problem.prompt}) + "\n" for problem in problems))
    module.write_text(
        f"from {demo_verifiers.__name__} import outcome\n"
        'VERIFIERS = {"exact": outcome, "percent": lambda candidates: [100.0 for _ in candidates]}\n'
    )
    return [
        "calibrate", "strategies", "--prompts", str(prompts), "--strategies", str(module), "--baseline", vote(12),
        "--out", str(tmp_path / "table.json"), "--launcher", "local", "--max-tokens", "64", "--temperature", "0.8",
    ]  # fmt: skip


def test_a_table_takes_few_tokens_where_the_probe_agrees(study, tmp_path, capsys):
    options = ["--grader", "exact", "--candidate", vote(4), "--num-bins", "2", "--tolerance", "0.1"]
    assert main([*study, *options]) == 0
    strategy = strategy_from_dict(json.loads((tmp_path / "table.json").read_text()))
    assert isinstance(strategy, ComputeOptimal)
    assert [row.least is None for row in strategy.table] == [False, True]
    assert strategy.table[0].strategy.n == 4, "easy prompts do not need twelve outputs"
    out = capsys.readouterr().out
    tokens, baseline = map(float, re.search(r"tokens (\d+); of the baseline (\d+)", out).groups())
    assert 0 < tokens < baseline
    assert int(re.search(r"on (\d+) other prompts", out)[1]) < 32


def test_mistakes_in_a_study_have_messages(study, tmp_path, capsys):
    assert main([*study, "--grader", "percent"]) == 2
    assert main([*study, "--grader", "judge"]) == 2
    assert main([*study, "--grader", "exact", "--signal", "agreement", "--probe", "99"]) == 2
    bad = tmp_path / "bad.jsonl"
    for line in ('{"text": "x"}', "{", '{"prompt": 5}', "", '{"prompt": "a", "id": 1}\n{"prompt": "b", "id": 1}'):
        bad.write_text(line)
        assert main([*study, "--grader", "exact", "--prompts", str(bad)]) == 2
    errors = capsys.readouterr().err
    assert "the verifier's score must be a finite number >= 0 and <= 1, got 100.0" in errors
    assert "gives: exact, percent; got 'judge'" in errors
    assert "probe must be" in errors
    assert "line 1: must be an object with" in errors
    assert "line 1: no JSON" in errors
    assert "line 1: prompt must be a text, got 5" in errors
    assert "it is empty" in errors
    assert "must give each id once" in errors
