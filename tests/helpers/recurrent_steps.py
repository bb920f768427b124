"""Steps of recurrent mixers in tests: sequences with blocks of their own, and ways to cut them into steps."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from expertwire.kernels.ops import attention
from expertwire.kernels.ops.recurrent import StateMetadata
from expertwire.kernels.ops.variants import CHUNK

Part = tuple[int, int, int]  # of a step: sequence, first position, end


@dataclass(frozen=True)
class Blocks:
    """Tables [S, W] of sequences whose blocks lie scattered, behind a null block.

    `every` positions have a block of the state cache, which entries of the steps' tables repeat; a sequence has one of the chunk
    cache.
    """

    every: int
    state_table: torch.Tensor
    chunk_blocks: torch.Tensor
    num_states: int
    num_chunks: int

    @classmethod
    def scatter(cls, lengths, every, seed=0):
        rng = np.random.default_rng(seed)
        (states, num_states), (chunks, num_chunks) = _table(lengths, every, rng), _table([1] * len(lengths), 1, rng)
        return cls(every, states, chunks[:, 0].contiguous(), num_states, num_chunks)

    def with_first_blocks_of(self, source, count):
        """Return tables in which each sequence begins with the first `count` states of sequence `source`."""
        table = self.state_table.clone()
        table[:, :count] = table[source, :count]
        return replace(self, state_table=table)

    def metadata(self, parts: list[Part], unused=None) -> StateMetadata:
        """Describe a step; single tokens first.

        With `unused`, as a captured step: that many sequences without queries stand last, and bounds are loose.
        """
        rows = torch.tensor([sequence for sequence, _, _ in parts], dtype=torch.int64)
        queries, ends = [end - start for _, start, end in parts], [end for _, _, end in parts]
        padding = [0] * (unused or 0)
        table, chunks = self.state_table[rows], self.chunk_blocks[rows]
        repeats = self.every // CHUNK if self.every % CHUNK == 0 else 2
        states = torch.cat((table, table.new_zeros(len(padding), table.shape[1]))).repeat_interleave(repeats, 1)
        seqs = attention.describe(queries + padding, ends + padding, states)
        if unused is not None:
            most = seqs.num_sequences
            seqs = replace(seqs, max_decodes=most, max_prefills=most, max_prefill_tokens=sum(queries) + most)
        blocks_S = torch.cat((chunks, chunks.new_zeros(len(padding))))
        return StateMetadata(seqs=seqs, interval=self.every // repeats, chunk_blocks_S=blocks_S)


def _table(lengths, positions, rng):
    counts = [-(-length // positions) for length in lengths]
    num = sum(counts) + 3
    ids = 1 + rng.permutation(num - 1)
    rows = np.zeros((len(lengths), max(counts, default=0) + 1), np.int32)
    for b, count in enumerate(counts):
        rows[b, :count], ids = ids[:count], ids[count:]
    return torch.from_numpy(rows), num


def whole(lengths):
    """Return one step of everything."""
    return [_ordered([(b, 0, length) for b, length in enumerate(lengths)])]


def one_by_one(lengths, first=0, most=None):
    """Return steps of a token of each sequence, up to `most`, between a step with the first `first` and one of the rest."""
    done = [min(first, length) for length in lengths]
    steps = [_ordered([(b, 0, start) for b, start in enumerate(done) if start])]
    while any(a < b for a, b in zip(done, lengths, strict=True)) and (most is None or len(steps) <= most):
        steps.append([(b, done[b], done[b] + 1) for b in range(len(lengths)) if done[b] < lengths[b]])
        done = [min(start + 1, length) for start, length in zip(done, lengths, strict=True)]
    steps.append(_ordered([(b, done[b], length) for b, length in enumerate(lengths) if done[b] < length]))
    return [parts for parts in steps if parts]


def random_cuts(lengths, seed, most=90):
    """Return steps of parts of some sequences, in any order."""
    rng = np.random.default_rng(seed)
    done, steps = [0] * len(lengths), []
    while any(a < b for a, b in zip(done, lengths, strict=True)):
        parts = []
        for b in rng.permutation(len(lengths)):
            if done[b] < lengths[b] and rng.random() < 0.7:
                size = 1 if rng.random() < 0.3 else int(rng.integers(1, most))
                end = min(lengths[b], done[b] + size)
                parts.append((int(b), done[b], end))
                done[b] = end
        steps += [_ordered(parts)] if parts else []
    return steps


def _ordered(parts):
    return sorted(parts, key=lambda part: part[2] - part[1] > 1)


def run(steps, blocks, inputs, compute, unused=None):
    """Run steps; return each sequence's outputs.

    Args:
        steps: lists of parts.
        blocks: of the sequences.
        inputs: for each sequence a tuple of tensors, one row a position.
        compute: from the rows of a step, as many tensors, and its metadata to its outputs.
        unused: see `Blocks.metadata`; each has a row of NaN.
    """
    outputs = [[] for _ in inputs]
    for parts in steps:
        tensors = zip(*(tuple(x[start:end] for x in inputs[b]) for b, start, end in parts), strict=True)
        joined = (torch.cat(rows) for rows in tensors)
        padded = (torch.nn.functional.pad(rows, (0, 0, 0, unused or 0), value=float("nan")) for rows in joined)
        y = compute(*padded, blocks.metadata(parts, unused))
        counts = [end - start for _, start, end in parts]
        for (b, _, _), rows in zip(parts, y[: sum(counts)].split(counts), strict=True):
            outputs[b].append(rows.clone())
    return [torch.cat(rows) for rows in outputs]
