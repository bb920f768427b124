"""Bytes that a dispatch and a combine move, and lower bounds of their times.

Bytes are those of rows with their scales, of one rank in one direction. A row's metadata (expert ids, weights and the token,
8 * K + 4 bytes) is not counted: under 2 % of the smallest row of 7,168 numbers.

T tokens a rank, K experts a token, D width, P ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from expertwire.comm.all_to_all.cost_model import wire_bytes

# Bits of a value, and of its share of a scale: fp8 has 4 bytes for 128 numbers, mxfp8 one byte for 32, nvfp4 one for 16.
FORMATS = {"fp32": (32, 0), "bf16": (16, 0), "fp8": (8, 32 / 128), "mxfp8": (8, 8 / 32), "nvfp4": (4, 8 / 16)}


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Mean bytes of one rank.

    Args:
        unique: every token's row once.
        sent: every copy, including those for experts of the same rank (which most libraries call logical).
        wire: copies that leave the rank.
    """

    unique: float
    sent: float
    wire: float

    def bound_us(self, gb_s: float) -> float:
        """Return the lower bound of the time in µs at `gb_s` GB/s in one direction."""
        return self.wire / gb_s / 1e3


def row_bytes(hidden_size: int, format: str) -> int:
    """Return the bytes of a row of D values.

    Raises:
        ValueError: there is no such format.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    return round(hidden_size * sum(FORMATS[format]) / 8)


def expected(num_tokens: int, row: int, copies: float, num_ranks: int) -> Traffic:
    """Return the traffic of rows of `row` bytes to ranks that are all equally likely.

    Args:
        copies: of each token's row. In a dispatch, one for each rank with one of its experts (`cost_model.distinct_ranks`). In
            a combine, one for each expert, so that the order of sums does not depend on the placement; or if every rank added
            up a token's rows first, as many as in a dispatch.
    """
    unique = float(num_tokens * row)
    return Traffic(unique=unique, sent=unique * copies, wire=wire_bytes(unique, copies, num_ranks))


def counted(physical_TK: np.ndarray, rank_offsets: Sequence[int], rank: int, row: int) -> tuple[Traffic, Traffic]:
    """Return the exact traffic of `rank` for these ids (-1 for none): sent in dispatch, received in combine."""
    offsets = np.asarray(rank_offsets)
    ranks_TK = np.searchsorted(offsets, physical_TK, side="right") - 1
    here_TPK = ranks_TK[:, None, :] == np.arange(len(offsets) - 1)[None, :, None]
    routed_P, copies_P = here_TPK.sum(axis=(0, 2)), here_TPK.any(axis=2).sum(axis=0)
    unique = float(row * here_TPK.any(axis=(1, 2)).sum())

    def of(rows_P: np.ndarray) -> Traffic:
        return Traffic(unique=unique, sent=float(row * rows_P.sum()), wire=float(row * (rows_P.sum() - rows_P[rank])))

    return of(copies_P), of(routed_P)
