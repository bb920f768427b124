"""Which data-parallel rank gets a request. P ranks."""

from __future__ import annotations

import numpy as np

_FULL = np.iinfo(np.int64).max


def place(fits_P: np.ndarray, load_P: np.ndarray) -> int | None:
    """The rank with the least load among those with room, the lowest of equals; None if no rank has room.

    Args:
        fits_P: bool, the rank has a slot, blocks and tokens of this step's budget left.
        load_P: i64, outstanding tokens: those that the rank's requests may still have to compute. Tokens and not requests,
            because tokens are what a step's time and a cache's space are made of.
    """
    if not fits_P.any():
        return None
    return int(np.where(fits_P, load_P, _FULL).argmin())
