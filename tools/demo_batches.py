"""The demo models' training batches: examples of one kind and size, by (model, seed, step).

A batch holds problems of one kind and size, so no row is padded.

Shape letters: B batch, S sequence length, V vocabulary.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expertwire.deploy.demo_task import (
    END_OF_STEP,
    END_OF_THINKING,
    EOS,
    QUESTION,
    WAIT,
    WORDS,
    Kind,
    make_example,
    make_thinking_example,
)

TOKEN_IDS = {word: token_id for token_id, word in enumerate(WORDS)}
Mix = tuple[tuple[Kind, int, float], ...]  # (kind, size, share of the batches)
SUMS: Mix = tuple(
    ("SUM", size, share) for size, share in zip(range(2, 9), (0.04, 0.14, 0.16, 0.14, 0.12, 0.08, 0.04), strict=True)
)
MIXES: dict[str, Mix] = {
    "demo": (
        *SUMS,
        *(("COUNTDOWN", size, share) for size, share in zip(range(2, 6), (0.02, 0.08, 0.10, 0.08), strict=True)),
    ),
    # The lowest tier of a cascade: what it is for are the easy problems.
    "small": tuple(
        ("SUM", size, share) for size, share in zip(range(2, 8), (0.15, 0.35, 0.25, 0.15, 0.06, 0.04), strict=True)
    ),
    # It goes on with longer ones, when it can add.
    "small_choices": tuple(
        ("SUM", size, share) for size, share in zip(range(2, 8), (0.05, 0.20, 0.26, 0.24, 0.15, 0.10), strict=True)
    ),
    "thinking": SUMS,
}
ANY_CHOICE = {
    "small_choices"
}  # models that may choose any two numbers in a step of `SUM`: every right choice is a right token
CUT_SHARE, AGAIN_SHARE = 0.3, 0.15  # of the thinking model's batches


@dataclass(frozen=True)
class Batch:
    """Examples of one kind and size.

    Attributes:
        ids_BS: prompts and completions.
        first: the prompt's length.
        weights_S: of the completions' tokens in the loss.
        others_BSV: where tokens besides the example's are right, too, those; None where nothing is.
    """

    ids_BS: Tensor
    first: int
    weights_S: Tensor
    others_BSV: Tensor | None = None


def make_batch(model: str, seed: int, batch_tokens: int, step: int) -> Batch:
    """Return the batch of a step: a function of its arguments alone."""
    rng = random.Random(f"{seed} {step}")
    mix = MIXES[model]
    kind, size, _ = rng.choices(mix, [share for _, _, share in mix])[0]
    options = _thinking_options(rng, size) if model == "thinking" else None
    texts: list[list[str]] = []
    while not texts or len(texts) < batch_tokens // len(texts[0]):
        seed = rng.getrandbits(48)
        if options is None:
            problem, solution = make_example(kind, size, seed, "train")
        else:
            problem, solution = make_thinking_example(size, seed, "train", **options)
        texts.append([*problem.prompt.split(), *solution.split(), EOS])
    first = texts[0].index(QUESTION) + 1
    ids_BS = torch.tensor([[TOKEN_IDS[word] for word in words] for words in texts])
    if model in ANY_CHOICE and kind == "SUM":
        return Batch(ids_BS, first, torch.ones(ids_BS.shape[1] - first), right_choices(texts, first))
    weights = token_weights(kind, texts[0][first:])
    if options is not None:
        weights = [w * f for w, f in zip(weights, _forced(texts[0][first:], cut="cut" in options), strict=True)]
    return Batch(ids_BS, first, torch.tensor(weights))


def right_choices(texts: list[list[str]], first: int) -> Tensor:
    """Return which numbers every step of `SUM` solutions may take, in their list's order, as booleans [B, completion, V]."""
    right_BSV = torch.zeros(len(texts), len(texts[0]) - first, len(WORDS), dtype=torch.bool)
    for text, right_SV in zip(texts, right_BSV, strict=True):
        left, solution = text[1 : first - 1], text[first:]
        for i, word in enumerate(solution):
            if word == "+":
                taken, end = solution[i - 1], solution.index(END_OF_STEP, i)
                right_SV[i - 1, [TOKEN_IDS[number] for number in left[:-1]]] = True
                right_SV[i + 1, [TOKEN_IDS[number] for number in left[left.index(taken) + 1 :]]] = True
                left = solution[i + 5 : end]
    return right_BSV


def _thinking_options(rng: random.Random, size: int) -> dict[str, Any]:
    """Draw whether a batch's thinking is cut, half the time at the end of a step, or begins again."""
    fate = rng.random()
    if fate < CUT_SHARE:
        words = make_thinking_example(size, 0)[1].split()
        words = words[1 : words.index(END_OF_THINKING)]
        ends = [0, *(i + 1 for i, word in enumerate(words) if word == END_OF_STEP)]
        return {"cut": rng.choice(ends) if rng.random() < 0.5 else rng.randrange(len(words))}
    return {"again": True} if fate < CUT_SHARE + AGAIN_SHARE else {}


def _forced(words: list[str], *, cut: bool) -> list[float]:
    """0 for words that a server forces: `Wait`, and `</think>` in thinking that was cut; 1 for the others."""
    forced = (WAIT, END_OF_THINKING) if cut else (WAIT,)
    return [float(word not in forced) for word in words]


def token_weights(kind: Kind, words: list[str]) -> list[float]:
    """Return the weight of each completion token in the loss.

    Which two numbers a step of `SUM` takes is arbitrary: predicting the draw only adds noise to the gradient, so these two
    tokens of a step weigh less. In `COUNTDOWN` the choice is the reasoning, and weighs as much as the rest.
    """
    weights = [1.0] * len(words)
    for i, word in enumerate(words):
        if kind == "SUM" and word == "+":
            weights[i - 1] = 0.25
            if i + 1 < len(words):
                weights[i + 1] = 0.25
    return weights
