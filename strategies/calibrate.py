"""Calibration of `compute_optimal`: a table from how strategies did, chosen on one fold of prompts and reported on the other."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from expertwire.strategies.checks import require_integer, require_number
from expertwire.strategies.statistics import Interval, bootstrap, wilson


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One strategy on one prompt.

    Attributes:
        prompt: its id.
        signal: the probe's signal of the prompt; the same in all its trials. Higher is easier.
        strategy: name.
        accuracy: how right the result was, from 0 to 1.
        tokens: tokens it took, with those of the probe where it cannot use them.
    """

    prompt: str
    signal: float
    strategy: str
    accuracy: float
    tokens: float


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A row of the table, with its estimates from the fold on which it was not chosen.

    Attributes:
        least: least signal; None in the last row.
        strategy: name.
        accuracy, tokens: means over the bin's prompts.
        num_prompts: of the bin, in the fold of the report.
    """

    least: float | None
    strategy: str
    accuracy: Interval
    tokens: float
    num_prompts: int


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A table, and how it and the baseline did on prompts on which it was not chosen.

    Attributes:
        table: rows from easy to hard.
        accuracy, baseline_accuracy: means over all prompts.
        tokens, baseline_tokens: means over all prompts.
        token_ratio: tokens over the baseline's.
        accuracy_gap: accuracy less the baseline's, on the same prompts.
        num_prompts: in the fold of the report.
    """

    table: tuple[Choice, ...]
    accuracy: Interval
    baseline_accuracy: Interval
    tokens: float
    baseline_tokens: float
    token_ratio: Interval
    accuracy_gap: Interval
    num_prompts: int


def calibrate(
    trials: Iterable[Trial], *, baseline: str, num_bins: int = 3, tolerance: float = 0.0, seed: int = 0
) -> Calibration:
    """Return the table that takes fewest tokens for the baseline's accuracy.

    Prompts are divided into two folds by a hash. On the first one, bins are quantiles of the signal, and strategies are chosen
    that maximise accuracy - price x tokens in each bin; the price of a token is the highest at which the accuracy over all bins
    is still at least the baseline's less `tolerance`. All figures are of the second fold.

    Args:
        trials: every strategy on every prompt, once.
        baseline: the strategy to compare with.
        num_bins: bins of equal numbers of prompts; equal signals stay together.
        tolerance: accuracy that may be lost.
        seed: of the folds and of the bootstrap.

    Raises:
        ValueError: names the argument and what it allows.
    """
    require_integer("num_bins", num_bins, minimum=1)
    require_number("tolerance", tolerance, minimum=0, maximum=1)
    table = _Outcomes.of(list(trials), baseline)
    in_report = np.array([_fold(prompt, seed) for prompt in table.prompts])
    if in_report.all() or not in_report.any():
        raise ValueError(f"trials must have prompts in both folds, got {len(table.prompts)} prompts in one")
    chosen_on, report_on = table.part(~in_report), table.part(in_report)
    bounds = _bounds(chosen_on.signals, num_bins)
    choices = _choose(chosen_on, bounds, chosen_on.accuracy[:, table.column(baseline)].mean() - tolerance)
    return _report(report_on, bounds, choices, table.column(baseline), seed)


@dataclass(frozen=True)
class _Outcomes:
    """Trials as arrays: a row a prompt, a column a strategy."""

    prompts: tuple[str, ...]
    strategies: tuple[str, ...]
    signals: np.ndarray
    accuracy: np.ndarray
    tokens: np.ndarray

    @staticmethod
    def of(trials: Sequence[Trial], baseline: str) -> _Outcomes:
        prompts = tuple(dict.fromkeys(trial.prompt for trial in trials))
        strategies = tuple(dict.fromkeys(trial.strategy for trial in trials))
        if baseline not in strategies:
            raise ValueError(f"baseline must be one of {', '.join(strategies) or 'the trials'}, got {baseline!r}")
        cells: Mapping[tuple[str, str], Trial] = {(trial.prompt, trial.strategy): trial for trial in trials}
        if len(cells) != len(trials) or len(trials) != len(prompts) * len(strategies):
            raise ValueError(
                f"trials must have each of {len(strategies)} strategies once for each of {len(prompts)} prompts, "
                f"got {len(trials)}"
            )
        for trial in trials:
            require_number("trials.accuracy", trial.accuracy, minimum=0, maximum=1)
            require_number("trials.tokens", trial.tokens, minimum=0)
            require_number("trials.signal", trial.signal)
            if trial.signal != cells[trial.prompt, baseline].signal:
                raise ValueError(f"trials.signal must be one value for a prompt, got two for {trial.prompt!r}")
        return _Outcomes(
            prompts,
            strategies,
            np.array([cells[prompt, baseline].signal for prompt in prompts]),
            np.array([[cells[prompt, strategy].accuracy for strategy in strategies] for prompt in prompts]),
            np.array([[cells[prompt, strategy].tokens for strategy in strategies] for prompt in prompts]),
        )

    def part(self, rows: np.ndarray) -> _Outcomes:
        prompts = tuple(prompt for prompt, kept in zip(self.prompts, rows, strict=True) if kept)
        return _Outcomes(prompts, self.strategies, self.signals[rows], self.accuracy[rows], self.tokens[rows])

    def column(self, strategy: str) -> int:
        return self.strategies.index(strategy)


