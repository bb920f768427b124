"""Comparison of the engine with transformers: cases with reference results.

Through the public API log-probabilities are compared with the reference's log-softmax: at every position of prompt and output
those of the 64 most probable tokens and of the token itself. `rank_model` gives the logits themselves.

T tokens of the prompt, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from expertwire import LLM, SamplingParams
from expertwire.engine.models.registry import read_model_config
from expertwire.outputs import RequestOutput
from helpers import tiny_checkpoints as tiny

LENGTHS = (1, 2, 15, 16, 17, 63, 130, 300)
VARIANTS: dict[str, tuple[tiny.Kind, dict[str, object]]] = {
    "mixtral": ("mixtral", {}),
    "mixtral, 2 experts": ("mixtral", {"num_local_experts": 2}),
    "qwen3_moe": ("qwen3_moe", {}),  # its layer 1 is dense
    "qwen3_moe, weights as they are": ("qwen3_moe", {"norm_topk_prob": False, "num_experts_per_tok": 3}),
    "qwen3": ("qwen3", {}),
    "qwen3, tied": ("qwen3", {"tie_word_embeddings": True, "head_dim": 32}),
}
NUM_TOKENS = 32
TOLERANCE = 1e-3
NEAR_TIE = 2e-3
# Rounding moves router logits by about 1e-5; closer than this it may rightly choose other experts.
ROUTER_MARGIN = 1e-4


@dataclass(frozen=True)
class Case:
    """A prompt, the reference's greedy tokens, and its log-probabilities [T + NUM_TOKENS - 1, V] for each next token."""

    ids: list[int]
    greedy: list[int]
    logprobs: np.ndarray


@dataclass
class Tally:
    """The results of a comparison."""

    tokens: int = 0
    excused: int = 0
    positions: int = 0
    largest: float = 0.0  # difference of a log-probability
    failures: list[str] = field(default_factory=list)


def checkpoint(variant: str) -> Path:
    """Return the folder of a variant's checkpoint, float32."""
    kind, options = VARIANTS[variant]
    return tiny.cached(kind, **options)


@functools.cache
def case(variant: str, length: int) -> Case:
    """Return a prompt of `length` tokens for which no router is near a tie, nor in its continuation."""
    folder = checkpoint(variant)
    for draw in range(200):
        ids = tiny.prompt(length, seed=1000 * length + draw)
        if _router_margin(folder, ids) > ROUTER_MARGIN:
            greedy, _ = tiny.reference_greedy(folder, ids, NUM_TOKENS)
            if _router_margin(folder, ids + greedy) > ROUTER_MARGIN:
                return Case(ids, greedy, reference_logprobs(folder, ids + greedy[:-1]))
    raise AssertionError(f"{variant}: no prompt of {length} tokens keeps away from ties")


def _router_margin(folder: Path, ids: Sequence[int]) -> float:
    config = read_model_config(folder)
    return tiny.router_margin(folder, ids) if config.top_k < config.num_experts else float("inf")


def reference_logprobs(folder: Path, ids: Sequence[int]) -> np.ndarray:
    """Return the reference's log-probabilities [T, V] in float64."""
    return torch.from_numpy(tiny.reference_logits(folder, ids)).double().log_softmax(-1).numpy()


def compare(llm: LLM, cases: Sequence[Case], *, together: bool) -> Tally:
    """Compare greedy tokens and log-probabilities of the cases, in one batch or one after another."""
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=64, prompt_logprobs=64)
    batches = [list(cases)] if together else [[case] for case in cases]
    tally = Tally()
    for batch in batches:
        outputs = llm.generate([case.ids for case in batch], params, use_tqdm=False)
        for case, output in zip(batch, outputs, strict=True):
            _compare_one(case, output, tally)
    return tally


def _compare_one(case: Case, output: RequestOutput, tally: Tally) -> None:
    length, [completion] = len(case.ids), output.outputs
    assert output.prompt_token_ids == case.ids
    assert output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == length
    assert len(completion.token_ids) == len(completion.logprobs) == NUM_TOKENS
    for position, entries in enumerate(output.prompt_logprobs[1:]):
        _compare_position(case, position, entries, case.ids[position + 1], tally)
    for i, (token, right) in enumerate(zip(completion.token_ids, case.greedy, strict=True)):
        position = length - 1 + i
        _compare_position(case, position, completion.logprobs[i], token, tally)
        tally.tokens += 1
        if token != right:
            second, best = np.sort(case.logprobs[position])[-2:]
            if best - second < NEAR_TIE:
                tally.excused += 1
            else:
                tally.failures.append(f"prompt of {length}: output {i} is {token}, expected {right}")
            return  # what follows is another text


def _compare_position(case: Case, position: int, entries: dict, token: int, tally: Tally) -> None:
    """Compare the entries at one position: own token first, the best 64, values within the tolerance."""
    right, ids = case.logprobs[position], list(entries)
    found = np.array([entry.logprob for entry in entries.values()])
    worst = float(np.abs(found - right[ids]).max())
    tally.positions += 1
    tally.largest = max(tally.largest, worst)
    rank = entries[token].rank
    best = np.sort(right)[::-1]
    ok = (
        worst <= TOLERANCE
        and ids[0] == token
        and len(ids) in (64, 65)
        and right[[i for i in ids if entries[i].rank <= 64]].min() >= best[63] - NEAR_TIE
        and best[rank - 1] - NEAR_TIE <= right[token] <= best[rank - 1] + NEAR_TIE
    )
    if not ok:
        tally.failures.append(f"prompt of {len(case.ids)}: log-probabilities at {position} differ by {worst:.2e}")


def bits(output):
    """Return a request's tokens and all log-probabilities, of the prompt too, for comparison bit by bit."""
    [completion] = output.outputs
    entries = [*output.prompt_logprobs[1:], *completion.logprobs]
    values = np.array([entry.logprob for at in entries for entry in at.values()], np.float32)
    return list(completion.token_ids), [list(at) for at in entries], values.tobytes()
