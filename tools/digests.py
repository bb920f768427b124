"""Record digests of results that a refactoring must not change, and compare two records.

    python tools/digests.py before.json            # in the old tree, with that tree's environment
    python tools/digests.py after.json             # in the new one
    python tools/digests.py --compare before.json after.json

Two kinds of cases are recorded. *Models*: token ids and log-probabilities of tiny checkpoints of every
architecture and quantised format, in fp32 and bf16, on 1 and 2 ranks, greedy and seeded, through
`expertwire.LLM`. *Plans*: the contents of the scheduler's plans on three simulated traces. `--only TEXT`
restricts either command to the cases whose name contains TEXT, for instance `--only "deepseek_v3 "` or
`--only plans`. Everything takes about 20 minutes on two cores, `--only plans` a few seconds. A record that exists
is continued: cases that it has are not run again.

A record depends on the machine: compare only records from one machine. The digests depend on values alone and not
on names, so the program finds modules and options under their current and earlier names, and its record of
commit e65bef5 can be made by running this file with that tree's interpreter.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib
import importlib.util
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

import expertwire
from expertwire import LLM, SamplingParams

ROOT = Path(expertwire.__file__).parents[1]
Digests = dict[str, str]

# Names of options at commit e65bef5, for options that have other names now; a class's fields decide which are passed.
EARLIER_NAMES = {
    "all2all_backend": "all_to_all",
    "chunked_prefill_size": "chunk_tokens",
    "enable_two_batch_overlap": "two_batch_overlap",
    "kv_cache_memory_bytes": "kv_cache_bytes",
    "max_num_batched_tokens": "max_num_tokens",
    "max_num_seqs": "max_running",
    "max_queued_requests": "max_waiting",
    "num_redundant_experts": "redundant_experts",
    "quantization": "quantize",
}


def main() -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, metavar="OUT.json", help="where to write the record")
    parser.add_argument("--compare", nargs=2, type=Path, metavar="JSON", help="compare two records instead")
    parser.add_argument("--only", default="", metavar="TEXT", help="only cases whose name contains this")
    args = parser.parse_args()
    if args.compare:
        before, after = (json.loads(file.read_text()) for file in args.compare)
        return compare(before, after, args.only)
    if args.out is None:
        parser.error("name a file for the record, or give --compare")
    found: dict[str, Digests] = json.loads(args.out.read_text()) if args.out.exists() else {}
    for name, case in cases():
        if args.only in name and name not in found:
            found[name] = case()
            args.out.write_text(json.dumps(found, indent=1) + "\n")
            print(name, *list(found[name].values())[:3], flush=True)
    return 0


def compare(before: dict[str, Digests], after: dict[str, Digests], only: str) -> int:
    """Print which digests differ; return 1 if any does or a case is missing."""
    before, after = ({name: d for name, d in record.items() if only in name} for record in (before, after))
    both = [name for name in before if name in after]
    # By value, because plans' columns may be reordered or added to, which changes no content.
    different = [name for name in both if Counter(before[name].values()) - Counter(after[name].values())]
    for name in different:
        keys = [key for key in before[name] | after[name] if before[name].get(key) != after[name].get(key)]
        print(f"DIFFERENT {name}: {', '.join(keys)}")
    missing = sorted(before.keys() ^ after.keys())
    for name in missing:
        print(f"MISSING   {name}")
    print(f"{len(both) - len(different)} equal, {len(different)} different, {len(missing)} in one record only")
    return int(bool(different or missing or not both))


def cases() -> Iterator[tuple[str, Callable[[], Digests]]]:
    """Yield each case's name and the function that runs it."""
    for name, run in plan_cases().items():
        yield f"plans {name}", run
    sys.path.insert(0, str(ROOT / "tests"))
    architectures = module("helpers.architectures", "architectures")
    with tempfile.TemporaryDirectory(prefix="digests-") as scratch:
        folders: list[tuple[str, Callable[[], Path]]] = [
            (name, partial(architectures.folder, name)) for name in architectures.all_of_them()
        ]
        folders += list(quantised_checkpoints(Path(scratch)))
        for name, folder in folders:
            for dtype in ("float32", "bfloat16"):
                for ep_size in (1, 2):
                    sizes = {"dtype": dtype, "ep_size": ep_size}
                    yield f"{name} {dtype} ep{ep_size}", partial(model_digests, folder, sizes)
        for name, architecture, options in VARIANTS:
            yield (
                f"{name} ({architecture})",
                partial(model_digests, partial(architectures.folder, architecture), options),
            )


