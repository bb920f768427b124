"""The arena: what one rank lends to all others for as long as they live, and where in it everything lies.

    region       shape             contents                                               written by
    dispatched   i64 [P, line]     epoch, number of rows                                  rank p its line
    combined     i64 [P, line]     epoch                                                  rank p its line
    stalled      i64 [P, line]     0, or whom rank p has waited for in vain (`Stall`)     rank p its line; never cleared
    routes       i32 [P, T, K+1]   a row's token on its home rank, its K physical ids     rank p its part
    rows         [P, T, D]         rows in the order of tokens                            rank p its part
    home         [T, K, D']        the expert rows of this rank's tokens                  each slot by the rank of its expert

All offsets follow from the spec, so they are the same on every rank. The line that a rank writes last says that everything
before it is there: an epoch counts the exchanges from 1 and only grows. Lines are apart so that no two ranks write one cache
line; rows begin at multiples of 16 bytes, so that they can be stored 16 bytes at a time.

P ranks, T tokens of one rank at most, K experts a token, D and D' widths of the rows that go out and come home.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np
from torch import Tensor

from expertwire.comm.all_to_all.base import AllToAllSpec, RankStalled

LINE = 16  # i64 words: 128 bytes, what a GPU moves at once
_REGION_BYTES = 256
_WORD, _ID = 8, 4
_STORE = 16  # bytes


@dataclass(frozen=True, kw_only=True)
class Region:
    """Bytes from the arena's beginning, and elements."""

    offset: int
    shape: tuple[int, ...]
    itemsize: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.itemsize


@dataclass(frozen=True, kw_only=True)
class ArenaLayout:
    """Where the regions of the module's table lie. The last dimension of `rows` and `home` counts bytes, padded to 16."""

    dispatched: Region
    combined: Region
    stalled: Region
    routes: Region
    rows: Region
    home: Region

    @classmethod
    def of(cls, spec: AllToAllSpec) -> ArenaLayout:
        num_ranks, tokens, top_k = spec.group.size, spec.max_tokens, spec.top_k
        lines = (num_ranks, LINE)
        combine_dtype = spec.combine_dtype or spec.dtype
        shapes = {
            "dispatched": (lines, _WORD),
            "combined": (lines, _WORD),
            "stalled": (lines, _WORD),
            "routes": ((num_ranks, tokens, top_k + 1), _ID),
            "rows": ((num_ranks, tokens, _padded(spec.hidden_size * spec.dtype.itemsize, _STORE)), 1),
            "home": (
                (tokens, top_k, _padded((spec.combine_size or spec.hidden_size) * combine_dtype.itemsize, _STORE)),
                1,
            ),
        }
        regions, offset = {}, 0
        for name, (shape, itemsize) in shapes.items():
            regions[name] = Region(offset=offset, shape=shape, itemsize=itemsize)
            offset = _padded(offset + regions[name].nbytes, _REGION_BYTES)
        return cls(**regions)

    @property
    def nbytes(self) -> int:
        return _padded(max(region.offset + region.nbytes for region in self.regions()), _REGION_BYTES)

    def regions(self) -> list[Region]:
        return [getattr(self, field.name) for field in fields(self)]


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


EXCHANGE_BYTES = 4 << 30  # of a GPU that all parts' exchanges may take at worst
_LEAST_TOKENS = 128


def exchange_tokens(
    max_tokens: int,
    *,
    num_ranks: int,
    experts: int,
    top_k: int,
    row_bytes: int,
    home_bytes: int,
    expert_bytes: int,
    budget: int = EXCHANGE_BYTES,
) -> int:
    """Return how many tokens of a rank an exchange shall take: `max_tokens`, halved until memory for the worst case, all tokens
    of all ranks choosing experts of one rank, is within `budget` bytes. 128 are taken at least.

    Args:
        experts: of one rank, at most.
        row_bytes, home_bytes: of a row that goes out, and of one that comes home.
        expert_bytes: that a routed row takes in the experts, beside the row that goes home.
    """
    arena = num_ranks * (row_bytes + _ID * (top_k + 1)) + top_k * home_bytes
    token_bytes = arena + num_ranks * min(top_k, experts) * (home_bytes + expert_bytes)
    tokens = max_tokens
    while tokens > _LEAST_TOKENS and tokens * token_bytes > budget:
        tokens = _padded(-(-tokens // 2), _STORE)
    return tokens


@dataclass(frozen=True, kw_only=True)
class Arena:
    """Views of one rank's arena on the host, in numpy: it moves rows by an index in a third of torch's time."""

    dispatched: np.ndarray  # i64 [P, line]
    combined: np.ndarray
    stalled: np.ndarray
    routes: np.ndarray  # i32 [P, T, K + 1]
    rows: np.ndarray  # u8 [P, T, bytes of D]
    home: np.ndarray  # u8 [T * K, bytes of D']

    @classmethod
    def of(cls, memory: Tensor, layout: ArenaLayout, spec: AllToAllSpec) -> Arena:
        """`memory`: u8 on a CPU, as large as the layout says."""
        assert memory.numel() == layout.nbytes, f"{memory.numel()} bytes, layout {layout.nbytes}"

        def part(region: Region, dtype: type) -> np.ndarray:
            nbytes = memory[region.offset : region.offset + region.nbytes]
            return nbytes.numpy().view(dtype).reshape(region.shape)

        combine_dtype = spec.combine_dtype or spec.dtype
        home = part(layout.home, np.uint8).reshape(-1, layout.home.shape[-1])
        return cls(
            dispatched=part(layout.dispatched, np.int64),
            combined=part(layout.combined, np.int64),
            stalled=part(layout.stalled, np.int64),
            routes=part(layout.routes, np.int32),
            rows=part(layout.rows, np.uint8)[..., : spec.hidden_size * spec.dtype.itemsize],
            home=home[:, : (spec.combine_size or spec.hidden_size) * combine_dtype.itemsize],
        )


DISPATCH, COMBINE = 0, 1
PHASES = ("dispatch", "combine")
_RANK_BITS, _PHASE_BITS = 16, 1


@dataclass(frozen=True, order=True)
class Stall:
    """Who did not come; the smallest is the earliest, and the cause of the others."""

    epoch: int
    phase: int
    rank: int

    def word(self) -> int:
        """As it lies in an arena: never 0, and ordered likewise."""
        return (self.epoch << _PHASE_BITS | self.phase) << _RANK_BITS | self.rank

    @classmethod
    def from_word(cls, word: int) -> Stall:
        rank, rest = word & (1 << _RANK_BITS) - 1, word >> _RANK_BITS
        return cls(rest >> _PHASE_BITS, rest & (1 << _PHASE_BITS) - 1, rank)


def stall_error(words: np.ndarray, spec: AllToAllSpec) -> RankStalled:
    """The error of the earliest of some stalls, words of which 0 is none."""
    stall = Stall.from_word(int(words[words > 0].min()))
    layer = spec.layers[(stall.epoch - 1) % len(spec.layers)] if spec.layers else None
    return RankStalled(stall.rank, stall.epoch, PHASES[stall.phase], layer, spec.timeout_s, spec.micro_batch)
