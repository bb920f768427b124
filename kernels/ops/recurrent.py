"""Recurrent states in blocks: what the recurrent mixers (Mamba-2, gated delta net, Mamba-1) share.

Positions of a sequence are cut at absolute places, whatever a step computes of them:

- into *chunks* of C positions. A mixer in chunked form computes a token's output from the state at the beginning of its
  chunk and from the inputs of the chunk's tokens up to its own. A *chunk cache* keeps these inputs until the chunk is full
  and the state moves on; a sequence has one block of C positions there, which its next chunk overwrites. So a token's
  bits do not depend on how steps cut its sequence: a decode is the last row of what a prefill computes for the same
  chunk. A mixer whose state moves on with every token has C = 1 and no such cache.
- into *intervals* of `interval` positions, a multiple of C. Each has an entry of the sequence's block table of the *state
  cache*, and consecutive intervals can name the same block, in which the state goes on. When e tokens of a sequence are
  computed, the block of intervals up to j, the one with token e - 1 or an earlier one, holds what is true after
  e_j = min(e, (j + 1) * interval) tokens: the state after the last whole chunk, of e_j // C * C tokens, and the
  convolution's last inputs before token e_j. So a block whose last interval is complete is a snapshot, from which any
  sequence that begins with the same tokens goes on, and a step that enters another block reads the one before it.

Before a sequence's first token the state and the convolution's inputs are zeros; nothing is read. Blocks hold one state:
a step goes on in the block that it finds.

S sequences, W entries of a block table.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from expertwire.kernels.ops.attention import AttentionMetadata, each_sequence


@dataclass(frozen=True, kw_only=True)
class StateMetadata:
    """The sequences of a step, and the blocks of their states.

    Attributes:
        seqs: the sequences; `block_table` lists the blocks of the state cache, one for each interval; `slot_mapping` has no
            meaning. Sequences with one query come first.
        interval: positions of one.
        chunk_blocks_S: i32, each sequence's block of the chunk cache; None: the mixer has none.
    """

    seqs: AttentionMetadata
    interval: int
    chunk_blocks_S: Tensor | None = None


class Piece(NamedTuple):
    """Tokens of one sequence in a step whose intervals have one block, for implementations that loop in Python.

    Attributes:
        number: of the sequence.
        row: of the step, of the first token.
        start, end: positions of the first token, and behind the last.
        source: block of the state before the first token; -1: it is zero.
        target: block of the state after the last token.
    """

    number: int
    row: int
    start: int
    end: int
    source: int
    target: int


def pieces(metadata: StateMetadata) -> Iterator[Piece]:
    """Yield the pieces of a step, those of a sequence in order."""
    every = metadata.interval
    for number, first, last, length in each_sequence(metadata.seqs):
        start = length - (last - first)
        while start < length:
            table = metadata.seqs.block_table[number]
            end = (start // every + 1) * every
            while end < length and table[end // every] == table[start // every]:
                end += every
            end = min(length, end)
            source = int(table[(start - 1) // every]) if start else -1
            yield Piece(
                number, first + start - (length - (last - first)), start, end, source, int(table[start // every])
            )
            start = end
