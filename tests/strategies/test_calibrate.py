"""Calibration: bins, choices on one fold, figures from the other."""

from __future__ import annotations

import random

import pytest

from expertwire.strategies.calibrate import Trial, calibrate
from expertwire.strategies.statistics import bootstrap, wilson

# Accuracy and tokens by strategy in easy, middle and hard prompts.
TRUTH = {
    "greedy": ((0.98, 20), (0.5, 40), (0.1, 60)),
    "vote": ((0.98, 160), (0.8, 320), (0.1, 480)),
    "search": ((0.98, 160), (0.8, 640), (0.6, 480)),
    "best_of_16": ((0.98, 320), (0.8, 640), (0.6, 960)),
}


def trials(count: int = 1500, seed: int = 0) -> list[Trial]:
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        level = number % 3
        signal = (0.9, 0.6, 0.3)[level] + rng.uniform(-0.05, 0.05)
        luck = rng.random()  # the same for all strategies, so that a better one is never worse on a prompt
        for strategy, levels in TRUTH.items():
            accuracy, tokens = levels[level]
            right = float(luck < accuracy)
            rows.append(
                Trial(prompt=f"p{number}", signal=signal, strategy=strategy, accuracy=right, tokens=float(tokens))
            )
    return rows


def test_each_bin_gets_the_strategy_that_pays():
    calibration = calibrate(trials(), baseline="best_of_16", tolerance=0.01)
    assert [row.strategy for row in calibration.table] == ["greedy", "vote", "search"]
    assert [row.least for row in calibration.table][-1] is None
    assert calibration.table[0].least > calibration.table[1].least
    assert calibration.table[0].least > 0.6 and calibration.table[1].least < 0.66
    # (20 + 320 + 480) / (320 + 640 + 960)
    assert calibration.token_ratio.value == pytest.approx(820 / 1920, abs=0.02)
    assert calibration.token_ratio.low < 820 / 1920 < calibration.token_ratio.high
    assert calibration.accuracy_gap.value == pytest.approx(0.0, abs=0.02)
    assert sum(row.num_prompts for row in calibration.table) == calibration.num_prompts
    assert 650 < calibration.num_prompts < 850, "one of two folds"


def test_figures_are_not_those_of_the_fold_of_the_choice():
    """A strategy that was lucky where it was chosen is reported as it is elsewhere."""
    rng = random.Random(5)
    rows = [
        Trial(prompt=f"p{i}", signal=0.5, strategy=f"lucky-{s}", accuracy=float(rng.random() < 0.5), tokens=10.0)
        for i in range(60)
        for s in range(200)
    ]
    calibration = calibrate(rows, baseline="lucky-0", num_bins=1)
    assert calibration.accuracy.value < 0.65, "the best of 200 coins looks better than that on its own fold"


def test_equal_signals_stay_in_one_bin():
    rows = [Trial(prompt=f"p{i}", signal=1.0, strategy="a", accuracy=1.0, tokens=1.0) for i in range(40)]
    assert len(calibrate(rows, baseline="a", num_bins=4).table) == 1


def test_the_result_depends_on_the_seed_alone():
    assert calibrate(trials(300), baseline="vote") == calibrate(trials(300), baseline="vote")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: (rows, {"baseline": "x"}), "baseline must be one of"),
        (lambda rows: (rows[1:], {}), "each of 4 strategies once"),
        (lambda rows: (rows + rows[:1], {}), "each of 4 strategies once"),
        (lambda rows: (rows[:4], {}), "both folds"),
        (lambda rows: (rows, {"num_bins": 0}), "num_bins"),
        (lambda rows: (rows, {"tolerance": -1}), "tolerance"),
    ],
)
def test_bad_calibrations_are_refused(change, message):
    rows, options = change(trials(30))
    with pytest.raises(ValueError, match=message):
        calibrate(rows, **{"baseline": "vote", **options})


def test_intervals_by_hand():
    """Wilson's for 8 of 10, as published: 0.490 to 0.943."""
    interval = wilson(0.8, 10)
    assert (interval.low, interval.high) == (pytest.approx(0.490, abs=1e-3), pytest.approx(0.943, abs=1e-3))
    values = [0.0, 1.0] * 50
    interval = bootstrap(lambda rows: sum(values[i] for i in rows) / len(rows), 100)
    assert interval.value == 0.5
    assert (interval.low, interval.high) == (pytest.approx(0.4, abs=0.03), pytest.approx(0.6, abs=0.03))
