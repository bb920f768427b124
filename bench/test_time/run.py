"""Accuracy against tokens and time for every strategy, by difficulty: `python -m expertwire.bench test-time --help`.

The problems are test problems of the demo model's task, 500 of each kind and size. Branches are simulated in lock step with the
checkpoint's weights (`simulation`), with the strategies that a server runs; time is given as decode steps from the first token to
the result. The engine itself (`live`) runs the first problems of some bins, for the wall time and to check the simulation.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from expertwire.bench.demo.accuracy import DEMO_MODEL
from expertwire.bench.test_time import cascade, live, plot, replay
from expertwire.bench.test_time.grid import BANKED, FORKING, NEEDS_32, Entry
from expertwire.bench.test_time.network import Network
from expertwire.bench.test_time.simulation import Outcome, simulate
from expertwire.bench.test_time.sources import Asked, Bank, Sampler
from expertwire.bench.test_time.statistics import (
    Runs,
    curve,
    interval,
    out_of_sample,
    paired_interval,
)
from expertwire.deploy.demo_task import Kind, check, make_problem

BINS: tuple[tuple[Kind, int], ...] = (
    *(("SUM", size) for size in range(3, 9)),
    *(("COUNTDOWN", size) for size in range(3, 6)),
)
POOLED = tuple(f"{kind}-{size}" for kind, size in BINS if (kind, size) != ("SUM", 3))
CASCADE_SIZES = range(3, 8)
SMALL_MODEL = DEMO_MODEL.with_name("demo_model_small")
FIRST_SEED = 20_000  # no decision about a training looked at the problems from here on
BRANCHES = 16
REPLAY_SHARE, REPLAY_SLICES = 0.5, 20  # twice the error of a share escalated is then below 2 points, see the results
PRICES = [float(price) for price in np.geomspace(3e-2, 1e-6, 40)]


class Study:
    """The problems, their banks, and what was measured already, in a folder."""

    def __init__(self, cache: Path, problems: int) -> None:
        self.cache, self.problems = cache, problems
        self._samplers: dict[Path, Sampler] = {}

    def asked(self, kind: Kind, size: int) -> list[Asked]:
        """Return the problems of a bin."""
        seeds = range(FIRST_SEED, FIRST_SEED + self.problems)
        return [Asked(make_problem(kind, size, seed), seed) for seed in seeds]

    def sampler(self, model: Path) -> Sampler:
        """Return the model's sampler."""
        if model not in self._samplers:
            self._samplers[model] = Sampler(model)
        return self._samplers[model]

    def bank(self, model: Path, kind: Kind, size: int, branches: int) -> Bank:
        """Return a bin's bank from the cache, or sample it."""
        path = self.cache / model.name / f"{kind}-{size}.npz"
        asked = self.asked(kind, size)
        if path.exists():
            return Bank.load(path, asked)
        path.parent.mkdir(parents=True, exist_ok=True)
        bank = Bank.sample(self.sampler(model), asked, branches)
        bank.save(path)
        return bank

    def outcomes(self, entry: Entry, kind: Kind, size: int, bank: Bank | None) -> list[Outcome]:
        """Return the outcomes of a strategy from the cache, or simulate them; without a bank the branches are sampled."""
        path = self.cache / "outcomes" / f"{entry.name}_{kind}-{size}.json"
        if path.exists():
            outcomes = [Outcome(**each) for each in json.loads(path.read_text())]
            assert len(outcomes) == self.problems, f"{path} is of other problems"
            return outcomes
        path.parent.mkdir(parents=True, exist_ok=True)
        source = self.sampler(DEMO_MODEL) if bank is None else bank
        at_once = entry.groups_at_once if bank is None else self.problems
        outcomes = simulate(entry.make(size), self.asked(kind, size), source, groups_at_once=at_once)
        path.write_text(json.dumps([asdict(each) for each in outcomes]))
        return outcomes

    def on_engine(self, problems: int) -> dict[str, list[dict[str, Any]]]:
        """Return what the engine gave for the first problems of some bins from the cache, or run it."""
        path = self.cache / f"engine_{problems}.json"
        if not path.exists():
            asked = {(kind, size): self.asked(kind, size)[:problems] for kind, size in live.BINS}
            path.write_text(json.dumps(live.measure(asked)))
        runs: dict[str, list[dict[str, Any]]] = json.loads(path.read_text())
        return runs