def _fold(prompt: str, seed: int) -> bool:
    return bool(hashlib.sha256(f"{seed}\0{prompt}".encode()).digest()[0] & 1)


def _bounds(signals: np.ndarray, num_bins: int) -> list[float]:
    """Return the least signals of all bins but the last, from easy to hard."""
    ranked = np.sort(signals)[::-1]
    ends = [len(ranked) * number // num_bins for number in range(1, num_bins)]
    bounds = sorted({float(ranked[end - 1]) for end in ends if end}, reverse=True)
    return [bound for bound in bounds if bound > ranked[-1]]  # else nothing would be left for the last bin


def _bins(signals: np.ndarray, bounds: Sequence[float]) -> np.ndarray:
    """Return each prompt's bin; 0 is the easiest."""
    return np.array([sum(signal < bound for bound in bounds) for signal in signals], dtype=np.int64)


def _choose(outcomes: _Outcomes, bounds: Sequence[float], target: float) -> list[int]:
    """Return each bin's column: the choice of fewest tokens, along rising prices, whose accuracy reaches the target."""
    bins = _bins(outcomes.signals, bounds)
    masks = [bins == number for number in range(len(bounds) + 1)]
    assert all(mask.any() for mask in masks), (bounds, outcomes.signals)
    accuracy = np.array([outcomes.accuracy[mask].mean(axis=0) for mask in masks])
    tokens = np.array([outcomes.tokens[mask].mean(axis=0) for mask in masks])
    shares = np.array([mask.mean() for mask in masks])
    best: tuple[float, list[int]] | None = None
    for price in _prices(accuracy, tokens):
        # Among equals the one of fewest tokens.
        values = np.round(accuracy - price * tokens, 12)
        columns = [min(range(values.shape[1]), key=lambda c: (-values[b, c], tokens[b, c])) for b in range(len(masks))]
        rows = np.arange(len(masks))
        reached = float(shares @ accuracy[rows, columns])
        spent = float(shares @ tokens[rows, columns])
        if reached >= target - 1e-12 and (best is None or spent < best[0]):
            best = (spent, columns)
    assert best is not None, "at price 0 each bin has its most accurate strategy"
    return best[1]


def _prices(accuracy: np.ndarray, tokens: np.ndarray) -> list[float]:
    """Return a price between each two prices at which a choice changes, and zero."""
    slopes = {0.0}
    for row_accuracy, row_tokens in zip(accuracy, tokens, strict=True):
        gain = row_accuracy[:, None] - row_accuracy[None, :]
        cost = row_tokens[:, None] - row_tokens[None, :]
        slopes |= set((gain[(cost > 0) & (gain > 0)] / cost[(cost > 0) & (gain > 0)]).tolist())
    ranked = sorted(slopes)
    return [0.0, *((low + high) / 2 for low, high in pairwise(ranked)), ranked[-1] * 2 + 1.0]


def _report(
    outcomes: _Outcomes, bounds: Sequence[float], columns: Sequence[int], baseline: int, seed: int
) -> Calibration:
    bins = _bins(outcomes.signals, bounds)
    rows = np.arange(len(bins))
    accuracy, tokens = (table[rows, np.array(columns)[bins]] for table in (outcomes.accuracy, outcomes.tokens))
    base_accuracy, base_tokens = outcomes.accuracy[:, baseline], outcomes.tokens[:, baseline]
    choices = []
    for number, column in enumerate(columns):
        inside = bins == number
        count = int(inside.sum())
        choices.append(
            Choice(
                least=bounds[number] if number < len(bounds) else None,
                strategy=outcomes.strategies[column],
                accuracy=wilson(float(accuracy[inside].mean()) if count else 0.0, count),
                tokens=float(tokens[inside].mean()) if count else 0.0,
                num_prompts=count,
            )
        )
    return Calibration(
        table=tuple(choices),
        accuracy=wilson(float(accuracy.mean()), len(rows)),
        baseline_accuracy=wilson(float(base_accuracy.mean()), len(rows)),
        tokens=float(tokens.mean()),
        baseline_tokens=float(base_tokens.mean()),
        token_ratio=bootstrap(lambda i: float(tokens[i].sum() / base_tokens[i].sum()), len(rows), seed=seed),
        accuracy_gap=bootstrap(lambda i: float((accuracy[i] - base_accuracy[i]).mean()), len(rows), seed=seed),
        num_prompts=len(rows),
    )
