"""The gain of a cascade whose large model starts from a draft: `python -m expertwire.bench.test_time.drafts --help`.

The demo tiers answer the cascade study's problems greedily, on the engine itself, with the abort in mid-generation that the study
chose. Costs are active parameters times tokens, those of prompts and of drafts included, in units of the large tier alone;
processor time is that of all processes of both engines.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from expertwire.bench.demo.accuracy import DEMO_MODEL
from expertwire.bench.test_time.network import Network
from expertwire.bench.test_time.run import CASCADE_SIZES, FIRST_SEED, SMALL_MODEL
from expertwire.bench.test_time.statistics import interval, paired_interval
from expertwire.cascade import CascadeLLM
from expertwire.deploy.demo_task import Problem, check, make_problem
from expertwire.llm import LLM, SamplingParams
from expertwire.strategies.cascade import Cascade

TOLERANCES: tuple[float | None, ...] = (None, 0.0, 0.3, 1.0, 2.0, 4.0, 1e3)
THRESHOLD, WINDOW = -0.22, 4  # of the study's choice


def policy() -> Cascade:
    """Return the cascade without drafts."""
    small, large = (Network(model, 1).active_parameters for model in (SMALL_MODEL, DEMO_MODEL))
    return Cascade(
        small="small", large="large", version="1", random_share=0.0, confidence_threshold=THRESHOLD, window=WINDOW,
        small_token_cost=small / large, large_token_cost=1.0,
    )  # fmt: skip


def measure(
    models: Mapping[str, LLM], problems: Sequence[Problem], tolerances: Sequence[float | None]
) -> list[dict[str, Any]]:
    """Return a row for the large tier alone and one for each tolerance; None hands no draft over."""
    prompts, params = [problem.prompt for problem in problems], SamplingParams(temperature=0, max_tokens=128)
    before = _cpu_seconds()
    alone = models["large"].generate(prompts, params, use_tqdm=False)
    seconds = _cpu_seconds() - before
    own = np.array([check(p, output.outputs[0].text) for p, output in zip(problems, alone, strict=True)])
    whole = sum(len(output.prompt_token_ids) + len(output.outputs[0].token_ids) for output in alone)
    rows = [{"tolerance": "large tier alone", "accuracy": float(own.mean()), "interval": interval(own), "cost": 1.0,
             "cpu_s": round(seconds, 2)}]  # fmt: skip
    for tolerance in tolerances:
        before = _cpu_seconds()
        with CascadeLLM(replace(policy(), draft_tolerance=tolerance), models) as cascade:
            outputs = cascade.generate(prompts, params, use_tqdm=False)
        seconds = _cpu_seconds() - before
        right = np.array([check(p, output.outputs[0].text) for p, output in zip(problems, outputs, strict=True)])
        records = [output.record for output in outputs if output.record is not None]
        legs = [leg for record in records for leg in record.legs if leg.model == "large"]
        rows.append(
            {
                "tolerance": tolerance,
                "accuracy": float(right.mean()),
                "interval": interval(right),
                "difference_to_large": paired_interval(right, own),
                "escalated": len(legs) / len(records),
                "cost": round(sum(leg.cost for record in records for leg in record.legs) / whole, 4),
                "draft_tokens": round(sum(leg.draft_tokens for leg in legs) / len(legs), 2),
                "accepted_tokens": round(sum(leg.accepted_tokens for leg in legs) / len(legs), 2),
                "decoded_by_large": round(sum(leg.tokens for leg in legs) / len(legs), 2),
                "cpu_s": round(seconds, 2),
            }
        )
    return rows


def _cpu_seconds() -> float:
    """Return the processor time of this process and its children, which live as long as the engines."""
    times = [each.cpu_times() for each in (psutil.Process(), *psutil.Process().children(recursive=True))]
    return float(sum(each.user + each.system for each in times))


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m expertwire.bench.test_time.drafts", description=main.__doc__)
    parser.add_argument("--problems", type=int, default=200, help="of each size")
    parser.add_argument("--json", type=Path, help="file of the results")
    args = parser.parse_args(argv)
    problems = [
        make_problem("SUM", size, seed)
        for size in CASCADE_SIZES
        for seed in range(FIRST_SEED, FIRST_SEED + args.problems)
    ]
    with (
        LLM(SMALL_MODEL, start_timeout_s=1800.0) as small,
        LLM(DEMO_MODEL, start_timeout_s=1800.0) as large,
    ):
        models = {"small": small, "large": large}
        measure(models, problems[:: max(1, len(problems) // 20)], TOLERANCES[:2])  # what is compiled at first use
        rows = measure(models, problems, TOLERANCES)
    for row in rows:
        print(json.dumps(row), flush=True)
    if args.json is not None:
        results = {"problems": len(problems), "threshold": THRESHOLD, "window": WINDOW, "rows": rows}
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
