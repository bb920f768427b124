"""Lists of different lengths as flat arrays. A rows, B items: `counts_A` says how many of the B items each row has."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def offsets(counts_A: np.ndarray) -> np.ndarray:
    """Where each row's items begin and end: i32 [A + 1]."""
    offsets_A1 = np.zeros(len(counts_A) + 1, np.int32)
    counts_A.cumsum(out=offsets_A1[1:])
    return offsets_A1


def starts(row_B: np.ndarray, num_rows: int) -> np.ndarray:
    """The offsets of items whose rows are given, ascending: i32 [num_rows + 1]."""
    return np.searchsorted(row_B, np.arange(num_rows + 1)).astype(np.int32)


def positions(counts_A: np.ndarray) -> np.ndarray:
    """Each item's position within its row, i64 [B]: counts (2, 0, 3) give 0 1 0 1 2."""
    ends_A = counts_A.cumsum()
    return np.arange(ends_A[-1] if len(ends_A) else 0) - (ends_A - counts_A).repeat(counts_A)


def pack(rows: Sequence[Sequence[float] | np.ndarray], dtype: type) -> tuple[np.ndarray, np.ndarray]:
    """The rows' items one after another, as `dtype`, and their offsets."""
    if not any(map(len, rows)):
        return np.zeros(0, dtype), np.zeros(len(rows) + 1, np.int32)
    counts_A = np.fromiter(map(len, rows), np.int64, len(rows))
    offsets_A1 = offsets(counts_A)
    return np.concatenate(rows if counts_A.all() else [row for row in rows if len(row)], dtype=dtype), offsets_A1


def counts(parts: Sequence[np.ndarray]) -> np.ndarray:
    """The rows' item counts of several offset arrays together: `np.diff` of each, joined."""
    ends = np.cumsum([len(part) for part in parts])
    return np.delete(np.diff(np.concatenate(parts)), ends[:-1] - 1)
