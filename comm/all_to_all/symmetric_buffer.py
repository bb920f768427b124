"""Layout of a rank's symmetric buffer, into which all other ranks write.

    region             shape              contents                                             written by
    dispatch_signals   i64 [P, signal]    epoch, number of rows                                rank p its signal
    combine_signals    i64 [P, signal]    epoch                                                rank p its signal
    stall_signals      i64 [P, signal]    0, or the rank that rank p waited for (`Stall`)      rank p its signal; never reset
    routes             i32 [P, T, K+1]    a row's token on its home rank, its K physical ids   rank p its part
    dispatch_rows      [P, T, D]          rows in the order of tokens                          rank p its part
    combine_rows       [T, K, D']         expert outputs of this rank's tokens                 each slot by its expert's rank

All offsets follow from the spec, so that they are the same on every rank. A rank writes its signal last; once the signal has
the epoch, which counts exchanges from 1, everything before it has arrived. Signals are padded, so that no two ranks write to
one cache line; rows are padded to 16 bytes, so that they can be stored 16 bytes at a time.

P ranks, T tokens of one rank at most, K experts a token, D and D' widths of dispatched and combined rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np
from torch import Tensor

from expertwire.comm.all_to_all.base import AllToAllSpec, RankStalled

SIGNAL_WORDS = 16  # i64: 128 bytes, which a GPU moves at once
_REGION_BYTES = 256
_WORD, _ID = 8, 4  # bytes
_STORE = 16  # bytes


@dataclass(frozen=True, kw_only=True)
class Region:
    """A region's offset in bytes, and its elements."""

    offset: int
    shape: tuple[int, ...]
    itemsize: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.itemsize


@dataclass(frozen=True, kw_only=True)
class BufferLayout:
    """The regions of the module's table. The last dimension of the rows counts bytes, padded to 16."""

    dispatch_signals: Region
    combine_signals: Region
    stall_signals: Region
    routes: Region
    dispatch_rows: Region
    combine_rows: Region

    @classmethod
    def of(cls, spec: AllToAllSpec) -> BufferLayout:
        num_ranks, tokens, top_k = spec.group.size, spec.max_tokens, spec.top_k
        signals = (num_ranks, SIGNAL_WORDS)
        combine_size, combine_dtype = spec.combine_size or spec.hidden_size, spec.combine_dtype or spec.dtype
        shapes = {
            "dispatch_signals": (signals, _WORD),
            "combine_signals": (signals, _WORD),
            "stall_signals": (signals, _WORD),
            "routes": ((num_ranks, tokens, top_k + 1), _ID),
            "dispatch_rows": ((num_ranks, tokens, _padded(spec.hidden_size * spec.dtype.itemsize, _STORE)), 1),
            "combine_rows": ((tokens, top_k, _padded(combine_size * combine_dtype.itemsize, _STORE)), 1),
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


EXCHANGE_BYTES = 4 << 30  # of a GPU for the exchanges of all micro-batches, at worst
_LEAST_TOKENS = 128


def exchange_tokens(
    max_tokens: int,
    *,
    num_ranks: int,
    experts: int,
    top_k: int,
    row_bytes: int,
    combine_bytes: int,
    expert_bytes: int,
    budget: int = EXCHANGE_BYTES,
) -> int:
    """Return how many tokens of a rank an exchange takes: `max_tokens`, halved until it needs at most `budget` bytes.

    The need is that of the worst case, in which all tokens of all ranks choose experts of one rank. At least 128.

    Args:
        experts: of one rank, at most.
        row_bytes, combine_bytes: of a dispatched and a combined row.
        expert_bytes: intermediate results of a routed row in the experts, beside its output.
    """
    buffer_bytes = num_ranks * (row_bytes + _ID * (top_k + 1)) + top_k * combine_bytes
    token_bytes = buffer_bytes + num_ranks * min(top_k, experts) * (combine_bytes + expert_bytes)
    tokens = max_tokens
    while tokens > _LEAST_TOKENS and tokens * token_bytes > budget:
        tokens = _padded(-(-tokens // 2), _STORE)
    return tokens


@dataclass(frozen=True, kw_only=True)
class BufferViews:
    """Views of one rank's buffer in numpy, which gathers rows in a third of torch's time."""

    dispatch_signals: np.ndarray  # i64 [P, signal]
    combine_signals: np.ndarray
    stall_signals: np.ndarray
    routes: np.ndarray  # i32 [P, T, K + 1]
    dispatch_rows: np.ndarray  # u8 [P, T, bytes of D]
    combine_rows: np.ndarray  # u8 [T * K, bytes of D']

    @classmethod
    def of(cls, memory: Tensor, layout: BufferLayout, spec: AllToAllSpec) -> BufferViews:
        """`memory`: u8 on a CPU, as large as the layout says."""
        assert memory.numel() == layout.nbytes, f"{memory.numel()} bytes, layout {layout.nbytes}"

        def view(region: Region, dtype: type) -> np.ndarray:
            nbytes = memory[region.offset : region.offset + region.nbytes]
            return nbytes.numpy().view(dtype).reshape(region.shape)

        combine_dtype = spec.combine_dtype or spec.dtype
        combine_rows = view(layout.combine_rows, np.uint8).reshape(-1, layout.combine_rows.shape[-1])
        return cls(
            dispatch_signals=view(layout.dispatch_signals, np.int64),
            combine_signals=view(layout.combine_signals, np.int64),
            stall_signals=view(layout.stall_signals, np.int64),
            routes=view(layout.routes, np.int32),
            dispatch_rows=view(layout.dispatch_rows, np.uint8)[..., : spec.hidden_size * spec.dtype.itemsize],
            combine_rows=combine_rows[:, : (spec.combine_size or spec.hidden_size) * combine_dtype.itemsize],
        )


DISPATCH, COMBINE = 0, 1
PHASES = ("dispatch", "combine")
_RANK_BITS, _PHASE_BITS = 16, 1


@dataclass(frozen=True, order=True)
class Stall:
    """A rank that did not signal in time; the smallest stall is the earliest, and the cause of the others."""

    epoch: int
    phase: int
    rank: int

    def word(self) -> int:
        """Return its encoding in a buffer, which is never 0 and keeps the order."""
        return (self.epoch << _PHASE_BITS | self.phase) << _RANK_BITS | self.rank

    @classmethod
    def from_word(cls, word: int) -> Stall:
        rank, rest = word & (1 << _RANK_BITS) - 1, word >> _RANK_BITS
        return cls(rest >> _PHASE_BITS, rest & (1 << _PHASE_BITS) - 1, rank)


def stall_error(words: np.ndarray, spec: AllToAllSpec) -> RankStalled:
    """Return the error of the earliest of the encoded stalls, of which 0 is none."""
    stall = Stall.from_word(int(words[words > 0].min()))
    layer = spec.layers[(stall.epoch - 1) % len(spec.layers)] if spec.layers else None
    return RankStalled(stall.rank, stall.epoch, PHASES[stall.phase], layer, spec.timeout_s, spec.micro_batch)
