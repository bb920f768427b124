"""Which data-parallel rank gets a request. P ranks, A requests.

All ranks take as long for a step as the slowest one, so work is to be equal in every step, and work that is done need not be
done again. Both are measured in tokens: one computed token of time, whatever it is spent on.

A request goes to the rank with the least load among those that have room; or to one that has a part of it, unless that is more
than the part's worth behind (`admission_loops.place`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np

from expertwire.scheduler._compiled import admissions


class Placement(Protocol):
    """What loads ranks.

    Attributes:
        credit: the load that one token makes up for which a rank has already; None: that does not draw requests there.
    """

    @property
    def credit(self) -> float | None: ...

    def load(self, num_tokens: np.ndarray, num_computed: np.ndarray, num_left: np.ndarray) -> np.ndarray:
        """What each request adds to the load of its rank, f64; a computed token less by `credit`.

        Args:
            num_tokens: known.
            num_computed: of them.
            num_left: that it may still sample, at most.
        """

    def load_P(self, running_P: np.ndarray, given_P: np.ndarray) -> np.ndarray:
        """The ranks' load before a step's requests: from the sum over their running ones, f64, and how many each was given so
        far, i64."""


@dataclass(frozen=True, kw_only=True)
class Balanced:
    """The rank that has least to do in the steps to come; one with a prefix of the request has that much less to do.

    A request's load is what its rank spends on it within its next steps: its tokens that are not computed, and in each step the
    token that it decodes and the reading of its cache. So a session stays with its prefix until another rank is so far behind
    that computing the prefix again is cheaper than going on unequally.

    Args:
        horizon: steps that count. Less than an answer has, as new requests and ends make ranks equal long before it is complete.
            In `bench schedule --placements`, 16 to 64 are equally good without common prefixes; with them, a longer horizon
            makes sessions leave too easily, a shorter one piles them up.
        kv_share: the time to read one token's cache, in computed tokens: 23 ns of 10 µs for Qwen3-30B-A3B in BF16 on one H200.
    """

    credit: ClassVar[float] = 1.0

    horizon: int = 32
    kv_share: float = 2.3e-3

    def load(self, num_tokens: np.ndarray, num_computed: np.ndarray, num_left: np.ndarray) -> np.ndarray:
        load_A = np.empty(len(num_tokens))
        admissions.balanced(num_tokens, num_computed, num_left, self.horizon, self.kv_share, load_A)
        return load_A

    def load_P(self, running_P: np.ndarray, given_P: np.ndarray) -> np.ndarray:
        return running_P
