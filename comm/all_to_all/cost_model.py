"""Copies of a token and bytes that leave its rank in a dispatch and a combine, for uniform routing, by arithmetic.

K experts a token, E experts, e experts of a rank, P ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import comb


def even(num_experts: int, num_ranks: int) -> list[int]:
    """Return the number of experts of each rank, as even as possible."""
    return [num_experts // num_ranks + (rank < num_experts % num_ranks) for rank in range(num_ranks)]


def distinct_ranks(experts_P: Sequence[int], top_k: int) -> float:
    """Return the mean number of ranks that hold a token's K experts, for uniform choices of K distinct experts.

    Rank p has none of them with probability C(E - e_p, K) / C(E, K).
    """
    total = sum(experts_P)
    return sum(1 - comb(total - experts, top_k) / comb(total, top_k) for experts in experts_P)


def duplicate_probability(ranks_per_token: float, top_k: int) -> float:
    """Return the probability that a routed row needs no copy, as its token is sent to the same rank anyway."""
    return 1 - ranks_per_token / top_k


def wire_bytes(nbytes: float, copies: float, num_ranks: int) -> float:
    """Return the mean bytes that leave a rank, for `copies` of `nbytes` bytes to ranks that are all equally likely."""
    return nbytes * copies * (num_ranks - 1) / num_ranks
