"""The parts of a request of a cascade: the policy with its verifier, and what each model does."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np

from expertwire.engine.frontend.api import RequestOptions, Update
from expertwire.engine.frontend.frontend import Frontend
from expertwire.engine.frontend.open_requests import OpenRequest
from expertwire.scheduler.sampling_params import SamplingParams
from expertwire.strategies.cascade import MAX_FEATURE_CHARS, Cascade
from expertwire.strategies.cascade_log import DecisionRecord, Leg
from expertwire.strategies.verifiers import DEFAULT_POLICY, Verifier, VerifierPolicy

KEPT = "kept"  # the reason of a request that the small model answers
_MAX_FEATURE_TOKENS = MAX_FEATURE_CHARS // 4  # of a prompt without text


@dataclass(frozen=True, kw_only=True)
class CascadePolicy:
    """A policy with its verifier.

    Args:
        cascade: the policy.
        verifier: scores the outputs of the small model, and of both in the random slice. None: there is none.
        verifier_policy: limits of the verifier. A failure sends the request to the large model, whatever `on_failure` is.

    Raises:
        ValueError: the policy has a threshold for a verifier, and there is none.
    """

    cascade: Cascade
    verifier: Verifier | None = None
    verifier_policy: VerifierPolicy = DEFAULT_POLICY

    def __post_init__(self) -> None:
        if self.cascade.verifier_threshold is not None and self.verifier is None:
            raise ValueError(
                f"verifier must be given with verifier_threshold {self.cascade.verifier_threshold}, got None"
            )


@dataclass(kw_only=True)
class CascadeLeg:
    """One model's part in a request.

    Attributes:
        frontend: of the model.
        tokens: the prompt, which `Frontend.encode` returned for these parameters.
        params: sampling parameters; `n` must be 1.
        options: options for the scheduler.
        numbers: the frontend's ids of its requests: one, or where it starts from a draft another one before that checks it.
        number: the last of them; None: it has not been submitted.
        request: the request, when it has had news.
        num_tokens: output tokens that have come.
        draft: the other model's output that it was given.
        num_accepted: tokens of it that its output begins with; None while they are not known.
        complete: whether it has ended by itself.
        outcome: the verifier's score of its complete output.
    """

    frontend: Frontend
    tokens: np.ndarray
    params: SamplingParams
    options: RequestOptions
    numbers: list[int] = field(default_factory=list)
    request: OpenRequest | None = None
    num_tokens: int = 0
    draft: list[int] = field(default_factory=list)
    num_accepted: int | None = None
    complete: bool = False
    outcome: float | None = None
    updates: list[Update] = field(default_factory=list)  # held back
    begin_s: float = 0.0
    end_s: float | None = None

    @property
    def number(self) -> int | None:
        """See above."""
        return self.numbers[-1] if self.numbers else None

    @property
    def checks_draft(self) -> bool:
        """True if it computes the log-probabilities of a draft."""
        return bool(self.draft) and self.num_accepted is None

    @property
    def is_running(self) -> bool:
        """True if it has been submitted and has not ended."""
        return self.number is not None and self.end_s is None

    def prompt_text(self) -> str:
        """Return the text of the prompt, of a very long one its last part; "" without a tokenizer."""
        tokenizer = self.frontend.tokenizer
        return "" if tokenizer is None else tokenizer.decode(self.tokens[-_MAX_FEATURE_TOKENS:].tolist())

    def record(self, model: str, token_cost: float) -> Leg:
        """Return what the log says of it; the cost of a token includes those of the prompt and of the draft."""
        return Leg(
            model=model,
            tokens=self.num_tokens,
            complete=self.complete,
            prompt_tokens=len(self.tokens),
            draft_tokens=len(self.draft),
            accepted_tokens=self.num_accepted or 0,
            cost=token_cost * (len(self.tokens) + len(self.draft) + self.num_tokens),
            latency_s=(self.end_s or time.monotonic()) - self.begin_s,
        )

    def end(self) -> None:
        """Take note that it has ended."""
        self.end_s = time.monotonic() if self.end_s is None else self.end_s


def check_cascade_params(params: SamplingParams) -> None:
    """Raise ValueError if a request to a cascade cannot have these sampling parameters."""
    if params.n != 1:
        raise ValueError(f"n must be 1 for a cascade, got {params.n}")


def counts_of(record: DecisionRecord) -> dict[str, int]:
    """Return what a request that was answered adds to the statistics of the small model's engine."""
    tokens = {leg.model: leg.tokens for leg in record.legs}
    small, large = record.candidates
    return {
        "cascade_requests": 1,
        "cascade_kept" if record.reason == KEPT else f"cascade_escalated_{record.reason}": 1,
        "cascade_random_slice": int(record.in_random_slice),
        "cascade_tokens_small": tokens.get(small, 0),
        "cascade_tokens_large": tokens.get(large, 0),
        "cascade_tokens_draft": sum(leg.draft_tokens for leg in record.legs),
        "cascade_tokens_accepted": sum(leg.accepted_tokens for leg in record.legs),
        "cascade_tokens_verifier": record.verifier_tokens,
    }
