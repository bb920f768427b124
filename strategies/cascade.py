"""The policy of a cascade: which requests a small model answers, and which go to the large one.

Three mechanisms, in this order; each has a score and a threshold, and a score below its threshold escalates:

    router       before generation: a logistic model of the probability that the small model is right
    confidence   during generation: the lowest mean log-probability of `window` consecutive tokens so far; the small model is
                 aborted at the first window below the threshold
    verifier     after generation: a verifier's score of the small model's output

A small random share of requests, the *random slice*, runs both models to their ends, whatever the policy says, so that any
other thresholds can be evaluated from the log (`strategies.cascade_log`).
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from expertwire.strategies.checks import require_integer, require_number, require_string

MECHANISMS = ("router", "confidence", "verifier")
MAX_FEATURE_CHARS = 65_536  # of a prompt that its features look at


def prompt_features(text: str, num_tokens: int) -> dict[str, float]:
    """Return the features of a prompt that cost nothing to compute: its length, numbers, digits, lines and operators.

    Of a text of more than `MAX_FEATURE_CHARS` characters the last ones count.
    """
    text = text[-MAX_FEATURE_CHARS:]
    numbers = re.findall(r"[0-9]+", text)
    return {
        "log_tokens": math.log1p(num_tokens),
        "numbers": float(len(numbers)),
        "digits": float(sum(map(len, numbers))),
        "lines": float(text.count("\n")),
        "operators": float(sum(map(text.count, "+-*/=<>^"))),
    }


@dataclass(frozen=True)
class Router:
    """A logistic model of the probability that the small model is right.

    Attributes:
        features: names.
        means, scales: with which each is normalised.
        weights: of the normalised features.
        bias: added to them.
    """

    features: tuple[str, ...]
    means: tuple[float, ...]
    scales: tuple[float, ...]
    weights: tuple[float, ...]
    bias: float

    def __post_init__(self) -> None:
        lengths = {len(self.features), len(self.means), len(self.scales), len(self.weights)}
        if len(lengths) > 1:
            raise ValueError(f"router must have a mean, a scale and a weight for each of {self.features}, got {self}")
        for name in self.features:
            require_string("router.features", name)
        for field in ("means", "scales", "weights"):
            for value in getattr(self, field):
                require_number(f"router.{field}", value)
        for value in self.scales:
            require_number("router.scales", value, above=0)
        require_number("router.bias", self.bias)

    def probability(self, features: Mapping[str, float]) -> float:
        """Return the probability that the small model is right.

        Raises:
            ValueError: a feature is missing.
        """
        missing = [name for name in self.features if name not in features]
        if missing:
            raise ValueError(f"features must have {', '.join(self.features)}; {', '.join(missing)} is missing")
        rows = zip(self.features, self.means, self.scales, self.weights, strict=True)
        logit = self.bias + sum(weight * (features[name] - mean) / scale for name, mean, scale, weight in rows)
        return 0.5 * (1 + math.tanh(logit / 2))


def fit_router(
    features: Sequence[Mapping[str, float]], right: Sequence[bool], *, ridge: float = 1.0, max_iterations: int = 100
) -> Router:
    """Return the router that fits best, by Newton's method on the penalised likelihood (iteratively reweighted least squares).

    Args:
        features: of each prompt, all with the same names.
        right: whether the small model was right.
        ridge: penalty of the squared weights of the normalised features; the bias has none.
        max_iterations: most Newton steps; they end when no weight moves by more than 1e-10.

    Raises:
        ValueError: names the argument and what it allows.
    """
    if not features or len(features) != len(right):
        raise ValueError(
            f"right must have a value for each of at least one prompt, got {len(right)} for {len(features)}"
        )
    require_number("ridge", ridge, above=0)
    names = tuple(features[0])
    if any(set(row) != set(names) for row in features):
        raise ValueError(f"features must have the same names for all prompts: {', '.join(names)}")
    raw = np.array([[row[name] for name in names] for row in features], dtype=np.float64).reshape(
        len(features), len(names)
    )
    if not np.isfinite(raw).all():
        raise ValueError("features must be finite numbers")
    means, scales = raw.mean(axis=0), raw.std(axis=0)
    scales = np.where(scales > 0, scales, 1.0)
    rows = np.column_stack([(raw - means) / scales, np.ones(len(raw))])
    # The bias has a tiny penalty, without which labels that are all equal would let it grow without end.
    penalty = np.diag([ridge] * len(names) + [1e-3])
    target, solution = np.array(right, dtype=np.float64), np.zeros(len(names) + 1)
    for _ in range(max_iterations):
        chance = 0.5 * (1 + np.tanh(rows @ solution / 2))
        gradient = rows.T @ (target - chance) - penalty @ solution
        hessian = (rows * (chance * (1 - chance))[:, None]).T @ rows + penalty
        step = np.linalg.solve(hessian, gradient)
        # Far from the optimum a whole step may overshoot.
        solution = solution + step / max(1.0, float(np.abs(step).max()) / 5)
        if np.abs(step).max() < 1e-10:
            break
    *weights, bias = solution.tolist()
    return Router(names, tuple(means.tolist()), tuple(scales.tolist()), tuple(weights), bias)


class Confidence:
    """The mean log-probabilities of consecutive tokens of an output that grows.

    Attributes:
        minima: each new lowest mean of `window` tokens: the number of tokens it came after, and itself. From these the place
            where any threshold would have aborted is known.
    """

    def __init__(self, window: int) -> None:
        self.minima: list[tuple[int, float]] = []
        self._recent: deque[float] = deque(maxlen=window)
        self._num_tokens = 0

    def push(self, logprob: float) -> None:
        """Add the next token's log-probability."""
        self._recent.append(logprob)
        self._num_tokens += 1
        if len(self._recent) == self._recent.maxlen:
            mean = sum(self._recent) / len(self._recent)
            if not self.minima or mean < self.minima[-1][1]:
                self.minima.append((self._num_tokens, mean))


