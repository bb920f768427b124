"""The study's strategies on the engine itself: wall time, and whether tokens and accuracy are those of the simulation.

All problems of a bin are given to `LLM.generate(strategy=...)` at once, as a full server has them, and the time is that of the
whole call. Draws are the engine's own: accuracies of samples agree with the simulated ones up to chance, greedy ones in each
problem.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from expertwire.bench.demo.accuracy import DEMO_MODEL
from expertwire.bench.test_time.grid import BEST_OF, Entry, on_engine
from expertwire.bench.test_time.sources import Asked
from expertwire.bench.test_time.statistics import Runs, Z
from expertwire.deploy.demo_task import Kind, check
from expertwire.llm import LLM, SamplingParams
from expertwire.strategies.base import Strategy

BINS: tuple[tuple[Kind, int], ...] = (("SUM", 6), ("COUNTDOWN", 4))
START_TIMEOUT_S = 1800.0  # the engine compiles its kernels on a machine that may be busy


@dataclass(frozen=True)
class LiveRun:
    """A strategy on the problems of a bin.

    Attributes:
        name: of the strategy.
        right: of each problem.
        tokens: sampled for each problem.
        wall_s: from the call to its return.
    """

    name: str
    right: list[bool]
    tokens: list[int]
    wall_s: float


def measure(asked: Mapping[tuple[Kind, int], Sequence[Asked]]) -> dict[str, list[dict[str, Any]]]:
    """Run every strategy on the problems of every bin, one after another; return the runs by the bin's name."""
    options = {"dtype": "float32", "max_num_seqs": 256, "start_timeout_s": START_TIMEOUT_S}
    with LLM(DEMO_MODEL, **options) as llm:
        some = next(iter(asked.values()))
        _generate(llm, some[:4], BEST_OF[1].make(4))  # what is compiled at first use
        return {
            f"{kind}-{size}": [asdict(_run(llm, entry, problems, size)) for entry in (None, *on_engine(kind, size))]
            for (kind, size), problems in asked.items()
        }


def _run(llm: LLM, entry: Entry | None, asked: Sequence[Asked], size: int) -> LiveRun:
    started = time.perf_counter()
    outputs = _generate(llm, asked, None if entry is None else entry.make(size))
    wall_s = time.perf_counter() - started
    right = [check(one.problem, output.outputs[0].text) for one, output in zip(asked, outputs, strict=True)]
    tokens = [
        len(output.outputs[0].token_ids)
        if output.group is None
        else output.group.tokens.kept + output.group.tokens.pruned
        for output in outputs
    ]
    return LiveRun("greedy" if entry is None else entry.name, right, tokens, wall_s)


def _generate(llm: LLM, asked: Sequence[Asked], strategy: Strategy | None) -> Sequence[Any]:
    params = [
        SamplingParams(temperature=0.0 if strategy is None else 0.7, max_tokens=one.max_tokens, seed=one.seed)
        for one in asked
    ]
    return llm.generate([one.problem.prompt for one in asked], params, strategy=strategy, use_tqdm=False)


def compare(runs: Sequence[Mapping[str, Any]], simulated: Mapping[str, Runs]) -> list[dict[str, Any]]:
    """Return a row for each strategy of a bin: live figures, the simulated ones of the same problems, best-of-n at equal time."""
    rows = []
    for run in runs:
        live, count = np.array(run["right"], bool), len(run["right"])
        theirs = simulated[run["name"]]
        right, tokens = theirs.right[:count], theirs.tokens[:count]
        spread = Z * math.sqrt((_variance(live) + _variance(right)) / count)
        difference = float(live.mean() - right.mean())
        greedy = run["name"] == "greedy"
        rows.append(
            {
                "strategy": run["name"],
                "problems": count,
                "accuracy_of_all": round(float(theirs.right.mean()), 4),
                "accuracy": round(float(live.mean()), 4),
                "simulated_accuracy": round(float(right.mean()), 4),
                "agrees": bool((live == right).all()) if greedy else abs(difference) <= spread,
                "tokens": round(float(np.mean(run["tokens"])), 1),
                "simulated_tokens": round(float(tokens.mean()), 1),
                "wall_ms": round(1000 * run["wall_s"] / count, 2),
                "tokens_per_s": round(sum(run["tokens"]) / run["wall_s"], 1),
                "best_of_n_at_equal_tokens": _at(runs, simulated, lambda each: float(np.mean(each["tokens"])), run),
                "best_of_n_at_equal_time": _at(runs, simulated, lambda each: float(each["wall_s"]), run),
            }
        )
    return rows


def _variance(right: np.ndarray) -> float:
    """Return the variance of a share's terms, with one right and one wrong answer more, lest it be 0."""
    p = (float(right.sum()) + 1) / (len(right) + 2)
    return p * (1 - p)


def _at(runs: Sequence[Mapping[str, Any]], simulated: Mapping[str, Runs], cost: Any, run: Mapping[str, Any]) -> float:
    """Return best-of-n's accuracy over all simulated problems where it costs as much as `run`: linear in log cost between n's."""
    points = sorted(
        (math.log(cost(each)), float(simulated[each["name"]].right.mean()))
        for each in runs
        if each["name"].startswith("best-of-")
    )
    costs, accuracies = zip(*points, strict=True)
    return round(float(np.interp(math.log(cost(run)), costs, accuracies)), 4)


def table(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Return the rows as a Markdown table."""
    columns = {
        "strategy": "strategy",
        "accuracy_of_all": "accuracy",
        "accuracy": "live",
        "simulated_accuracy": "simulated, same problems",
        "tokens": "tokens",
        "simulated_tokens": "tokens, simulated",
        "wall_ms": "ms a problem",
        "tokens_per_s": "tokens/s",
        "best_of_n_at_equal_tokens": "best-of-n, equal tokens",
        "best_of_n_at_equal_time": "best-of-n, equal time",
    }
    lines = [f"| bin | {' | '.join(columns.values())} |", "|---" * (len(columns) + 1) + "|"]
    for name, of_bin in rows.items():
        lines += [f"| {name} | {' | '.join(str(row[column]) for column in columns)} |" for row in of_bin]
    return "\n".join(lines)
