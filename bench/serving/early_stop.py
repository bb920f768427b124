"""`python -m expertwire.bench.serving.early_stop`: how much of the tokens that an early stop saves it saves in wall time.

More prompts than slots, each with branches of a strategy that stops early, beside its *twin*: the same number of branches with
the same vote, all of which run to their ends. The twin of confidence pruning is a vote by the same confidences, so that both have
the log-probabilities of all tokens; what these cost is printed by themselves, as the twin's time beside that of a plain vote.
Ways alternate in one run, on one engine with the demo model; figures are medians over rounds. `--widen 16` pads the experts of
the demo model with zeros to 16 times their width: it makes the same outputs, in steps that compute more.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

import expertwire
from expertwire import LLM, SamplingParams
from expertwire.deploy.demo_task import make_problem
from expertwire.strategies import (
    AdaptiveConsistency,
    ConfidencePruning,
    ConfidenceVote,
    FirstKFinish,
    MajorityVote,
    RegexAnswer,
)
from expertwire.strategies.base import Strategy

_DEMO = Path(expertwire.__file__).parent / "demo_model"
_ANSWER = RegexAnswer(r"answer (\d+)")
_WITHOUT, _WITHOUT_LOGPROBS = "without", "without_but_logprobs"
_WINDOW = 6
_TWINS = {"confidence_pruning": _WITHOUT_LOGPROBS}  # of others: `_WITHOUT`


def strategies(n: int) -> dict[str, Strategy]:
    """Return the strategies by name; all start at most n branches."""
    return {
        _WITHOUT: MajorityVote(n, _ANSWER, stop_when_decided=False),
        _WITHOUT_LOGPROBS: ConfidenceVote(n, _ANSWER, confidence="lowest_window", window=_WINDOW),
        "majority_vote": MajorityVote(n, _ANSWER),
        "first_k_finish": FirstKFinish(n, 4, _ANSWER),
        "adaptive_consistency": AdaptiveConsistency(n, _ANSWER),
        "confidence_pruning": ConfidencePruning(n, _ANSWER, warm_up=4, keep_share=0.5, window=_WINDOW),
    }


def main() -> int:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument(
        "--size",
        type=int,
        nargs="+",
        default=[5],
        help="numbers of each problem, in turn; with one size all outputs are as long, and end and are replaced at once",
    )
    parser.add_argument("--branches", type=int, default=16)
    parser.add_argument(
        "--slots", type=int, default=24, help="not a multiple of the branches, or all of a group end at once"
    )
    parser.add_argument("--widen", type=int, default=1, help="width of the experts, in that of the demo model's")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.widen < 1:
        parser.error(f"--widen must be at least 1, got {args.widen}")
    ways = strategies(args.branches)
    rows: dict[str, list[dict[str, Any]]] = {}
    with widened(args.widen) as folder, LLM(folder, max_num_seqs=args.slots, enable_prefix_caching=False) as llm:
        measure(llm, args, ways[_WITHOUT], seed=0)  # a warm-up
        for number in range(args.rounds):
            for name, strategy in ways.items():
                rows.setdefault(name, []).append(measure(llm, args, strategy, seed=1 + number))
    found = {name: {key: statistics.median(row[key] for row in each) for key in each[0]} for name, each in rows.items()}
    found[_WITHOUT_LOGPROBS]["price_of_logprobs"] = found[_WITHOUT_LOGPROBS]["seconds"] / found[_WITHOUT]["seconds"] - 1
    for name, medians in found.items():
        if name in (_WITHOUT, _WITHOUT_LOGPROBS):
            continue
        base = found[_TWINS.get(name, _WITHOUT)]
        saved = {key: 1 - medians[key] / base[key] for key in ("tokens", "seconds", "steps")}
        medians |= {f"{key}_saved": value for key, value in saved.items()}
        if saved["tokens"] > 0:
            medians |= {f"{key}_saved_per_tokens_saved": saved[key] / saved["tokens"] for key in ("seconds", "steps")}
    for name, medians in found.items():
        print(f"{name:<22}" + "  ".join(f"{key} {value:.3g}" for key, value in medians.items()))
    if args.json is not None:
        options = {key: value for key, value in vars(args).items() if key != "json"}
        args.json.write_text(json.dumps({"options": options, "rows": rows, "medians": found}, indent=1) + "\n")
    return 0


@contextlib.contextmanager
def widened(factor: int) -> Iterator[Path]:
    """Yield a folder with the demo model, whose experts have `factor` times the width; all that is added is zero."""
    assert factor >= 1, f"experts of {factor} times their width"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(_DEMO, folder, dirs_exist_ok=True)
        config = json.loads((folder / "config.json").read_text())
        config["moe_intermediate_size"] *= factor
        (folder / "config.json").write_text(json.dumps(config))
        weights = safetensors.torch.load_file(_DEMO / "model.safetensors")
        for key, weight in weights.items():
            if ".experts." in key:
                added = (factor - 1) * config["moe_intermediate_size"] // factor
                sides = (0, added) if "down_proj" in key else (0, 0, 0, added)  # of the last dimension first
                weights[key] = torch.nn.functional.pad(weight, sides)
        safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        yield folder


def measure(llm: LLM, args: argparse.Namespace, strategy: Strategy, *, seed: int) -> dict[str, Any]:
    """Return tokens sampled, seconds, steps, and the share of right answers, of one call with new problems."""
    problems = [
        make_problem("SUM", args.size[index % len(args.size)], 1000 * seed + index) for index in range(args.prompts)
    ]
    params = SamplingParams(temperature=0.7, max_tokens=128, seed=seed)
    before, began = llm.stats(), time.perf_counter()
    outputs = llm.generate([problem.prompt for problem in problems], params, strategy=strategy, use_tqdm=False)
    seconds, after = time.perf_counter() - began, llm.stats()
    right = [
        output.group is not None and output.group.answer == str(problem.answer)
        for problem, output in zip(problems, outputs, strict=True)
    ]
    counted = {key: after[key] - before[key] for key in ("tokens_sampled", "steps")}
    return {
        "tokens": counted["tokens_sampled"],
        "seconds": seconds,
        "steps": counted["steps"],
        "tokens_per_step": counted["tokens_sampled"] / counted["steps"],
        "accuracy": sum(right) / len(right),
    }


if __name__ == "__main__":
    raise SystemExit(main())
