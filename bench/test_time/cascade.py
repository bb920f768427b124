"""A cascade from the small tier to the large one, out of sample: a router before, confidence after, an abort in mid-generation.

Both tiers' greedy answers and log-probabilities to the same problems are given; every policy is evaluated on them. The cost of a
leg is its active parameters times the tokens that it processed, those of the prompt included, in units of the large tier alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from expertwire.bench.test_time.sources import TOKEN_IDS, Bank
from expertwire.bench.test_time.statistics import interval
from expertwire.deploy.demo_task import check

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
NEVER = np.inf


@dataclass(frozen=True)
class Legs:
    """Both tiers' answers to the same problems, in any order.

    Attributes:
        size: numbers to add, of each problem.
        prompt: tokens of the prompt.
        small, large: output tokens.
        small_right, large_right: whether the answer is right.
        signals: of the small tier's tokens, by name: [problems, positions], low is bad; infinite where there is nothing to judge.
        ratio: active parameters of the small tier over those of the large one.
    """

    size: Floats
    prompt: Floats
    small: Floats
    large: Floats
    small_right: Bools
    large_right: Bools
    signals: dict[str, Floats]
    ratio: float

    def fold(self, remainder: int) -> Legs:
        """Return every second problem."""
        each = slice(remainder, None, 2)
        return Legs(
            size=self.size[each],
            prompt=self.prompt[each],
            small=self.small[each],
            large=self.large[each],
            small_right=self.small_right[each],
            large_right=self.large_right[each],
            signals={name: signal[each] for name, signal in self.signals.items()},
            ratio=self.ratio,
        )


@dataclass(frozen=True)
class Result:
    """The result of a policy: for each problem whether it is right, its cost and whether it was escalated."""

    right: Bools
    cost: Floats
    escalated: Bools


def read_legs(small: Sequence[Bank], large: Sequence[Bank], ratio: float) -> Legs:
    """Return the greedy branches of the same problems' banks."""
    longest = max(bank.tokens.shape[2] for bank in small)
    columns: dict[str, list[NDArray[np.generic]]] = {}

    def add(name: str, values: object) -> None:
        columns.setdefault(name, []).append(np.asarray(values))

    for few, many in zip(small, large, strict=True):
        assert few.asked == many.asked, "banks of different problems"
        add("size", [float(len(one.problem.numbers)) for one in few.asked])
        add("prompt", [float(len(one.problem.prompt.split())) for one in few.asked])
        for name, bank in (("small", few), ("large", many)):
            add(name, bank.lengths(-1).astype(float))
            add(name + "_right", [check(a.problem, text) for a, text in zip(bank.asked, bank.texts(-1), strict=True)])
        tokens, logprobs = few.tokens[:, -1], few.logprobs[:, -1].astype(float)
        room = ((0, 0), (0, longest - tokens.shape[1]))
        there = np.arange(tokens.shape[1]) < few.lengths(-1)[:, None]
        results = there & (np.roll(tokens, 1, axis=1) == TOKEN_IDS["="])
        windows = np.stack([np.roll(logprobs, shift, axis=1) for shift in range(4)]).mean(0)
        windows[:, :3] = NEVER
        for name, signal, judged in (
            ("token", logprobs, there),
            ("window of 4", windows, there),
            ("results", logprobs, results),
        ):
            add("signal " + name, np.pad(np.where(judged, signal, NEVER), room, constant_values=NEVER))
    arrays = {name: np.concatenate(parts) for name, parts in columns.items()}
    signals = {name.removeprefix("signal "): arrays.pop(name) for name in list(arrays) if name.startswith("signal ")}
    return Legs(**arrays, signals=signals, ratio=ratio)


def run(legs: Legs, *, direct: Bools, signal: str | None, threshold: float, abort: bool) -> Result:
    """Return the result of a policy.

    Args:
        legs: answers of both tiers.
        direct: problems that go to the large tier at once.
        signal: a problem is escalated where this is below `threshold` at some token; None: never.
        threshold: of the signal.
        abort: whether the small tier stops at that token, instead of at its end.
    """
    low = legs.signals[signal] < threshold if signal is not None else np.zeros((len(legs.small), 1), bool)
    doubtful = low.any(-1) & ~direct
    used = np.where(doubtful & abort, low.argmax(-1) + 1, legs.small)
    escalated = direct | doubtful
    small_cost = np.where(direct, 0.0, legs.prompt + used) * legs.ratio
    cost = small_cost + np.where(escalated, legs.prompt + legs.large, 0.0)
    cost = cost / (legs.prompt + legs.large).mean()
    return Result(np.where(escalated, legs.large_right, legs.small_right).astype(bool), cost, escalated)


