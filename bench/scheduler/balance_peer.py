"""deepseek-ai/EPLB, after its published description (README and eplb.py of d52c72d, 2025-03-24).

Expert groups are packed onto nodes; within a node the expert with the most rows a replica gets the
next replica; the replicas are packed onto ranks. To pack is to put things by falling weight into
the least loaded of those bins that still have room, and all bins take equally many. Every replica
gets an equal share of its expert's rows. One group and one node is its global mode.

E experts, S physical experts.
"""

from __future__ import annotations

import numpy as np


def pack(weights: np.ndarray, num_bins: int) -> list[list[int]]:
    """Return the indices of `weights` in each bin, in the order of packing."""
    room = len(weights) // num_bins
    assert room * num_bins == len(weights), f"{len(weights)} things do not fill {num_bins} bins equally"
    if room == 1:
        return [[i] for i in range(num_bins)]
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    totals = [0.0] * num_bins
    for i in np.argsort(-weights, kind="stable").tolist():
        least = min((b for b in range(num_bins) if len(bins[b]) < room), key=totals.__getitem__)
        bins[least].append(i)
        totals[least] += float(weights[i])
    return bins


def replicate(load: np.ndarray, num_physical: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the expert of each replica, and how many replicas each expert has."""
    counts, experts = np.ones(len(load), np.int64), list(range(len(load)))
    while len(experts) < num_physical:
        experts.append(int((load / counts).argmax()))
        counts[experts[-1]] += 1
    return np.array(experts), counts


def balance(
    load_E: np.ndarray, num_physical: int, num_ranks: int, num_groups: int = 1, num_nodes: int = 1
) -> np.ndarray:
    """Return the logical expert of each physical one, by rank: i64 [S]."""
    group_size, per_node = len(load_E) // num_groups, num_physical // num_nodes
    placed = []
    for groups in pack(load_E.reshape(num_groups, group_size).sum(axis=1), num_nodes):
        here = np.concatenate([np.arange(group_size) + group * group_size for group in groups])
        experts, counts = replicate(load_E[here], per_node)
        each = (load_E[here] / counts)[experts]
        for members in pack(each, num_ranks // num_nodes):
            placed.append(here[experts[members]])
    return np.concatenate(placed)
