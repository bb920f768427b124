"""Who has to give way when a rank has too few blocks for its running requests.

Rows are rows of the running table; G caches, P ranks, R rows that want blocks.
"""

from __future__ import annotations

import numpy as np

from expertwire.scheduler.running import RunningTable


def victims(table: RunningTable, short_GP: np.ndarray) -> np.ndarray:
    """Rows to preempt, ascending, so that the others get the blocks that they lack.

    The least urgent first; of these the cheapest, which has the fewest tokens to compute again. One whose next block would be
    its last is spared while there are others. A rank's most urgent request, the oldest of equals, is never preempted: it gets on,
    and so everyone does in the end.
    """
    chosen: list[int] = []
    for rank in np.flatnonzero(short_GP.any(axis=0)):
        first, last = table.bounds_P1[rank : rank + 2]
        rows = first + np.flatnonzero(table.running_N[first:last] & ~table.draining_N[first:last])
        rows = rows[np.lexsort((table.order_N[rows], table.priority_N[rows]))][1:]
        about_to_finish = table.limit_N[rows] - table.num_tokens_N[rows] <= table.config.block_size
        keys = (-table.order_N[rows], table.num_computed_N[rows], -table.priority_N[rows], about_to_finish)
        short_G = short_GP[:, rank].copy()
        for row in rows[np.lexsort(keys)].tolist():
            if not (short_G > 0).any():
                break
            chosen.append(row)
            for group in range(len(short_G)):
                refs = table.pool.refs_GPB[group, rank, table.blocks_of(group, row)]
                short_G[group] -= np.count_nonzero(refs == 1)
    return np.sort(np.array(chosen, np.int64))


def served(table: RunningTable, rows: np.ndarray, lacking_GR: np.ndarray) -> np.ndarray:
    """Which rows get the blocks that they lack when not all can: bool [R]; the most urgent first, the oldest of equals."""
    free_GP = table.pool.num_free_GP.copy()
    gets = np.ones(len(rows), bool)
    for i in np.lexsort((table.order_N[rows], table.priority_N[rows])).tolist():
        lacking_G = lacking_GR[:, i]
        if not lacking_G.any():
            continue
        free_G = free_GP[:, table.rank_N[rows[i]]]
        gets[i] = (lacking_G <= free_G).all()
        if gets[i]:
            free_G -= lacking_G
    return gets
