"""Which all-to-all suits the ranks: from where they are, what they are joined by, and how much a step moves; by rules, or by
what a sweep has measured. Pure; says why.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from expertwire.comm.topology.backend_times import Table
from expertwire.comm.topology.topology import Topology

Backend = Literal["reference", "nccl", "nvlink"]
BACKENDS: tuple[Backend, ...] = ("reference", "nccl", "nvlink")
# Routed rows of all ranks in a step from which grouped sending takes the host less time than the reference, whose host goes
# through all of them. Index work alone, reference and grouped, on one core of a CPU: 0.16 and 0.21 ms for the 1,024 rows of
# 2 ranks, 0.85 and 0.72 for 8,192; 0.33 and 0.27 for the 4,096 of 8 ranks.
GROUPED_FROM_ROWS = 4096


@dataclass(frozen=True, kw_only=True)
class Situation:
    """What the choice depends on.

    Args:
        topology: of the ranks.
        device: "cpu" or "cuda".
        step_rows: routed rows of all ranks in the largest step.
        row_bytes: of a row that goes out and one that comes home, together.
        libraries: those of "gloo" and "nccl" that torch has.
        gpus_shared: several ranks have one GPU.
        arena_fits: the ranks' arenas fit into shared memory; only asked of CPU ranks.
    """

    topology: Topology
    device: str
    step_rows: int
    row_bytes: int
    libraries: Collection[str] = ("gloo", "nccl")
    gpus_shared: bool = False
    arena_fits: bool = True


@dataclass(frozen=True, kw_only=True)
class Choice:
    """`name`: the backend; `why`: in words; `nccl`: options of the communicator that it shall have, by name."""

    name: Backend
    why: str
    nccl: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name}: {self.why}"


def choose(wanted: str, here: Situation, table: Table | None = None) -> Choice:
    """The backend that was asked for, or with "auto" the best that these ranks can use: by a table, if there is one.

    Raises:
        ValueError: they cannot use it, there is no such backend, or the table is not one of ranks like these.
    """
    assert table is None or wanted == "auto", f"{wanted} by {table}"
    if wanted not in ("auto", *BACKENDS):
        raise ValueError(f"all_to_all must be one of auto, {', '.join(BACKENDS)}, got {wanted!r}")
    if here.topology.num_ranks == 1:
        return Choice(name="reference", why="there is one rank, and nothing travels")
    obstacles = {name: found for name in BACKENDS if (found := obstacle(name, here))}
    allowed = [name for name in BACKENDS if name not in obstacles]
    for name in BACKENDS:
        if name == wanted:
            if name in obstacles:
                raise ValueError(f"all2all_backend {name!r} cannot be used: {obstacles[name]}; {_instead(allowed)}")
            return Choice(name=name, why="it was asked for")
    if not allowed:
        raise ValueError(f"all2all_backend: these ranks can use none: {'; '.join(map(str, obstacles.values()))}")
    if table is not None:
        return _measured(table, here, allowed)
    if "nvlink" in allowed:
        return Choice(name="nvlink", why=_near(here))
    grouped = here.step_rows >= GROUPED_FROM_ROWS
    why = (
        f"{obstacles['nvlink']}; the largest step has {here.step_rows} routed rows, which is "
        f"{'enough' if grouped else 'too few'} for grouped sending (from {GROUPED_FROM_ROWS})"
    )
    if grouped and here.topology.rails() is not None:
        why += "; a row crosses to another domain once and is handed out there"
    return Choice(name="nccl" if grouped and "nccl" in allowed else "reference", why=why)


def _measured(table: Table, here: Situation, allowed: list[Backend]) -> Choice:
    table.check(here.topology.num_ranks, here.device)
    if here.topology.num_domains > 1:
        raise ValueError(
            f"all2all_table {table.name!r} was measured on one machine, the ranks are in {here.topology.num_domains} domains "
            f"({here.topology}); use none"
        )
    ranks = here.topology.num_ranks
    best, *others = table.fastest(ranks, here.step_rows / ranks * here.row_bytes, allowed)
    options = [f" with {name}={value}" for name, value in best.nccl.items() if value is not None]
    times = [f"{best.p50_us:.0f} us{''.join(options)}", *(f"{each.backend} {each.p50_us:.0f} us" for each in others)]
    why = (
        f"the fastest of those in {table.name}, measured on {table.machine} with {ranks} ranks of {best.tokens} tokens, "
        f"{table.nbytes(best.tokens) / 1e6:.3g} MB a rank: {', '.join(times)}"
    )
    return Choice(name=cast(Backend, best.backend), why=why, nccl=best.nccl)


def _near(here: Situation) -> str:
    if here.device == "cpu":
        return "all ranks are CPU processes of one machine and write into shared memory"
    return f"all {here.topology.num_ranks} ranks are in one NVLink domain and reach each other's memory"


def _instead(allowed: list[Backend]) -> str:
    return f"allowed here are auto, {', '.join(allowed)}" if allowed else "these ranks can use none"


def obstacle(backend: Backend, here: Situation) -> str:
    """Why the ranks cannot use a backend; "" if they can."""
    topology = here.topology
    if backend == "nvlink":
        if topology.num_domains > 1:
            if here.device == "cpu":
                return f"the CPU ranks are on {topology.num_nodes} nodes and share no memory"
            return (
                f"the ranks are in {topology.num_domains} NVLink domains ({topology}), and no rank reaches another's memory "
                "across them (every rank must see all GPUs of its node)"
            )
        if here.device == "cpu" and not here.arena_fits:
            return "the ranks' arenas do not fit into the shared memory of /dev/shm"
        return ""
    library = "gloo" if here.device == "cpu" else "nccl"
    if library not in here.libraries:
        return f"{'CPU' if library == 'gloo' else 'GPU'} ranks need a torch with {library}"
    if here.device == "cuda" and here.gpus_shared:
        return "several ranks share a GPU, which NCCL refuses"
    return ""