# Engine options that take other paths than the defaults.
VARIANTS: list[tuple[str, str, dict[str, Any]]] = [
    *((f"quantize {q}", "qwen3_moe", {"quantization": q, "ep_size": 2}) for q in ("fp8", "int4", "mxfp4")),
    *((f"fp8 cache {n}", n, {"kv_cache_dtype": "fp8"}) for n in ("qwen3_moe", "deepseek_v3", "gpt_oss")),
    ("fast numerics", "deepseek_v3", {"numerics": "fast"}),
    ("micro-batches", "qwen3_moe", {"enable_two_batch_overlap": True, "ep_size": 2}),
    ("micro-batches", "gpt_oss", {"enable_two_batch_overlap": True, "ep_size": 2}),
    ("redundant experts", "deepseek_v3", {"num_redundant_experts": 2, "ep_size": 2}),
    ("reference all-to-all", "qwen3_moe", {"all2all_backend": "reference", "ep_size": 2}),
]


def quantised_checkpoints(scratch: Path) -> Iterator[tuple[str, Callable[[], Path]]]:
    """Yield a name and a maker for each published format, as `tests/engine/test_quantized_checkpoints.py` has them."""
    sys.path.insert(0, str(ROOT / "tests" / "engine"))
    formats = module("helpers.quantized_checkpoints", "test_quantized_checkpoints")
    tiny = module("helpers.tiny_checkpoints", "tiny_checkpoints")

    def make(name: str, fused: bool) -> Path:
        import torch

        folder = scratch / f"{name}-{fused}"
        if not folder.exists():
            folder.mkdir()
            torch.manual_seed(0)
            tiny._write_tokenizer("qwen3_moe", folder)
            formats.make(folder, name, fused=fused)
        return folder

    for name, fused in formats.CASES:
        yield f"{name}{', fused' if fused else ''}", partial(make, name, fused)


# ---- models


def model_digests(make: Callable[[], Path], options: dict[str, Any]) -> Digests:
    """Make a checkpoint and serve prompts, once computed and once from the prefix cache.

    They are of several lengths, longer and shorter than a step.
    """
    config = of_several("EngineConfig", "expertwire.engine.config.engine_config", "expertwire.engine.config")
    options = {"max_num_batched_tokens": 64, "max_num_seqs": 4, "kv_cache_memory_bytes": 20_000_000, **options}
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 250, length).tolist() for length in (1, 17, 40, 100, 150)]
    common: dict[str, Any] = {"max_tokens": 12, "ignore_eos": True}
    greedy = SamplingParams(temperature=0.0, logprobs=4, prompt_logprobs=3, **common)
    plain = SamplingParams(temperature=0.0, logprobs=0, **common)
    seeded = [
        SamplingParams(temperature=1.0, seed=1, logprobs=2, n=2, **common),
        SamplingParams(temperature=0.8, seed=2, top_p=0.9, logprobs=2, **common),
        SamplingParams(temperature=1.2, seed=3, top_k=20, min_p=0.01, logprobs=2, **common),
        SamplingParams(temperature=0.7, seed=4, repetition_penalty=1.3, presence_penalty=0.5, logprobs=2, **common),
        SamplingParams(temperature=0.9, seed=5, frequency_penalty=0.4, logit_bias={7: 3.0, 9: -5.0}, **common),
    ]
    with LLM(make(), **named_for(config, options)) as llm:

        def run(params: Any) -> str:
            return digest(outputs(llm.generate(prompts, params, use_tqdm=False)))

        return {"greedy": run(greedy), "cached": run(plain), "seeded": run(seeded)}


def outputs(results: Sequence[Any]) -> Iterator[np.ndarray]:
    """Yield the token ids, log-probabilities and ranks of results, in order."""
    for result in results:
        yield from logprobs(result.prompt_logprobs or [])
        for output in result.outputs:
            yield np.array(output.token_ids, np.int64)
            yield from logprobs(output.logprobs or [])


def logprobs(positions: Iterable[dict[int, Any] | None]) -> Iterator[np.ndarray]:
    """Yield a row of (token id, rank) and one of log-probabilities for each position."""
    for found in positions:
        items = list((found or {}).items())
        yield np.array([(token, value.rank) for token, value in items], np.int64)
        yield np.array([value.logprob for _, value in items], np.float64)


# ---- plans


