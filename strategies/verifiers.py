"""Verifiers, which score outputs, whole or in part."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Self, SupportsFloat

from expertwire.strategies.checks import require_integer, require_number, require_one_of


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """An output to be scored.

    Attributes:
        prompt: text of the prompt; "" if it was given as token ids and there is no tokenizer.
        text: text of the output so far.
        prompt_token_ids: tokens of the prompt.
        token_ids: tokens of the output so far.
        complete: whether the output has ended by itself.
    """

    prompt: str
    text: str
    prompt_token_ids: Sequence[int]
    token_ids: Sequence[int]
    complete: bool


class CountedScore(float):
    """A score for which an engine computed tokens.

    Attributes:
        num_tokens: those that it computed, without those that it found in its prefix cache.
    """

    __slots__ = ("num_tokens",)
    num_tokens: int

    def __new__(cls, value: float, num_tokens: int) -> Self:
        score = super().__new__(cls, value)
        score.num_tokens = num_tokens
        return score


class Verifier(Protocol):
    """Scores outputs. It may be slow, raise or hang: the caller has a time limit and a policy for that.

    One with an attribute `max_calls` has at most so many calls at a time; candidates that come meanwhile go into the next one.
    """

    def __call__(self, candidates: Sequence[Candidate], /) -> Sequence[float]:
        """Return a score for each candidate; higher is better. A `CountedScore` says how many tokens it took."""
        ...


class VerifierError(Exception):
    """A verifier failed: it raised, was late, or returned something else than a score for each candidate.

    Attributes:
        num_tokens: of each candidate, those that an engine had computed by then; empty if none has.
    """

    def __init__(self, message: str, num_tokens: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.num_tokens = tuple(num_tokens)


@dataclass(frozen=True, kw_only=True)
class VerifierPolicy:
    """Limits of a verifier's calls, and what a failed one means.

    Args:
        on_failure: "drop": the branches have no score and cannot be chosen; "zero": they have the score 0; "error": the request
            ends with an error.
        timeout_s: seconds after which a call is late, which is a failure.
        max_batch: most candidates of a call.

    Raises:
        ValueError: names the field and the values it allows.
    """

    on_failure: str = "drop"
    timeout_s: float = 30.0
    max_batch: int = 64

    def __post_init__(self) -> None:
        require_one_of("verifier_policy.on_failure", self.on_failure, ("drop", "zero", "error"))
        require_number("verifier_policy.timeout_s", self.timeout_s, above=0)
        require_integer("verifier_policy.max_batch", self.max_batch, minimum=1)

    def failed_score(self, error: VerifierError) -> float | None:
        """Return what the score of a branch is after a failed call.

        Raises:
            VerifierError: the one given, where `on_failure` is "error".
        """
        if self.on_failure == "error":
            raise error
        return 0.0 if self.on_failure == "zero" else None


DEFAULT_POLICY = VerifierPolicy()


def checked_scores(returned: object, num_candidates: int) -> list[float]:
    """Return the scores that a verifier returned, as numbers; a `CountedScore` stays one.

    Args:
        returned: a sequence (or an array of one dimension) of numbers.
        num_candidates: the number of candidates it was given.

    Raises:
        VerifierError: it is not a sequence, has another length, or one of it is no finite number.
    """
    if isinstance(returned, str | bytes) or not hasattr(returned, "__len__") or not hasattr(returned, "__iter__"):
        raise VerifierError(f"the verifier returned a {type(returned).__name__}, not a sequence of scores")
    values = list(returned)
    if len(values) != num_candidates:
        raise VerifierError(f"the verifier returned {len(values)} scores of {num_candidates} candidates")
    scores = []
    for index, value in enumerate(values):
        if isinstance(value, bool | str | bytes) or not isinstance(value, SupportsFloat):
            raise VerifierError(f"the verifier's score of candidate {index} is {value!r:.100}, not a number")
        try:
            score = float(value)
        except (TypeError, ValueError, OverflowError) as error:
            raise VerifierError(f"the verifier's score of candidate {index} is {value!r:.100}, not a number") from error
        if not math.isfinite(score):
            counted = [getattr(each, "num_tokens", 0) for each in values]
            raise VerifierError(f"the verifier's score of candidate {index} is {score}, not a finite number", counted)
        scores.append(value if isinstance(value, CountedScore) else score)
    return scores
