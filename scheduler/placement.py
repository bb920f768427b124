"""Which data-parallel rank gets a request. P ranks.

All ranks take as long for a step as the slowest one, so work is to be equal in every step, and work that is done need not be
done again. Both are measured in tokens: one computed token of time, whatever it is spent on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np

from expertwire.scheduler import row_loops

Count = TypeVar("Count", float, np.ndarray)  # of one request, or of each of an array


class Placement(Protocol):
    """How ranks are loaded and chosen."""

    def load(self, num_tokens: Count, num_computed: Count, num_left: Count) -> Count:
        """What a request adds to the load of its rank.

        Args:
            num_tokens: known.
            num_computed: of them.
            num_left: that it may still sample, at most.
        """

    def choose(self, fits_P: np.ndarray, load_P: np.ndarray, favoured: int, num_cached: int) -> int | None:
        """The rank for the next request; None: no rank has room.

        Args:
            fits_P: bool, the rank has a slot, blocks and tokens of this step's budget left.
            load_P: f64, the sum over its requests.
            favoured: a rank that has the request's first `num_cached` tokens; negative: none is known.
        """


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

    horizon: int = 32
    kv_share: float = 2.3e-3

    def load(self, num_tokens: Count, num_computed: Count, num_left: Count) -> Count:
        steps = min(num_left, self.horizon) if isinstance(num_left, int) else np.minimum(num_left, self.horizon)
        return num_tokens - num_computed + steps * (1 + self.kv_share * num_tokens)

    def choose(self, fits_P: np.ndarray, load_P: np.ndarray, favoured: int, num_cached: int) -> int | None:
        rank = place(fits_P, load_P)
        if rank is not None and favoured >= 0 and fits_P[favoured] and load_P[favoured] - num_cached <= load_P[rank]:
            return favoured
        return rank


def place(fits_P: np.ndarray, load_P: np.ndarray) -> int | None:
    """The rank with the least load among those with room, the lowest of equals; None if no rank has room."""
    rank = row_loops.least(fits_P, load_P)
    return None if rank < 0 else rank
