"""The parts of a request of a cascade: the policy with its verifier, and what each model does."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np

from expertwire.engine.frontend.api import RequestOptions, Update
from expertwire.engine.frontend.frontend import Frontend
from expertwire.engine.frontend.open_requests import OpenRequest
from expertwire.scheduler.sampling_params import SamplingParams
from expertwire.strategies.cascade import Cascade
from expertwire.strategies.verifiers import DEFAULT_POLICY, Verifier, VerifierPolicy


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
        number: the frontend's id of the request; None: it has not been submitted.
        request: the request, when it has had news.
        num_tokens: output tokens that have come.
        complete: whether it has ended by itself.
        outcome: the verifier's score of its complete output.
    """

    frontend: Frontend
    tokens: np.ndarray
    params: SamplingParams
    options: RequestOptions
    number: int | None = None
    request: OpenRequest | None = None
    num_tokens: int = 0
    complete: bool = False
    outcome: float | None = None
    updates: list[Update] = field(default_factory=list)  # held back
    begin_s: float = 0.0
    end_s: float | None = None

    @property
    def is_running(self) -> bool:
        """True if it has been submitted and has not ended."""
        return self.number is not None and self.end_s is None

    def end(self) -> None:
        """Take note that it has ended."""
        self.end_s = time.monotonic() if self.end_s is None else self.end_s
