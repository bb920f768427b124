"""`python -m expertwire.bench.serving.branches`: the branches of one prompt as a group, beside as many requests of their own.

Every prompt is new, so that a prefix cache has only what the same round has computed. Ways and rounds alternate in one run, on
one engine with a prefix cache and one without.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np

import expertwire
from expertwire import LLM, SamplingParams

_DEMO = Path(expertwire.__file__).parent / "demo_model"


def main() -> int:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(_DEMO))
    parser.add_argument(
        "--load-format", default="auto", help="dummy: random weights, for a folder with a configuration only"
    )
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--branches", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--output", type=int, default=128, help="tokens of each output")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    options = {
        "load_format": args.load_format,
        "dtype": args.dtype,
        "max_num_seqs": args.branches,
        "kv_cache_memory_bytes": 400_000_000,
        "max_model_len": 2048,
    }
    rows: dict[str, list[dict[str, float]]] = {}
    with LLM(args.model, **options) as cached, LLM(args.model, **options, enable_prefix_caching=False) as plain:
        for number in range(-1, args.rounds):
            for llm, name in ((plain, "cache off"), (cached, "cache on")):
                for way in ("group", "requests"):
                    row = measure(llm, args, way, seed=1000 * (number + 1) + len(rows))
                    if number >= 0:  # the first round is a warm-up
                        rows.setdefault(f"{way}, {name}", []).append(row)
    found = {}
    for name, each in rows.items():
        found[name] = {key: statistics.median(row[key] for row in each) for key in each[0]}
        print(f"{name:<20}" + "  ".join(f"{key} {value:.0f}" for key, value in found[name].items()))
    group = found["group, cache off"]["tokens_per_s"]
    for name in ("requests, cache off", "requests, cache on"):
        print(f"group without prefix cache / {name}: {group / found[name]['tokens_per_s']:.2f}")
    num_output = args.branches * args.output
    step = step_in_prompt_tokens(
        num_output / group,
        num_output / found["requests, cache off"]["tokens_per_s"],
        args.branches,
        args.prompt,
        args.output,
    )
    print(f"a decode step of {args.branches} branches takes as long as {step:.0f} tokens of a prompt")
    if args.json is not None:
        options = {**vars(args), "model": Path(args.model).name, "json": None}
        args.json.write_text(json.dumps({"options": options, "rows": rows, "medians": found, "step": step}))
    return 0


def step_in_prompt_tokens(group_s: float, requests_s: float, branches: int, prompt: int, output: int) -> float:
    """Return how many tokens of a prompt are computed in the time of a decode step.

    Args:
        group_s, requests_s: time of the branches as a group, which computes the prompt once, and as requests, which compute it
            `branches` times.
        branches, prompt, output: their number, tokens of the prompt, tokens of each output.
    """
    token_s = (requests_s - group_s) / ((branches - 1) * prompt)
    return (group_s - prompt * token_s) / ((output - 1) * token_s)


def measure(llm: LLM, args: argparse.Namespace, way: str, *, seed: int) -> dict[str, float]:
    """Return output tokens per second and tokens computed for a new prompt's branches, as a group or as "requests"."""
    vocab, count = llm.model_info.vocab_size, args.branches
    prompt = np.random.default_rng([seed, len(way)]).integers(0, vocab, args.prompt).tolist()
    common = {"max_tokens": args.output, "ignore_eos": True}
    before, start = llm.stats()["tokens_computed"], time.perf_counter()
    if way == "group":
        outputs = llm.generate([prompt], SamplingParams(n=count, seed=seed, **common), use_tqdm=False)
    else:
        params = [SamplingParams(seed=seed + branch, **common) for branch in range(count)]
        outputs = llm.generate([prompt] * count, params, use_tqdm=False)
    elapsed_s = time.perf_counter() - start
    num_tokens = sum(len(each.token_ids) for output in outputs for each in output.outputs)
    assert num_tokens == count * args.output, (num_tokens, count, args.output)
    return {"tokens_per_s": num_tokens / elapsed_s, "computed": llm.stats()["tokens_computed"] - before}


if __name__ == "__main__":
    raise SystemExit(main())
