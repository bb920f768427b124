"""Shares with 95 % intervals, and the choice of a strategy for each bin on one fold of the problems for the other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Z = 1.96


@dataclass(frozen=True)
class Runs:
    """The results of a strategy on the problems of a bin, in their order.

    Attributes:
        right: whether the problem was solved.
        tokens: output tokens of all branches.
        steps: decode steps from the first token to the result.
    """

    right: NDArray[np.bool_]
    tokens: NDArray[np.float64]
    steps: NDArray[np.float64]

    def fold(self, remainder: int) -> Runs:
        """Return every second problem."""
        return Runs(self.right[remainder::2], self.tokens[remainder::2], self.steps[remainder::2])

    def cut(self, tokens: float) -> Runs:
        """Return what the same branches give if a group ends at a budget: it is wrong if its result comes later."""
        within = self.tokens <= tokens
        share = np.minimum(1.0, tokens / self.tokens)
        return Runs(self.right & within, np.minimum(self.tokens, tokens), self.steps * share)

    @staticmethod
    def joined(runs: Sequence[Runs]) -> Runs:
        """Return the problems of several bins as one."""
        return Runs(*(np.concatenate([getattr(each, name) for each in runs]) for name in ("right", "tokens", "steps")))


def interval(right: NDArray[np.bool_]) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share."""
    n, p = len(right), float(right.mean())
    centre, half = p + Z * Z / (2 * n), Z * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    return (centre - half) / (1 + Z * Z / n), (centre + half) / (1 + Z * Z / n)


def paired_interval(ours: NDArray[np.bool_], theirs: NDArray[np.bool_]) -> tuple[float, float]:
    """Return the 95 % interval of the difference of two shares over the same problems (normal approximation)."""
    difference = ours.astype(float) - theirs.astype(float)
    half = Z * float(difference.std()) / math.sqrt(len(difference))
    return float(difference.mean()) - half, float(difference.mean()) + half


Table = Mapping[str, Mapping[str, Runs]]  # by bin, by strategy


def choose(table: Table, price: float) -> dict[str, str]:
    """Return each bin's best strategy, where a right answer is worth 1 and a token costs `price`."""
    return {
        name: max(runs, key=lambda each: float(runs[each].right.mean()) - price * float(runs[each].tokens.mean()))
        for name, runs in table.items()
    }


def choose_for(table: Table, accuracy: float) -> dict[str, str]:
    """Return the choice with the fewest tokens whose accuracy over all bins together is at least `accuracy`.

    The exact one: bin after bin, for each number of right answers the fewest tokens that give it.
    """
    fewest, chosen = {0: 0.0}, {0: dict[str, str]()}  # tokens and choice by right answers in the bins so far
    for name, runs in table.items():
        more: dict[int, float] = {}
        with_bin: dict[int, dict[str, str]] = {}
        figures = [(each, int(run.right.sum()), float(run.tokens.sum())) for each, run in runs.items()]
        for right, tokens in fewest.items():
            for each, right_here, tokens_here in figures:
                total = right + right_here
                if tokens + tokens_here < more.get(total, math.inf):
                    more[total], with_bin[total] = tokens + tokens_here, {**chosen[right], name: each}
        fewest, chosen = more, with_bin
    needed = accuracy * sum(len(next(iter(runs.values())).right) for runs in table.values())
    enough = [right for right in fewest if right >= needed - 1e-6] or [max(fewest)]
    return chosen[min(enough, key=fewest.__getitem__)]


def pooled(table: Table, chosen: Mapping[str, str]) -> Runs:
    """Return all problems under the strategy chosen for their bin."""
    return Runs.joined([table[name][chosen[name]] for name in table])


def fold_of(table: Table, remainder: int) -> dict[str, dict[str, Runs]]:
    """Return one half of the problems of every bin."""
    return {name: {each: run.fold(remainder) for each, run in runs.items()} for name, runs in table.items()}


def out_of_sample(table: Table, baseline: str) -> tuple[Runs, Runs, list[dict[str, str]]]:
    """Choose on one fold what reaches the baseline's accuracy there, and take what it gives on the other; both ways round.

    Returns:
        What was chosen and the baseline, over all problems in the same order, and the two choices.
    """
    ours, theirs, choices = [], [], []
    for remainder in (0, 1):
        seen, unseen = fold_of(table, 1 - remainder), fold_of(table, remainder)
        always = dict.fromkeys(table, baseline)
        chosen = choose_for(seen, float(pooled(seen, always).right.mean()))
        ours.append(pooled(unseen, chosen))
        theirs.append(pooled(unseen, always))
        choices.append(chosen)
    return Runs.joined(ours), Runs.joined(theirs), choices


def curve(table: Table, prices: Sequence[float]) -> list[tuple[float, float]]:
    """Return (tokens, accuracy) of the out-of-sample choices at each price of a token."""
    points = []
    for price in prices:
        runs = [pooled(fold_of(table, r), choose(fold_of(table, 1 - r), price)) for r in (0, 1)]
        joined = Runs.joined(runs)
        points.append((float(joined.tokens.mean()), float(joined.right.mean())))
    return points
