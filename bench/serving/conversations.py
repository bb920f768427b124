"""`python -m expertwire.bench.serving.conversations MODEL...`: savings of the prefix cache in conversations, on a real engine.

Sessions share a system prompt. The prompt of a turn is the conversation so far and a new question of random tokens; the turns of
all sessions are submitted at once. The same trace runs with and without the prefix cache, and greedy tokens must be equal. The
tokens found in the cache are compared with the maximum: whole blocks with which an earlier prompt or answer began, without a
prompt's last token.

Models after the first have as many KV blocks as it has: a hybrid and a model with attention in all layers, for example, of
`expertwire.bench.serving.peers`. The hit rate is the share of prompt tokens that are found.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import expertwire
from expertwire import LLM, SamplingParams
from expertwire.bench.serving import throughput
from expertwire.engine.models.registry import read_model_config

BLOCK_SIZE = 16
DEMO = Path(expertwire.__file__).parent / "demo_model"


def main() -> int:
    """Run the trace twice; print and write the results. Return 1 if tokens differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "models", nargs="*", default=[str(DEMO)], help="folders of checkpoints (default: the demo model)"
    )
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--ep-size", type=int, default=1)
    parser.add_argument("--sessions", type=int, default=8)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--system", type=int, default=128, help="tokens of the system prompt that all sessions share")
    parser.add_argument(
        "--question", type=int, nargs="+", default=[24], help="new tokens per turn, or the least and most"
    )
    parser.add_argument("--answer", type=int, nargs="+", default=[32], help="tokens per answer, or the least and most")
    parser.add_argument("--kv-cache-memory-bytes", type=int, help="of the first model")
    parser.add_argument("--snapshot-every", type=int)
    parser.add_argument("--snapshot-share", type=float)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found, num_blocks = {}, None
    for model in args.models:
        name = "/".join(Path(model).parts[-2:])
        found[name], num_blocks = compare(args, model, num_blocks)
        print(name, json.dumps(found[name], indent=1))
    if args.json:
        setting = {name: value for name, value in vars(args).items() if name not in ("json", "models")}
        result = {"machine": throughput.machine("cpu"), "setting": setting, "models": found}
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return int(any(values["equal answers"] < values["answers"] for values in found.values()))


def compare(args: argparse.Namespace, model: str, num_blocks: int | None) -> tuple[dict[str, Any], int]:
    """Run the trace with and without the prefix cache; return the results and the model's KV blocks, `num_blocks` if given."""
    options = _options(args, model, num_blocks)
    runs = {
        name: run(args, model, {**options, "enable_prefix_caching": name == "cached"}) for name in ("cached", "not")
    }
    answered, again = (runs[name].pop("answers") for name in ("cached", "not"))
    equal = sum(a == b for a, b in zip(answered, again, strict=True))
    values = {
        **runs["cached"],
        "seconds without the cache": runs["not"]["seconds"],
        "equal answers": equal,
        "answers": len(answered),
    }
    return values, values["blocks"]["full"]


def _options(args: argparse.Namespace, model: str, num_blocks: int | None) -> dict[str, Any]:
    """Return the options of a model: its caches have `num_blocks` blocks, or what is asked for."""
    specs = read_model_config(model, args.dtype).cache_specs()
    options: dict[str, Any] = {"kv_cache_memory_bytes": args.kv_cache_memory_bytes}
    if num_blocks is not None:
        options["kv_cache_memory_bytes"] = (num_blocks - 1) * sum(spec.bytes_per_block(BLOCK_SIZE) for spec in specs)
    if any(spec.kind == "state" for spec in specs):
        options |= {"snapshot_every": args.snapshot_every, "snapshot_share": args.snapshot_share}
    return {name: value for name, value in options.items() if value is not None}


def run(args: argparse.Namespace, model: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Run the trace once."""
    longest = args.system + args.turns * (args.question[-1] + args.answer[-1])
    fixed = {"dtype": args.dtype, "ep_size": args.ep_size, "launcher": "local", "threads_per_rank": 1}
    with LLM(
        model, **fixed, max_model_len=longest, block_size=BLOCK_SIZE, max_num_seqs=args.sessions, **options
    ) as llm:
        generator = np.random.default_rng(0)

        def words(bounds: Sequence[int]) -> list[int]:
            count = generator.integers(bounds[0], bounds[-1], endpoint=True)
            return generator.integers(2, llm.model_info.vocab_size, count).tolist()

        system = words([args.system])
        texts = [system + words(args.question) for _ in range(args.sessions)]
        known: set[tuple[int, ...]] = set()
        cached = possible = prompts = 0
        answers, seconds = [], 0.0
        for _ in range(args.turns):
            most = [len(words(args.answer)) for _ in texts]
            params = [SamplingParams(temperature=0, max_tokens=num, ignore_eos=True) for num in most]
            started = time.perf_counter()
            outputs = llm.generate(texts, params, use_tqdm=False)
            seconds += time.perf_counter() - started
            new = [output.outputs[0].token_ids for output in outputs]
            for text in texts:
                possible += _possible(text, known, BLOCK_SIZE)
                known.update(_prefixes(text, BLOCK_SIZE))
            prompts += sum(map(len, texts))
            cached += sum(output.num_cached_tokens for output in outputs)
            for text, answer in zip(texts, new, strict=True):
                known.update(_prefixes([*text, *answer[:-1]], BLOCK_SIZE))  # the last token is not computed
            texts = [text + list(answer) + words(args.question) for text, answer in zip(texts, new, strict=True)]
            answers += new
        return {
            "prompt tokens": prompts,
            "found in the cache": cached,
            "hit rate": round(cached / prompts, 4),
            "share of what could be found": round(cached / possible, 4),
            "seconds": round(seconds, 2),
            "blocks": llm.model_info.cache_blocks,
            "bytes": llm.model_info.cache_bytes,
            "evicted blocks": {name: sum(each) for name, each in llm.stats()["blocks_evicted"].items()},
            "answers": answers,
        }


def _prefixes(tokens: Sequence[int], size: int) -> list[tuple[int, ...]]:
    return [tuple(tokens[:end]) for end in range(size, len(tokens) + 1, size)]


def _possible(prompt: Sequence[int], known: set[tuple[int, ...]], size: int) -> int:
    """Return the number of tokens in known blocks at the start of the prompt, without its last token."""
    found = 0
    for prefix in _prefixes(prompt[:-1], size):
        if prefix not in known:
            break
        found = len(prefix)
    return found


if __name__ == "__main__":
    raise SystemExit(main())
