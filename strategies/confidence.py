"""Confidence of an output, by the log-probabilities of its tokens."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np

_FEW = 8  # windows that a loop looks at in less time than numpy


class Windows:
    """Lowest means of windows of an output's log-probabilities, computed for new tokens only while the output grows.

    The views of one output share it, so that a decision at every step costs what the step has added.
    """

    def __init__(self) -> None:
        self._sums = array("d", [0.0])  # of the first log-probabilities, by their number
        self._lowest: dict[
            int, tuple[int, float]
        ] = {}  # by window: number of tokens that were looked at, and lowest mean

    def lowest(self, logprobs: Sequence[float], window: int) -> float:
        """Return the lowest mean of `window` consecutive log-probabilities; the mean of all if they are fewer, and 0.0 of none.

        Args:
            logprobs: those of the last call, or more of the same output, or fewer.
            window: at least 1.
        """
        length = len(logprobs)
        if length >= len(self._sums):
            total = self._sums[-1]
            for value in logprobs[len(self._sums) - 1 :]:
                total += value
                self._sums.append(total)
        if length <= window:
            return self._sums[length] / length if length else 0.0
        seen, lowest = self._lowest.get(window, (window - 1, float("inf")))
        if seen > length:
            seen, lowest = window - 1, float("inf")
        if seen < length:
            if length - seen > _FEW:
                part = np.frombuffer(self._sums)[seen + 1 - window : length + 1]
                lowest = min(lowest, float(((part[window:] - part[:-window]) / window).min()))
            else:
                for end in range(seen + 1, length + 1):
                    lowest = min(lowest, (self._sums[end] - self._sums[end - window]) / window)
            self._lowest[window] = length, lowest
        return lowest


class FallingWindow:
    """Notices when the lowest mean of `window` consecutive log-probabilities of an output falls; it has the bits of `Windows`.

    Attributes:
        has_fallen: whether it has, since somebody set this to False.
    """

    def __init__(self, window: int) -> None:
        self.has_fallen = False
        self._window, self._lowest = window, float("inf")
        self._sums = array("d", [0.0])

    def push(self, logprob: float) -> bool:
        """Add the next token's log-probability; return whether the lowest mean is less than before, or the first."""
        sums, window = self._sums, self._window
        sums.append(sums[-1] + logprob)
        if len(sums) <= window or (mean := (sums[-1] - sums[-1 - window]) / window) >= self._lowest:
            return False
        self._lowest, self.has_fallen = mean, True
        return True