def runs_of(outcomes: Sequence[Outcome]) -> Runs:
    """Return the outcomes as arrays."""
    columns = ([getattr(each, name) for each in outcomes] for name in ("right", "tokens", "steps"))
    right, tokens, steps = columns
    return Runs(np.array(right, bool), np.array(tokens, float), np.array(steps, float))


def greedy_runs(bank: Bank) -> Runs:
    """Return what the greedy branch gives."""
    right = [check(one.problem, text) for one, text in zip(bank.asked, bank.texts(-1), strict=True)]
    lengths = bank.lengths(-1).astype(float)
    return Runs(np.array(right), lengths, lengths)


def measure_bin(study: Study, kind: Kind, size: int) -> dict[str, Runs]:
    """Return every strategy's runs on a bin."""
    bank = study.bank(DEMO_MODEL, kind, size, 32 if (kind, size) in NEEDS_32 else BRANCHES)
    runs = {"greedy": greedy_runs(bank)}
    for entry in BANKED:
        if entry.fits(kind, size, bank.tokens.shape[1] - 1):
            runs[entry.name] = runs_of(study.outcomes(entry, kind, size, bank))
    for entry in FORKING:
        if entry.fits(kind, size, BRANCHES):
            whole = runs_of(study.outcomes(entry, kind, size, None))
            runs |= {f"{entry.name}, {k}x": whole.cut(k * longest(size)) for k in entry.cuts} or {entry.name: whole}
    print(f"{kind}-{size}: " + ", ".join(f"{name} {run.right.mean():.3f}" for name, run in runs.items()), flush=True)
    return runs


def longest(size: int) -> int:
    """Return the tokens of a whole answer, about."""
    return (size - 1) * (size + 6)


def row(run: Runs) -> dict[str, Any]:
    """Return a strategy's figures in a bin."""
    low, high = interval(run.right)
    return {
        "accuracy": round(float(run.right.mean()), 4),
        "interval": [round(low, 4), round(high, 4)],
        "tokens": round(float(run.tokens.mean()), 1),
        "steps": round(float(run.steps.mean()), 1),
        "tokens_per_solved": round(float(run.tokens.sum() / max(1, run.right.sum())), 1),
    }


def compare(name: str, ours: Runs, theirs: Runs, choices: list[dict[str, str]]) -> dict[str, Any]:
    """Return a comparison with a baseline on the same problems."""
    return {
        "name": name,
        "ours": row(ours),
        "baseline": row(theirs),
        "difference_interval": [round(each, 4) for each in paired_interval(ours.right, theirs.right)],
        "tokens_ratio": round(float(ours.tokens.mean() / theirs.tokens.mean()), 4),
        "steps_ratio": round(float(ours.steps.mean() / theirs.steps.mean()), 4),
        "choices": choices,
    }


def with_verifier(measured: dict[str, dict[str, Runs]], kinds: tuple[str, ...]) -> dict[str, dict[str, Runs]]:
    """Return the runs of the pooled bins of strategies whose name begins with one of `kinds`."""
    return {
        name: {each: run for each, run in runs.items() if each.startswith(kinds)}
        for name, runs in measured.items()
        if name in POOLED
    }


FAMILIES = {
    "best-of-n alone": ("greedy", "best-of-"),
    "best-of-n and searches": ("greedy", "best-of-", "beam"),
    "those after a probe, too": ("greedy", "best-of-", "beam", "probe"),
    "those after a greedy probe, too": ("greedy", "best-of-", "beam", "probe", "checked greedy"),
    "with step retries": ("greedy", "best-of-", "beam", "probe", "checked greedy", "step retries"),
}