def plan_cases() -> dict[str, Callable[[], Digests]]:
    """Return the three traces by name, each with another policy and another kind of shortage."""
    traces = module("expertwire.bench.scheduler.traces", "expertwire.bench.traces")
    lengths = {"prompt": traces.Lengths(median=300, sigma=1.0, low=4, high=4096)}
    lengths["output"] = traces.Lengths(median=60, sigma=0.8, high=400)
    shared = {"num_requests": 400, "max_model_len": 8192, **lengths}
    poisson = traces.Poisson(rate=30.0, seed=1, **shared)
    bursty = traces.Bursty(rate=40.0, seed=2, abort_share=0.2, **shared)
    multi_turn = traces.MultiTurn(rate=20.0, seed=3, think_s=1.0, **shared)
    return {
        "poisson": lambda: plan_digests(poisson, policy="fcfs", ranks=4, blocks=2000, chunk=None),
        "bursty": lambda: plan_digests(bursty, policy="priority", ranks=2, blocks=300, chunk=128),
        "multi-turn": lambda: plan_digests(multi_turn, policy="prefix", ranks=2, blocks=1500, chunk=None),
    }


def plan_digests(trace: Any, *, policy: str, ranks: int, blocks: int, chunk: int | None) -> Digests:
    """Simulate a trace; return the digest of each column of the ranks' plans over all steps.

    Columns are numbered by their place in a rank's plan; the sampling record counts a column for each field.
    """
    simulation = module("expertwire.bench.scheduler.simulation", "expertwire.bench.simulation")
    config = of_several("SchedulerConfig", "expertwire.scheduler.config", "expertwire.scheduler.scheduler")
    options = {
        "num_ranks": ranks,
        "max_num_seqs": 64,
        "max_num_batched_tokens": 512,
        "max_model_len": 8192,
        "block_size": 16,
        "num_blocks": blocks,
        "max_queued_requests": 4096,
        "eos_token_ids": (0,),
        "vocab_size": 32000,
        "chunked_prefill_size": chunk,
    }
    scheduler_config = config(**named_for(config, options))
    model = simulation.StepModel()
    simulated = simulation.Simulation(trace, scheduler_config, model=model, overlap=True, policy=policy)
    columns: dict[str, Any] = {}
    answer = simulated.ranks.run

    def watched(plan: Any) -> Any:
        for rank in range(ranks):
            for name, values in plan_columns(plan.rank(rank)):
                columns.setdefault(name, hashlib.sha256()).update(as_bytes(values))
        return answer(plan)

    simulated.ranks.run = watched
    outcome = simulated.run()
    served = digest([outcome.served["finish"], outcome.served["count"]])
    assert simulated.ranks.preemptions or policy != "priority", "the blocks should be too few for this trace"
    return {"served": served} | {name: found.hexdigest()[:16] for name, found in columns.items()}


def plan_columns(rank_plan: Iterable[Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the arrays of a rank's plan: an array, a list of them, or a structured one."""
    for place, values in enumerate(rank_plan):
        if isinstance(values, list):
            yield f"{place:02}", np.concatenate([np.append(part, -1) for part in values] or [np.zeros(0)])
        elif values.dtype.names:
            yield from ((f"{place:02}.{i:02}", values[name]) for i, name in enumerate(values.dtype.names))
        else:
            yield f"{place:02}", values


# ---- digests and names


def digest(arrays: Iterable[np.ndarray]) -> str:
    """Return the digest of arrays, their order and lengths included."""
    found = hashlib.sha256()
    for values in arrays:
        found.update(as_bytes(values))
    return found.hexdigest()[:16]


def as_bytes(values: np.ndarray) -> bytes:
    """Return the length and the values as 8 bytes each, so that an array's storage type does not matter."""
    wide = np.float64 if values.dtype.kind == "f" else np.int64
    return len(values).to_bytes(8, "little") + np.ascontiguousarray(values, wide).tobytes()


def module(*names: str) -> ModuleType:
    """Import the first of these modules that exists."""
    for name in names:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not name.startswith(error.name):
                raise
    raise ModuleNotFoundError(f"none of {', '.join(names)} exists")


def of_several(attribute: str, *names: str) -> Any:
    """Return an attribute of the first module that has it."""
    for name in names:
        if hasattr(found := module(name, *names), attribute):
            return getattr(found, attribute)
    raise AttributeError(f"none of {', '.join(names)} has {attribute}")


def named_for(config: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options under the names that a configuration class has for them."""
    fields = {field.name for field in dataclasses.fields(config)}
    return {name if name in fields else EARLIER_NAMES[name]: value for name, value in options.items()}


if __name__ == "__main__":
    sys.exit(main())