def confidence_minima(logprobs: Sequence[float], window: int) -> list[tuple[int, float]]:
    """Return `Confidence.minima` of a whole output. Nothing before `window` tokens."""
    confidence = Confidence(window)
    for logprob in logprobs:
        confidence.push(logprob)
    return confidence.minima


def first_below(minima: Sequence[tuple[int, float]], threshold: float) -> int | None:
    """Return the number of tokens after which the confidence fell below a threshold; None if it did not."""
    return next((num_tokens for num_tokens, value in minima if value < threshold), None)


@dataclass(frozen=True, kw_only=True)
class Cascade:
    """A policy of two models. Mechanisms whose threshold is None are off.

    Args:
        small, large: names of the models.
        version: of the policy, for the log.
        router: gives the router's score; needed with its threshold.
        router_threshold: least probability that the small model is right.
        confidence_threshold: least confidence, as a mean log-probability per token (at most 0).
        window: tokens of a window of confidence.
        verifier: name of the verifier; needed with its threshold on a server.
        verifier_threshold: least score of the small model's output.
        random_share: share of requests in the random slice.
        draft_tolerance: where the tokenizers agree, the large model starts from what the small one has written, up to the first
            token whose log-probability it finds this much below its most probable token's; 0: up to the first that it would
            not choose itself. None: it starts from the prompt, as it does in the random slice.
        small_token_cost, large_token_cost: of a token of each model, those of the prompt included, in any unit, for instance its
            active parameters.

    Raises:
        ValueError: names the field and what it allows.
    """

    small: str
    large: str
    version: str
    router: Router | None = None
    router_threshold: float | None = None
    confidence_threshold: float | None = None
    window: int = 1
    verifier: str | None = None
    verifier_threshold: float | None = None
    random_share: float = 0.02
    draft_tolerance: float | None = None
    small_token_cost: float = 1.0
    large_token_cost: float = 1.0

    def __post_init__(self) -> None:
        for field in ("small", "large", "version"):
            require_string(f"cascade.{field}", getattr(self, field))
        if self.small == self.large:
            raise ValueError(f"cascade.large must be another model than small, got {self.large!r}")
        if self.router_threshold is not None:
            require_number("cascade.router_threshold", self.router_threshold, minimum=0, maximum=1)
            if self.router is None:
                raise ValueError("cascade.router must be given with router_threshold, got None")
        if self.confidence_threshold is not None:
            require_number("cascade.confidence_threshold", self.confidence_threshold, maximum=0)
        if self.verifier_threshold is not None:
            require_number("cascade.verifier_threshold", self.verifier_threshold)
        if self.verifier is not None:
            require_string("cascade.verifier", self.verifier)
        if self.draft_tolerance is not None:
            require_number("cascade.draft_tolerance", self.draft_tolerance, minimum=0)
        for field in ("small_token_cost", "large_token_cost"):
            require_number(f"cascade.{field}", getattr(self, field), minimum=0)
        require_integer("cascade.window", self.window, minimum=1)
        require_number("cascade.random_share", self.random_share, minimum=0, maximum=1)

    @property
    def thresholds(self) -> dict[str, float]:
        """The thresholds of the mechanisms that are on."""
        values = {name: getattr(self, f"{name}_threshold") for name in MECHANISMS}
        return {name: value for name, value in values.items() if value is not None}

    def in_random_slice(self, request_id: str) -> bool:
        """Return whether a request runs both models: a function of its id and the version, so that a log can be checked."""
        digest = hashlib.sha256(f"{self.version}\0{request_id}".encode()).digest()
        return int.from_bytes(digest[:8]) < self.random_share * 2**64

    def routes_to_large(self, features: Mapping[str, float]) -> bool:
        """Return whether the small model is not even asked."""
        if self.router_threshold is None:
            return False
        assert self.router is not None
        return self.router.probability(features) < self.router_threshold

    def doubts(self, minima: Sequence[tuple[int, float]]) -> bool:
        """Return whether the small model's output with these minima is aborted. To be asked after each token."""
        return self.confidence_threshold is not None and first_below(minima[-1:], self.confidence_threshold) is not None

    def rejects(self, score: float | None) -> bool:
        """Return whether the verifier's score sends a complete output to the large model; a verifier that failed does."""
        return self.verifier_threshold is not None and (score is None or score < self.verifier_threshold)