def report(study: Study) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the results for the JSON file, and what the plot shows."""
    measured = {f"{kind}-{size}": measure_bin(study, kind, size) for kind, size in BINS}
    optimal, curves = [], {}
    for name, kinds in FAMILIES.items():
        table = with_verifier(measured, kinds)
        optimal.append(compare(name, *out_of_sample(table, "best-of-16")))
        curves[name] = curve(table, PRICES)
    sum_4 = measured["SUM-4"]
    votes = [
        compare(name, sum_4[name], sum_4["majority of 32"], [])
        for name in sum_4
        if name.startswith(("adaptive", "confidence", "first", "majority"))
    ]
    legs = read_cascade(study)
    mechanisms = [
        cascade.out_of_sample(legs, mechanism, shortfall) | {"shortfall": shortfall}
        for mechanism in cascade.MECHANISMS
        for shortfall in (0.0, 0.01)
    ]
    tiers = {
        "ratio_of_active_parameters": round(1 / legs.ratio, 2),
        "small": {"accuracy": float(legs.small_right.mean()), "interval": interval(legs.small_right)},
        "large": {"accuracy": float(legs.large_right.mean()), "interval": interval(legs.large_right)},
        "either": float((legs.small_right | legs.large_right).mean()),
        "small_alone_cost": float(((legs.prompt + legs.small).mean()) * legs.ratio / (legs.prompt + legs.large).mean()),
        "mechanisms": mechanisms,
        "replay": replay.check(legs, -0.22, (-0.1, -0.15, -0.3, -0.5), share=REPLAY_SHARE, slices=REPLAY_SLICES),
    }
    results = {
        "problems": study.problems,
        "first_seed": FIRST_SEED,
        "temperature": 0.7,
        "bins": {name: {each: row(run) for each, run in runs.items()} for name, runs in measured.items()},
        "compute_optimal": optimal,
        "votes_on_SUM-4": votes,
        "cascade": tiers,
    }
    fronts = {mechanism: cascade.pareto(legs, mechanism) for mechanism in cascade.MECHANISMS}
    return results, {"measured": measured, "curves": curves, "fronts": fronts, "tiers": tiers}


def read_cascade(study: Study) -> cascade.Legs:
    """Return both tiers' greedy answers to `SUM` problems."""
    small = [study.bank(SMALL_MODEL, "SUM", size, 1) for size in CASCADE_SIZES]
    large = [study.bank(DEMO_MODEL, "SUM", size, BRANCHES) for size in CASCADE_SIZES]
    active = [Network(model, 1).active_parameters for model in (SMALL_MODEL, DEMO_MODEL)]
    return cascade.read_legs(small, large, active[0] / active[1])


def run(argv: Sequence[str]) -> int:
    """Measure, print and write; return the exit code."""
    import torch

    parser = argparse.ArgumentParser(prog="python -m expertwire.bench test-time", description=run.__doc__)
    parser.add_argument("--cache", type=Path, required=True, help="folder of sampled branches, kept between runs")
    parser.add_argument("--problems", type=int, default=500, help="problems of each kind and size")
    parser.add_argument("--live", type=int, default=20, help="problems of some bins for the engine itself; 0: none")
    parser.add_argument("--json", type=Path, help="file of the results")
    parser.add_argument("--png", type=Path, help="file of the plot")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    started = time.process_time()
    study = Study(args.cache, args.problems)
    results, shown = report(study)
    if args.live:
        runs = study.on_engine(min(args.live, args.problems))
        results["live"] = {name: live.compare(each, shown["measured"][name]) for name, each in runs.items()}
        print(live.table(results["live"]))
    results["cpu_seconds"] = round(time.process_time() - started, 1)
    print(json.dumps({name: results[name] for name in ("compute_optimal", "votes_on_SUM-4", "cascade")}, indent=1))
    if args.json is not None:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    if args.png is not None:
        plot.draw(args.png, shown["measured"], shown["curves"], shown["fronts"], shown["tiers"])
    return 0
