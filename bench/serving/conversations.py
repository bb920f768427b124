"""`python -m expertwire.bench.serving.conversations MODEL`: savings of the prefix cache in conversations, on a real engine.

Sessions share a system prompt. The prompt of a turn is the conversation so far and a new question of random tokens; the turns of
all sessions are submitted at once. The same trace runs with and without the prefix cache, and greedy tokens must be equal. The
tokens found in the cache are compared with the maximum: whole blocks with which an earlier prompt or answer began, without a
prompt's last token.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import expertwire
from expertwire import LLM, SamplingParams
from expertwire.bench.serving import throughput

DEMO = Path(expertwire.__file__).parent / "demo_model"


def main() -> int:
    """Run the trace twice; print and write the results. Return 1 if tokens differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(DEMO), help="folder of a checkpoint (default: the demo model)")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--ep-size", type=int, default=1)
    parser.add_argument("--sessions", type=int, default=8)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--system", type=int, default=128, help="tokens of the system prompt that all sessions share")
    parser.add_argument("--question", type=int, default=24, help="new tokens per turn")
    parser.add_argument("--answer", type=int, default=32, help="tokens per answer")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    runs: dict[str, Any] = {
        name: run(args, enable_prefix_caching=name == "cached") for name in ("cached", "not cached")
    }
    answers = [values.pop("answers") for values in runs.values()]
    answered = [tokens for turn in answers[0] for tokens in turn]
    again = [tokens for turn in answers[1] for tokens in turn]
    runs["equal answers"] = sum(a == b for a, b in zip(answered, again, strict=True))
    runs["answers"] = len(answered)
    for name, values in runs.items():
        print(name, json.dumps(values))
    if args.json:
        setting = {name: value for name, value in vars(args).items() if name != "json"}
        setting["model"] = Path(args.model).name
        args.json.write_text(
            json.dumps({"machine": throughput.machine("cpu"), "setting": setting, "runs": runs}, indent=1) + "\n"
        )
    return int(runs["equal answers"] < runs["answers"])


def run(args: argparse.Namespace, *, enable_prefix_caching: bool) -> dict[str, Any]:
    """Run the trace once."""
    longest = args.system + args.turns * (args.question + args.answer)
    with LLM(
        args.model,
        dtype=args.dtype,
        ep_size=args.ep_size,
        launcher="local",
        threads_per_rank=1,
        max_model_len=longest,
        enable_prefix_caching=enable_prefix_caching,
    ) as llm:
        size = llm.model_info.block_size
        generator = np.random.default_rng(0)

        def words(count: int) -> list[int]:
            return generator.integers(2, llm.model_info.vocab_size, count).tolist()

        system = words(args.system)
        texts = [system + words(args.question) for _ in range(args.sessions)]
        params = SamplingParams(temperature=0, max_tokens=args.answer, ignore_eos=True)
        known: set[tuple[int, ...]] = set()
        cached = possible = prompts = 0
        answers, seconds = [], 0.0
        for _ in range(args.turns):
            started = time.perf_counter()
            outputs = llm.generate(texts, params, use_tqdm=False)
            seconds += time.perf_counter() - started
            answers.append([output.outputs[0].token_ids for output in outputs])
            for text in texts:
                possible += _possible(text, known, size)
                known.update(_prefixes(text, size))
            prompts += sum(map(len, texts))
            cached += sum(output.num_cached_tokens for output in outputs)
            for text, answer in zip(texts, answers[-1], strict=True):
                known.update(_prefixes([*text, *answer[:-1]], size))  # the last token is not computed
            texts = [text + answer + words(args.question) for text, answer in zip(texts, answers[-1], strict=True)]
    return {
        "prompt tokens": prompts,
        "found in the cache": cached,
        "could be found": possible,
        "share of what could be found": round(cached / possible, 4),
        "seconds": round(seconds, 2),
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
