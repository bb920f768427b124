"""Data-parallel load balancing: which rank a request goes to.

All ranks take as long for a step as the slowest one, so every step's work should be equal on all of
them, and cached work should not be repeated. Both are measured in tokens: one computed token of
time, whatever it is spent on.

A request goes to the least loaded rank that can take it, or to one with part of its prefix, unless
that rank's load is higher by more than the prefix is worth (`pick_rank` in `_compiled.admissions`).

P ranks, A requests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np

from expertwire.scheduler._compiled import admissions


class LoadBalancing(Protocol):
    """A measure of the ranks' load.

    Attributes:
        credit: the load that one cached token makes up for; None: cached tokens do not attract requests.
    """

    @property
    def credit(self) -> float | None: ...

    def load(self, num_tokens: np.ndarray, num_computed: np.ndarray, num_left: np.ndarray) -> np.ndarray:
        """Return what each request adds to its rank's load, f64; a computed token reduces it by `credit`.

        Args:
            num_tokens: known tokens.
            num_computed: computed ones among them.
            num_left: tokens that it may still sample, at most.
        """

    def load_P(self, running_P: np.ndarray, admitted_P: np.ndarray) -> np.ndarray:
        """Return the ranks' load before a step's admissions.

        Args:
            running_P: f64, the sum over their running requests.
            admitted_P: i64, how many requests each has been given so far.
        """


@dataclass(frozen=True, kw_only=True)
class LeastLoaded:
    """The rank with the least expected work, less what a cached prefix of the request saves.

    A request's load is what its rank spends on it within its next steps: its tokens that are not
    computed, and in each step the token that it decodes and the reading of its KV cache. So a
    session stays with its prefix until another rank's load is lower by more than computing the
    prefix again costs.

    Args:
        horizon: steps that count: fewer than an output has, because admissions and ends even out
            the ranks' load long before it is complete. In `bench schedule --load-balancing`, 16 to
            64 are equally good without common prefixes; with them, a longer horizon makes sessions
            leave too easily, a shorter one piles them up.
        kv_share: the time to read one token's cache, in computed tokens: 23 ns of 10 µs for
            Qwen3-30B-A3B in BF16 on one H200.
    """

    credit: ClassVar[float] = 1.0

    horizon: int = 32
    kv_share: float = 2.3e-3

    def load(self, num_tokens: np.ndarray, num_computed: np.ndarray, num_left: np.ndarray) -> np.ndarray:
        load_A = np.empty(len(num_tokens))
        admissions.expected_work(num_tokens, num_computed, num_left, self.horizon, self.kv_share, load_A)
        return load_A

    def load_P(self, running_P: np.ndarray, admitted_P: np.ndarray) -> np.ndarray:
        return running_P