def fit_router(legs: Legs, *, rounds: int = 500) -> Floats:
    """Return the weights of a logistic model of "the small tier is right" on features of the prompt."""
    x, y = features(legs), legs.small_right.astype(float)
    weights = np.zeros(x.shape[1])
    for _ in range(rounds):
        p = 1 / (1 + np.exp(-x @ weights))
        hessian = (x * (p * (1 - p))[:, None]).T @ x + 1e-3 * np.eye(x.shape[1])
        step = np.linalg.solve(hessian, x.T @ (y - p) - 1e-3 * weights)
        weights += step
        if np.abs(step).max() < 1e-9:
            break
    return weights


def features(legs: Legs) -> Floats:
    """Return a constant, the size and its square, centred [problems, 3]."""
    size = legs.size - 5
    return np.stack((np.ones_like(size), size, size * size), axis=1)


Policy = tuple[float, str | None, float, bool]  # least probability of the router, signal, threshold, abort


def evaluate(legs: Legs, policy: Policy, weights: Floats) -> Result:
    """Return the result of a policy, with a router of these weights."""
    least, signal, threshold, abort = policy
    p = 1 / (1 + np.exp(-features(legs) @ weights))
    return run(legs, direct=p < least, signal=signal, threshold=threshold, abort=abort)


def grid(mechanism: str, legs: Legs) -> list[Policy]:
    """Return the policies of a mechanism that are tried."""
    thresholds = [-float(t) for t in np.geomspace(0.005, 8, 40)]
    routes = [0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.01]
    match mechanism:
        case "router":
            return [(least, None, 0.0, False) for least in routes]
        case "confidence at the end":
            return [(0.0, signal, t, False) for signal in legs.signals for t in thresholds]
        case "abort":
            return [(0.0, signal, t, True) for signal in legs.signals for t in thresholds]
        case "router and abort":
            return [(least, signal, t, True) for least in routes for signal in legs.signals for t in thresholds]
    raise AssertionError(f"mechanism {mechanism!r}")


MECHANISMS = ("router", "confidence at the end", "abort", "router and abort")


def out_of_sample(legs: Legs, mechanism: str, shortfall: float) -> dict[str, object]:
    """Choose on one fold the cheapest policy within `shortfall` of the large tier, and report it on the other; both ways."""
    results, chosen = [], []
    for remainder in (0, 1):
        seen, unseen = legs.fold(1 - remainder), legs.fold(remainder)
        weights = fit_router(seen)
        tried = [(evaluate(seen, policy, weights), policy) for policy in grid(mechanism, legs)]
        target = float(seen.large_right.mean()) - shortfall
        good = [(float(r.cost.mean()), i) for i, (r, _) in enumerate(tried) if r.right.mean() >= target]
        policy = tried[min(good)[1]][1]
        results.append(evaluate(unseen, policy, weights))
        chosen.append({"least_probability": policy[0], "signal": policy[1], "threshold": policy[2], "abort": policy[3]})
    right, cost, escalated = (np.concatenate([getattr(r, f) for r in results]) for f in ("right", "cost", "escalated"))
    return {
        "mechanism": mechanism,
        "accuracy": float(right.mean()),
        "interval": interval(right),
        "cost": float(cost.mean()),
        "escalated": float(escalated.mean()),
        "policies": chosen,
    }


def pareto(legs: Legs, mechanism: str) -> list[tuple[float, float]]:
    """Return (cost, accuracy) out of sample of the policies that are on the front of the other fold."""
    points: list[tuple[float, float]] = []
    for remainder in (0, 1):
        seen, unseen = legs.fold(1 - remainder), legs.fold(remainder)
        weights = fit_router(seen)
        tried = sorted(
            ((r := evaluate(seen, policy, weights)).cost.mean(), -r.right.mean(), i, policy)
            for i, policy in enumerate(grid(mechanism, legs))
        )
        best = -1.0
        for _, negative, _, policy in tried:
            if -negative > best:
                best = -negative
                result = evaluate(unseen, policy, weights)
                points.append((float(result.cost.mean()), float(result.right.mean())))
    return sorted(points)
