"""`python -m expertwire.bench.test_time.storm`: random groups of all strategies, cancels, verifiers' faults, and what is left.

The engine has no model (load format mock) and a cache so small that requests are preempted. Groups come at random, with every
strategy and random options; some are cancelled, in whatever state they are; verifiers raise, hang, die, and return nonsense.
In the end everything is taken stock of: the engine's requests, slots and blocks, its tokens, this process's threads and files.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import expertwire
from expertwire.deploy.runtime import open_frontend
from expertwire.engine.config.engine_config import EngineConfig
from expertwire.engine.frontend.api import RequestOptions
from expertwire.engine.frontend.frontend import Frontend
from expertwire.engine.frontend.group_run import GroupRun
from expertwire.engine.frontend.groups import Groups
from expertwire.scheduler.sampling_params import SamplingParams
from expertwire.strategies.base import Status, Strategy
from expertwire.strategies.registry import strategy_from_dict
from expertwire.strategies.verifiers import Candidate

_MODEL = Path(expertwire.__file__).parent / "demo_model"
OPTIONS: dict[str, Any] = {
    "model": str(_MODEL),
    "load_format": "mock",
    "launcher": "local",
    "max_num_seqs": 12,
    "max_model_len": 400,
    "max_num_batched_tokens": 64,
    "kv_cache_memory_bytes": 500_000,
}
_ANSWER = {"type": "regex", "pattern": "([0-9]+)"}
_MOST_OPEN = 8  # groups
_HANGS_S = 1.5  # longer than any time limit of a verifier
_TIMEOUT_S = 0.5
_DRAIN_S = 60.0


@dataclass
class Verifier:
    """Scores by the share of even tokens, or fails: at a random place of the list of faults, with the given probability."""

    rng: random.Random
    share: float

    def __call__(self, candidates: Sequence[Candidate], /) -> Any:
        """Return scores, or what is none."""
        scores: list[float] = [float(np.mean(np.array(each.token_ids) % 2 == 0)) for each in candidates]
        if self.rng.random() >= self.share:
            return scores
        match self.rng.choice(["raises", "hangs", "slow", "slow", "nan", "length", "dies", "exits"]):
            case "raises":
                raise ZeroDivisionError("a fault of the verifier")
            case "hangs":
                time.sleep(_HANGS_S)
            case "slow":
                time.sleep(0.1)
            case "nan":
                scores[-1] = float("nan")
            case "length":
                scores.append(0.0)
            case "dies":
                subprocess.run(["/bin/sh", "-c", "kill -9 $$"], check=True)
            case "exits":
                raise SystemExit(3)
        return scores


@dataclass
class Report:
    """The groups of a storm, and what it found in the end.

    Attributes:
        started: groups by strategy.
        cancelled: groups by their state.
        ended: groups by how they ended.
        problems: what is wrong in the end; empty if nothing is.
        stats: the engine's counters.
    """

    started: Counter[str] = field(default_factory=Counter)
    cancelled: Counter[str] = field(default_factory=Counter)
    ended: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    stats: dict[str, Any] = field(default_factory=dict)


def random_strategy(rng: random.Random, verifier: Verifier) -> tuple[str, Strategy]:
    """Return any of the strategies with random options, and its name."""
    n, failure = rng.randint(2, 9), rng.choice(["drop", "zero", "error"])
    budget: dict[str, Any] = {"tokens": rng.choice([None, rng.randint(5, 200)])}
    budget["seconds"] = rng.choice([None, None, rng.uniform(0.01, 0.5)])
    policy = {"on_failure": failure, "timeout_s": _TIMEOUT_S, "max_batch": rng.choice([2, 64])}
    scored = {"verifier": "v", "verifier_policy": policy, "budget": budget}
    steps = {"n": 4, "width": 2, "step_text": rng.choice(["1", ";"]), "max_steps": rng.randint(1, 6), **scored}
    votes = {"n": n, "answer": _ANSWER, "budget": budget}
    options: list[dict[str, Any]] = [
        {"strategy": "best_of_n", "n": n, **scored},
        {"strategy": "best_of_n", "n": n, "score": "mean_logprob", "budget": budget},
        {"strategy": "majority_vote", **votes},
        {"strategy": "confidence_vote", **votes, "confidence": "mean"},
        {"strategy": "verifier_vote", **votes, **scored},
        {"strategy": "first_k_finish", "n": n, "k": 1},
        {"strategy": "adaptive_consistency", **votes},
        {"strategy": "auto", "answer": _ANSWER, "budget": {"tokens": rng.randint(20, 300)}},
        {"strategy": "confidence_pruning", **votes, "warm_up": 2, "window": 4},
        {"strategy": "beam_search", **steps},
        {"strategy": "dvts", **steps},
        {"strategy": "lookahead", **steps},
        {"strategy": "step_retries", "step_text": steps["step_text"], "least": 0.4, "max_retries": 8, **scored},
        {"strategy": "sequential_revision", "revisions": 2, "text": "SUM", "chains": rng.randint(1, 3)},
    ]
    table = [
        {"least": 0.5, "strategy": {"strategy": "majority_vote", "n": n, "answer": _ANSWER}},
        {"strategy": {"strategy": "beam_search", **steps, "answer": _ANSWER, "budget": {}}},
    ]
    shared = {"answer": _ANSWER, "verifier": "v", "verifier_policy": policy, "budget": budget}
    options.append({"strategy": "compute_optimal", "table": table, "probe": 2, **shared})
    chosen = rng.choice(options)
    return chosen["strategy"], strategy_from_dict(chosen, verifiers={"v": verifier})


def state_of(run: GroupRun) -> str:
    """Return in which state a group is, by the rarest that one of its branches is in."""
    branches = [branch for branch in run.branches if not branch.is_over or branch.num_asked]
    if any(branch.num_asked for branch in branches):
        return "verifying"
    if any(branch.status is Status.PAUSED for branch in branches):
        return "paused"
    if any(branch.parent is not None for branch in branches):
        return "forked"
    return "decoding" if any(branch.token_ids for branch in branches) else "waiting or in its prompt"


def storm(frontend: Frontend, seconds: float, *, seed: int, fault_share: float = 0.1) -> Report:
    """Run groups for so many seconds, let the rest end, and take stock. The frontend must have nothing else to do."""
    report, rng, before = Report(), random.Random(seed), _num_files()
    verifier = Verifier(random.Random(seed + 1), fault_share)
    groups = Groups(frontend)
    runs: list[GroupRun] = []
    end_s, vocab = time.monotonic() + seconds, frontend.model_info.vocab_size
    cancelled: set[int] = set()
    shared = [rng.randrange(vocab) for _ in range(200)]  # prompts begin with some of these, as with a prefix hit
    while time.monotonic() < end_s or any(not run.done for run in runs[-64:]):
        is_over = time.monotonic() >= end_s
        live = [run for run in runs[-64:] if not run.done]
        if not is_over and len(live) < _MOST_OPEN:
            name, strategy = random_strategy(rng, verifier)
            prompt = shared[: rng.choice([0, 16, 100, 200])] + [rng.randrange(vocab) for _ in range(rng.randint(1, 90))]
            params = SamplingParams(
                max_tokens=rng.randint(1, 80), ignore_eos=rng.random() < 0.5, seed=rng.randrange(99)
            )
            tokens = frontend.encode(prompt, params)
            runs.append(groups.start(tokens, params, RequestOptions(), strategy))
            report.started[name] += 1
        if live and rng.random() < 0.08:
            run = rng.choice(live)
            if not run.done:
                report.cancelled[state_of(run)] += 1
                cancelled.add(run.id)
                run.abort()
        groups.poll(0.002)
        if time.monotonic() > end_s + _DRAIN_S:
            report.problems.append(f"groups {[run.id for run in runs if not run.done]} never end")
            break
    for run in runs:
        report.ended[_ending(run, run.id in cancelled, report.problems)] += 1
    groups.close()
    check_leftovers(frontend, report)
    counted, of_runs = report.stats["groups"], [run.token_counts() for run in runs]
    for fate in ("kept", "pruned"):
        if (total := sum(getattr(tokens, fate) for tokens in of_runs)) != counted.get(f"tokens_{fate}", 0):
            report.problems.append(f"groups have {total} tokens {fate}, the engine counts {counted}")
    if (now := _num_files()) > before:  # what was garbage before may be closed meanwhile
        report.problems.append(f"{now} files are open, there were {before}")
    return report


def check_leftovers(frontend: Frontend, report: Report, num_tokens: int | None = None) -> None:
    """Report what is left of requests that have ended: requests, tokens that no usage counts, threads of verifiers.

    Args:
        frontend: of the engine.
        report: gets the problems, and the engine's counters.
        num_tokens: that requests have received; None: those that the engine counts as groups', kept and pruned.
    """
    deadline = time.monotonic() + 2 * _HANGS_S + 10
    while True:  # the last step may be in flight, and tokens on their way
        stats = _stats(frontend)
        if (
            _is_idle(stats) and _num_accounted(stats, num_tokens) == stats["tokens_sampled"]
        ) or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    report.stats = stats
    if not _is_idle(stats):
        left = {name: stats[name] for name in ("num_running", "num_waiting", "held", "paused", "blocks_used")}
        report.problems.append(f"the engine still has {left}")
    if frontend.num_open:
        report.problems.append(f"the frontend still has {frontend.num_open} requests")
    if (total := _num_accounted(stats, num_tokens)) != stats["tokens_sampled"]:
        report.problems.append(f"{total} tokens are accounted for, {stats['tokens_sampled']} were sampled")
    while (names := _verifier_threads()) and time.monotonic() < deadline:
        time.sleep(0.05)
    if names:
        report.problems.append(f"threads still run: {names}")


def _ending(run: GroupRun, was_cancelled: bool, problems: list[str]) -> str:
    """Return how a group ended; it has a result or an error, or it was cancelled."""
    if not run.done or was_cancelled + (run.selection is not None) + (run.error is not None) != 1:
        problems.append(f"group {run.id}: cancelled {was_cancelled}, result {run.selection}, error {run.error}")
    if run.error is not None:
        if "verifier" not in run.error.message and "no result" not in run.error.message:
            problems.append(f"group {run.id} ended with {run.error}")
        return f"error: {run.error.code}"
    return "cancelled" if was_cancelled else "result"


def _stats(frontend: Frontend) -> dict[str, Any]:
    frontend.receive(0)
    return frontend.stats()


def _is_idle(stats: dict[str, Any]) -> bool:
    used = any(any(of_ranks) for of_ranks in stats["blocks_used"].values())
    return not (used or any(stats[name] for name in ("num_running", "num_waiting", "held", "paused")))


def _num_accounted(stats: dict[str, Any], num_tokens: int | None) -> int:
    counted = stats["groups"]
    if num_tokens is None:
        num_tokens = sum(counted.get(f"tokens_{fate}", 0) for fate in ("kept", "pruned"))
    return int(num_tokens + counted.get("tokens_late", 0) + stats["tokens_dropped"])


def _verifier_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "verifier"]


def _num_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def main() -> int:
    """Run a storm, print what it found, and return 1 if something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ep-size", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with open_frontend(EngineConfig(**OPTIONS, ep_size=args.ep_size)) as frontend:
        report = storm(frontend, args.seconds, seed=args.seed)
    shown: dict[str, Any] = {name: dict(getattr(report, name)) for name in ("started", "cancelled", "ended", "stats")}
    shown |= {"seconds": args.seconds, "seed": args.seed, "problems": report.problems}
    print(json.dumps(shown, indent=1))
    if args.json is not None:
        args.json.write_text(json.dumps(shown, indent=1) + "\n")
    return int(bool(report.problems))


if __name__ == "__main__":
    raise SystemExit(main())
