"""Check the engine on a GPU against the CPU, with and without CUDA graphs, and a request alone against a batch.

On "cpu" the GPU's kernels are interpreted, on few tokens. A check raises `AssertionError`; it returns what it has compared.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np

import expertwire
from expertwire.bench.first_contact.one_rank import Answers, OneRank, Sizes, Target, prompts, request, toy_config
from expertwire.scheduler.request import Request

Dtype = Literal["float32", "bfloat16"]
DEMO = Path(expertwire.__file__).parent / "demo_model"
# Where the two most likely tokens are nearer to each other, either may be the most likely one.
NEAR = {"float32": 1e-3, "bfloat16": 0.25}
# The mean difference of a prompt's log-probabilities.
CLOSE = {"float32": 2e-4, "bfloat16": 3e-2}


def sizes(device: str) -> Sizes:
    """Sizes of what a check serves."""
    if device == "cpu":
        return Sizes(max_num_seqs=2, max_num_batched_tokens=8, max_model_len=32)
    return Sizes(max_num_seqs=16, max_num_batched_tokens=256, max_model_len=512)


def _requests(vocab_size: int, device: str) -> list[Request]:
    """Prompts whole and in chunks, beside requests that decode already."""
    lengths, num = ((3, 11), 2) if device == "cpu" else ((5, 16, 17, 70, 200, 333, 64, 1), 40)
    drawn = prompts(vocab_size, lengths)
    return [request(key, ids, max_tokens=num + key % 3, logprobs=2, prompt_logprobs=0) for key, ids in enumerate(drawn)]


@contextmanager
def _model(device: str) -> Iterator[dict[str, Any]]:
    """Arguments of a `OneRank`: the demo model, or on "cpu" a toy with random weights."""
    if device != "cpu":
        yield {"folder": DEMO}
        return
    with tempfile.TemporaryDirectory(prefix="toy-") as folder:
        yield {"folder": toy_config("qwen3-30b-a3b", Path(folder)), "dummy": True}


def _rank(device: str, target: Target, dtype: Dtype) -> OneRank:
    with _model(device) as model:
        return OneRank(target=target, sizes=sizes(device), dtype=dtype, **model)


def _serve(target: Target, device: str, dtype: Dtype) -> Answers:
    rank = _rank(device, target, dtype)
    return rank.answer(_requests(rank.config.vocab_size, device))


def like_the_cpu(device: str, dtype: Dtype) -> str:
    """Greedy tokens are the CPU's, up to a place where two are about as likely; log-probabilities of prompts are close."""
    expected = _serve(Target.cpu(), device, dtype)
    found = _serve(Target.gpu(device), device, dtype)
    compared = total = 0
    for key, tokens in expected.tokens.items():
        total += len(tokens)
        ours = found.tokens[key]
        same = next((i for i, (a, b) in enumerate(zip(ours, tokens, strict=True)) if a != b), len(tokens))
        compared += same
        if same < len(tokens):
            margin = expected.margins[key][same]
            assert margin <= NEAR[dtype], (
                f"request {key}: token {same} is {ours[same]}, the CPU's {tokens[same]}, {margin:.3g} likelier than the next"
            )
    difference = _difference(found, expected)
    assert difference <= CLOSE[dtype], f"log-probabilities of prompts differ by {difference:.3g} > {CLOSE[dtype]}"
    return f"{compared} of {total} tokens until two are about as likely; prompts' log-probabilities differ by {difference:.2g}"


def _difference(found: Answers, expected: Answers) -> float:
    """Return the mean absolute difference of the prompts' log-probabilities."""
    pairs = [
        (found.prompts[key][position], logprob)
        for key, by_position in expected.prompts.items()
        for position, logprob in by_position.items()
    ]
    return float(np.abs(np.diff(np.array(pairs), axis=1)).mean())


def graphs_change_nothing(device: str, dtype: Dtype) -> str:
    """Check that CUDA graphs, of decode and mixed steps, change no token and no bit of a log-probability."""
    eager = _serve(Target.gpu(device, graphs=False), device, dtype)
    captured = _serve(Target.gpu(device), device, dtype)
    return _same(captured, eager, "with graphs")


def company_changes_nothing(device: str, dtype: Dtype) -> str:
    """Check that a request has the same bits in a batch and alone, in one prefill and in chunks, decoded and prefilled."""
    target = Target.gpu(device)
    rank = _rank(device, target, dtype)
    requests = _requests(rank.config.vocab_size, device)
    together = rank.answer(requests)
    compared = []
    for one in requests if device != "cpu" else requests[-1:]:
        alone = rank.answer(
            [request(one.key, one.prompt, max_tokens=one.params.max_tokens, logprobs=2, prompt_logprobs=0)]
        )
        compared.append(_same(alone, together, "alone", keys=[one.key]))
        known = [*one.prompt.tolist(), *together.tokens[one.key]]
        if len(known) >= rank.sizes.max_model_len:
            continue
        again = rank.answer([request(one.key, known, max_tokens=1, prompt_logprobs=0)])
        decoded = {len(one.prompt) + i: logprob for i, logprob in enumerate(together.logprobs[one.key])}
        expected = together.prompts.get(one.key, {}) | decoded
        wrong = [position for position, logprob in expected.items() if again.prompts[one.key].get(position) != logprob]
        assert not wrong, (
            f"request {one.key}: positions {wrong[:8]} of {len(expected)} have other bits in a prompt than as they were decoded: "
            f"{again.prompts[one.key].get(wrong[0])} and {expected[wrong[0]]}"
        )
    return f"{len(compared)} requests: {compared[0]}"


def _same(found: Answers, expected: Answers, name: str, keys: Sequence[int] | None = None) -> str:
    keys = list(expected.tokens) if keys is None else keys
    for key in keys:
        assert found.tokens[key] == expected.tokens[key], f"request {key}: other tokens {name}"
        for what in ("logprobs", "prompts"):
            ours, theirs = (getattr(answers, what).get(key) for answers in (found, expected))
            assert ours == theirs, f"request {key}: other bits of {what} {name}: {_first(ours, theirs)}"
    return f"{sum(len(expected.tokens[key]) for key in keys)} tokens with equal bits {name}"


def _first(found: Any, expected: Any) -> str:
    """Return the first place where two lists or dictionaries differ."""
    ours, theirs = (dict[Any, Any](enumerate(x) if isinstance(x, list) else x or {}) for x in (found, expected))
    place = next((i for i in theirs if ours.get(i) != theirs[i]), None)
    return f"at {place}: {ours.get(place)} and {theirs.get(place)}"
