"""Exchanges of rows with known bytes: what ranks send, dispatch and combine must return; and ranks that are threads.

The expected results follow from all ranks' inputs, which each rank can compute. A row identifies itself: its first bytes
are its home rank, its token and the step; the rest is noise.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from expertwire.comm.all_to_all.base import AllToAll, AllToAllSpec
from expertwire.comm.all_to_all.nccl import NcclAllToAll
from expertwire.comm.all_to_all.nvlink import NvlinkAllToAll
from expertwire.comm.all_to_all.nvlink import build as nvlink_over_shared_memory
from expertwire.comm.all_to_all.reference import ReferenceAllToAll
from expertwire.comm.all_to_all.symmetric_buffer import BufferLayout
from expertwire.comm.group import Group
from expertwire.comm.symmetric_memory import slices
from expertwire.moe.eplb.placement import Placement, place

# Width and dtype of dispatched and of combined rows. u8 rows are opaque: 256 fp8 or fp4 values with their scales.
FORMATS = {
    "fp32": (24, torch.float32, None, None),
    "bf16": (40, torch.bfloat16, None, None),
    "fp8 and scales": (256 + 4 * 2, torch.uint8, 256, torch.bfloat16),
    "packed fp4 and scales": (128 + 16, torch.uint8, 256, torch.bfloat16),
    "fp8 and scales, wide": (256 + 4 * 4, torch.uint8, 256, torch.bfloat16),
    "odd widths": (13, torch.uint8, 7, torch.bfloat16),
}
DIFFERENT_STEPS = 15


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """Tokens of the ranks (of the first ranks, if there are fewer; None: varying by step) and how they choose experts."""

    tokens: tuple[int, ...] | None = (5, 3, 7, 4, 0, 2, 9, 6)
    max_tokens: int = 32
    num_experts: int = 16
    top_k: int = 2
    redundant: int = 0
    ids: str = "random"
    form: str = "fp32"

    def spec(self, group: Group, timeout_s: float = 30.0, layers: tuple[int, ...] = (0,)) -> AllToAllSpec:
        size, dtype, combine_size, combine_dtype = FORMATS[self.form]
        return AllToAllSpec(
            group=group,
            rank_offsets=self.placed(group.size).rank_offsets,
            max_tokens=self.max_tokens,
            hidden_size=size,
            top_k=self.top_k,
            dtype=dtype,
            combine_size=combine_size,
            combine_dtype=combine_dtype,
            timeout_s=timeout_s,
            layers=layers,
        )

    def placed(self, size: int) -> Placement:
        """Return the placement; one rank cannot hold a second copy of an expert."""
        return _placed(self.num_experts, size, self.redundant if size > 1 else 0)

    def tokens_of(self, step: int, size: int) -> list[int]:
        if self.tokens is not None:
            return list(self.tokens[:size])
        rng = np.random.default_rng([3, step])
        return np.where(rng.random(size) < 0.2, 0, rng.integers(0, self.max_tokens + 1, size)).tolist()

    def sent(self, rank: int, step: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the bytes of a rank's rows, and its physical ids [T, K]."""
        tokens, rng = self.tokens_of(step, size)[rank], np.random.default_rng([7, rank, step])
        width, dtype, *_ = FORMATS[self.form]
        rows = rng.integers(0, 256, (tokens, width * dtype.itemsize), np.uint8)
        rows[:, 0], rows[:, 1], rows[:, 2] = rank, np.arange(tokens), step % 256
        shape = (tokens, self.top_k)
        logical = rng.random((tokens, self.num_experts)).argsort(axis=1)[:, : self.top_k]
        if self.ids == "holes":
            logical[rng.random(shape) < 0.4] = -1
        elif self.ids == "none":
            logical[:] = -1
        elif self.ids == "last":
            logical[:] = np.arange(self.num_experts - self.top_k, self.num_experts)
        return rows, physical_ids(self.placed(size), rank, logical)

    def expert_rows(self, rows: np.ndarray, physical_R: np.ndarray) -> np.ndarray:
        """Return the outputs of experts, which depend on the row and on the expert."""
        width, dtype, combine_width, combine_dtype = FORMATS[self.form]
        nbytes = (combine_width or width) * (combine_dtype or dtype).itemsize
        out = np.resize(rows.T, (nbytes, len(rows))).T.copy() if len(rows) else np.zeros((0, nbytes), np.uint8)
        out[:, 3:] += (physical_R[:, None] * 31 + 1).astype(np.uint8)
        return out

    def dispatched(self, rank: int, step: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        """Return rows by expert, home rank, token, k; the expert of each; offsets; and the number of distinct rows."""
        first, last = self.placed(size).rank_offsets[rank : rank + 2]
        sent = [self.sent(home, step, size) for home in range(size)]
        parts = [rows[np.nonzero(ids == e)[0]] for e in range(first, last) for rows, ids in sent]
        counts = [sum(int((ids == e).sum()) for _, ids in sent) for e in range(first, last)]
        unique = sum(int(((ids >= first) & (ids < last)).any(axis=1).sum()) for _, ids in sent)
        experts = np.repeat(np.arange(first, last), counts)
        return np.concatenate(parts), experts, np.cumsum([0, *counts]), unique

    def combined(self, rank: int, step: int, size: int) -> np.ndarray:
        """Return bytes [T, K, D'], zeros where there was no expert."""
        rows, physical = self.sent(rank, step, size)
        slots = self.expert_rows(np.repeat(rows, self.top_k, axis=0), physical.ravel())
        slots[physical.ravel() < 0] = 0
        return slots.reshape(*physical.shape, slots.shape[1])


_placed = functools.cache(place)


@functools.cache
def _expected(case: Exchange, rank: int, step: int, size: int) -> tuple[Any, ...]:
    """Return the rows that a rank sends, those dispatched to it, and those combined for it."""
    return case.sent(rank, step, size), case.dispatched(rank, step, size), case.combined(rank, step, size)


def physical_ids(placement: Placement, rank: int, logical: np.ndarray) -> np.ndarray:
    """Return physical ids as `moe.layer` does, -1 for -1."""
    table = placement.log2phy(rank)
    turns = np.arange(len(logical))[:, None] % len(table)
    return np.where(logical < 0, -1, table[turns, logical])


def take_part(all_to_all: AllToAll, case: Exchange, rank: int, size: int, step: int, pause: Callable[[], None]) -> None:
    """Run and check one rank's four phases of a step. `pause` is called before each."""
    for _ in phases(all_to_all, case, rank, size, step):
        pause()


def take_part_together(ranks: Sequence[AllToAll], case: Exchange, step: int, **padding: Any) -> None:
    """Run ranks of one thread: each phase of all of them, then the next."""
    together = [phases(rank, case, i, len(ranks), step, **padding) for i, rank in enumerate(ranks)]
    for _ in zip(*together, strict=True):
        pass


def phases(
    all_to_all: AllToAll,
    case: Exchange,
    rank: int,
    size: int,
    step: int,
    padded_to: int = 0,
) -> Iterator[None]:
    """Run a step; each `yield` precedes a phase. `padded_to`: rows of every rank, of which only the first are valid."""
    width, dtype, combine_width, combine_dtype = FORMATS[case.form]
    (rows, physical), (expected, experts, offsets, unique), expected_combined = _expected(case, rank, step, size)
    x, ids, counts = as_dtype(rows, dtype), torch.from_numpy(physical), [case.tokens_of(step, size)]
    if padded_to:
        counts = [[padded_to] * size, torch.tensor([len(x)], dtype=torch.int32)]
        x = torch.cat((x, x.new_ones(padded_to - len(x), width)))
        ids = torch.cat((ids, ids.new_zeros(padded_to - len(ids), case.top_k)))
    yield
    handle = all_to_all.dispatch_send(x, ids, *counts)
    yield
    arrived = all_to_all.dispatch_recv(handle)
    assert arrived.expert_offsets.tolist() == offsets.tolist(), f"rank {rank}, step {step}"
    index = arrived.row_index_R[: offsets[-1]].long()
    found = as_bytes(arrived.x_UD[index])
    assert_equal(found, expected, f"rank {rank}, step {step}: dispatched rows")
    if size > 1:
        assert len(set(index.tolist())) == unique, f"rank {rank}, step {step}: a token's row has been sent twice"
    y = as_dtype(case.expert_rows(found, experts), combine_dtype or dtype)
    if arrived.home_R is not None:
        placed = y.new_zeros(len(arrived.row_index_R), y.shape[1])
        placed[arrived.home_R[: len(y)].long()] = y
        y = placed
    yield
    handle = all_to_all.combine_send(handle, y)
    yield
    combined = all_to_all.combine_recv(handle)
    assert combined.shape[2] == (combine_width or width)
    assert_equal(as_bytes(combined[: len(rows)]), expected_combined, f"rank {rank}, step {step}: combined rows")


def as_dtype(rows: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(rows.ravel()).view(dtype).view(len(rows), rows.shape[1] // dtype.itemsize)


def as_bytes(rows: torch.Tensor) -> np.ndarray:
    shape = *rows.shape[:-1], rows.shape[-1] * rows.dtype.itemsize
    return rows.flatten().view(torch.uint8).view(shape).numpy()


def assert_equal(found: np.ndarray, expected: np.ndarray, what: str) -> None:
    assert found.shape == expected.shape, f"{what}: {found.shape}, not {expected.shape}"
    wrong = np.argwhere(found != expected)
    assert not len(wrong), (
        f"{what}: byte {wrong[0].tolist()} of {len(wrong)} is {found[tuple(wrong[0])]}, not {expected[tuple(wrong[0])]}"
    )


def run_exchange(group: Group, backend: str, case: Exchange, steps: int, slow: float = 0.0) -> None:
    """Run a rank's part of some steps; with probability `slow` it sleeps before a phase."""
    all_to_all, rng = build(backend, case.spec(group)), np.random.default_rng(group.rank)

    def pause() -> None:
        if rng.random() < slow:
            time.sleep(rng.random() * 4e-3)

    for step in range(steps):
        take_part(all_to_all, case, group.rank, group.size, step % DIFFERENT_STEPS, pause)


def build(backend: str, spec: AllToAllSpec) -> AllToAll:
    if backend == "nvlink over slices":
        return NvlinkAllToAll(spec, spec.group.memories(BufferLayout.of(spec).nbytes))
    return {
        "reference": ReferenceAllToAll,
        "nccl over gloo": NcclAllToAll,
        "nvlink over shared memory": nvlink_over_shared_memory,
    }[backend](spec)


@dataclass
class _Meeting:
    barrier: threading.Barrier
    memories: list[torch.Tensor] = field(default_factory=list)


class ThreadGroup:
    """A rank that is a thread and shares memory with the others."""

    def __init__(self, rank: int, size: int, meeting: _Meeting) -> None:
        self.rank, self.size, self._meeting = rank, size, meeting

    def memories(self, nbytes: int) -> list[torch.Tensor]:
        self.barrier()
        if self.rank == 0:
            self._meeting.memories = slices(self.size, nbytes)
        self.barrier()
        return self._meeting.memories

    def barrier(self) -> None:
        self._meeting.barrier.wait(30)


class Threads:
    """Ranks of one process, with the interface of `ranks.Ranks`."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __enter__(self) -> Threads:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        meeting = _Meeting(threading.Barrier(self.size))
        with ThreadPoolExecutor(self.size) as pool:
            groups = [ThreadGroup(rank, self.size, meeting) for rank in range(self.size)]
            return [answer.result() for answer in [pool.submit(function, group, *args) for group in groups]]
