"""The pieces of a step, for compiled loops: see `kernels.ops.recurrent`.

S sequences, W entries of a block table, B blocks of the state cache, H heads of states [N, d].
"""

from __future__ import annotations

import numpy as np

from expertwire.kernels.cpu._llvm import copy_row, jit
from expertwire.kernels.ops.recurrent import StateMetadata

Steps = tuple[np.ndarray, np.ndarray, np.ndarray, int]  # cu_seqlens_q, seq_lens, block table, interval


def steps(states: StateMetadata) -> Steps:
    """Return what compiled loops need of a step's description."""
    seqs = states.seqs
    return seqs.cu_seqlens_q.numpy(), seqs.seq_lens.numpy(), seqs.block_table.numpy(), states.interval


@jit
def next_piece(table, start, length, every):
    """Return end, source and target of the `recurrent.Piece` from position `start` on, of a sequence of `length` tokens."""
    end = (start // every + 1) * every
    while end < length and table[end // every] == table[start // every]:
        end += every
    source = np.int64(table[(start - 1) // every]) if start > 0 else np.int64(-1)
    return min(end, length), source, np.int64(table[start // every])


@jit
def begin_state(state_BHNd, source, target):
    """Let the target block of a piece hold the state before its first token."""
    if source < 0:
        state_BHNd[target] = 0
    elif source != target:
        for h in range(state_BHNd.shape[1]):
            for n in range(state_BHNd.shape[2]):
                copy_row(state_BHNd[source, h, n], state_BHNd[target, h, n])
