"""How many bytes a dispatch and a combine move, and how soon they can be done at best: arithmetic, no measurement.

Bytes are those of rows with their scales, of one rank and in one direction. A row's metadata (expert ids, weights and the token,
8 * K + 4 bytes) comes on top: under 2 % of the smallest row of 7,168 numbers.

T tokens a rank, K experts a token, D width, E experts, e experts of a rank, P ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

import numpy as np

# Bits of a number, and of its share of a scale: fp8 has 4 bytes for 128 numbers, mxfp8 one byte for 32, nvfp4 one for 16.
FORMATS = {"fp32": (32, 0), "bf16": (16, 0), "fp8": (8, 32 / 128), "mxfp8": (8, 8 / 32), "nvfp4": (4, 8 / 16)}


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Mean bytes of one rank.

    Args:
        unique: every token's row once, as if nobody else needed it.
        sent: every copy, those for experts of the same rank included (what most libraries call logical).
        wire: the copies that leave the rank.
    """

    unique: float
    sent: float
    wire: float

    def bound_us(self, gb_s: float) -> float:
        """The least time at `gb_s` GB/s in one direction."""
        return self.wire / gb_s / 1e3


def row_bytes(hidden_size: int, wire_format: str) -> int:
    """Bytes of a row of D numbers.

    Raises:
        ValueError: there is no such format.
    """
    if wire_format not in FORMATS:
        raise ValueError(f"wire_format must be one of {', '.join(FORMATS)}, got {wire_format!r}")
    return round(hidden_size * sum(FORMATS[wire_format]) / 8)


def even(num_experts: int, num_ranks: int) -> list[int]:
    """Experts of each rank, as evenly as can be."""
    return [num_experts // num_ranks + (rank < num_experts % num_ranks) for rank in range(num_ranks)]


def distinct_ranks(experts_P: Sequence[int], top_k: int) -> float:
    """On how many ranks a token's K experts lie, in the mean over uniform choices of K distinct experts.

    Rank p has none of them with probability C(E - e_p, K) / C(E, K).
    """
    total = sum(experts_P)
    return sum(1 - comb(total - experts, top_k) / comb(total, top_k) for experts in experts_P)


def perfect_ranks(num_ranks: int, top_k: int) -> float:
    """On how many ranks they lie with the "perfect router" of TensorRT-LLM's benchmark: as many as can be."""
    return min(num_ranks, top_k)


def duplicate_probability(ranks_per_token: float, top_k: int) -> float:
    """That a routed row needs no copy of its own on the wire, as another of its token's goes to the same rank."""
    return 1 - ranks_per_token / top_k


def dispatch(num_tokens: int, row: int, ranks_per_token: float, num_ranks: int) -> Traffic:
    """A row of `row` bytes goes once to each rank that has one of its experts; home ranks are as likely as others."""
    return _traffic(num_tokens, row, ranks_per_token, num_ranks)


def combine(num_tokens: int, row: int, top_k: int, num_ranks: int) -> Traffic:
    """One row comes back for every (token, k), so that the sum's order does not depend on the placement."""
    return _traffic(num_tokens, row, top_k, num_ranks)


def combine_reduced(num_tokens: int, row: int, ranks_per_token: float, num_ranks: int) -> Traffic:
    """Every rank adds up a token's rows first, and one comes back from each."""
    return _traffic(num_tokens, row, ranks_per_token, num_ranks)


def _traffic(num_tokens: int, row: int, copies: float, num_ranks: int) -> Traffic:
    unique = float(num_tokens * row)
    return Traffic(unique=unique, sent=unique * copies, wire=unique * copies * (num_ranks - 1) / num_ranks)


def counted(physical_TK: np.ndarray, rank_offsets: Sequence[int], rank: int, row: int) -> tuple[Traffic, Traffic]:
    """What `rank` sends of these ids (-1 for none) in dispatch, and what comes home to it in combine, to the byte."""
    offsets = np.asarray(rank_offsets)
    ranks_TK = np.searchsorted(offsets, physical_TK, side="right") - 1
    here_TPK = ranks_TK[:, None, :] == np.arange(len(offsets) - 1)[None, :, None]
    routed_P, copies_P = here_TPK.sum(axis=(0, 2)), here_TPK.any(axis=2).sum(axis=0)
    unique = float(row * here_TPK.any(axis=(1, 2)).sum())

    def of(rows_P: np.ndarray) -> Traffic:
        return Traffic(unique=unique, sent=float(row * rows_P.sum()), wire=float(row * (rows_P.sum() - rows_P[rank])))

    return of(copies_P), of(routed_P)
