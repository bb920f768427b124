"""Choice of the all-to-all backend by topology, libraries and step size: by rules, or by measured times."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args

from expertwire.comm.topology.backend_times import BackendTimes
from expertwire.comm.topology.topology import Topology

Backend = Literal["reference", "nccl", "nvlink"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
# Routed rows of all ranks in a step from which grouped sending takes the host less time than the reference, whose host
# computes indices of all of them. Index work alone, reference and grouped, on one CPU core: 0.16 and 0.21 ms for the
# 1,024 rows of 2 ranks, 0.85 and 0.72 for 8,192; 0.33 and 0.27 for the 4,096 of 8 ranks.
GROUPED_FROM_ROWS = 4096


@dataclass(frozen=True, kw_only=True)
class BackendConditions:
    """Conditions that the choice depends on.

    Args:
        topology: of the ranks.
        device: "cpu" or "cuda".
        step_rows: routed rows of all ranks in the largest step.
        row_bytes: of a dispatched and a combined row, together.
        libraries: those of "gloo" and "nccl" that torch has.
        gpus_shared: several ranks use one GPU.
        buffer_bytes: size of all symmetric buffers of CPU ranks, which are in shared memory.
        shared_bytes: free shared memory of the CPU ranks' node.
    """

    topology: Topology
    device: str
    step_rows: int
    row_bytes: int
    libraries: Collection[str] = ("gloo", "nccl")
    gpus_shared: bool = False
    buffer_bytes: int = 0
    shared_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class BackendChoice:
    """A backend, why it was chosen, and options for its NCCL communicator, by name."""

    name: Backend
    why: str
    nccl: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name}: {self.why}"


SINGLE_RANK = BackendChoice(name="reference", why="there is one rank, and nothing is sent")


def choose(wanted: str, conditions: BackendConditions, table: BackendTimes | None = None) -> BackendChoice:
    """Return the wanted backend, or with "auto" the best that these ranks can use, by measured times if given.

    Raises:
        ValueError: the ranks cannot use it, there is no such backend, or the times are of other ranks.
    """
    assert table is None or wanted == "auto", f"{wanted} by {table}"
    if wanted not in ("auto", *BACKENDS):
        raise ValueError(f"all2all_backend must be one of auto, {', '.join(BACKENDS)}, got {wanted!r}")
    if conditions.topology.num_ranks == 1:
        return SINGLE_RANK
    unusable = {name: found for name in BACKENDS if (found := unusable_reason(name, conditions))}
    allowed = [name for name in BACKENDS if name not in unusable]
    for name in BACKENDS:
        if name == wanted:
            if name in unusable:
                raise ValueError(f"all2all_backend {name!r} cannot be used: {unusable[name]}; {_instead(allowed)}")
            return BackendChoice(name=name, why="it was asked for")
    if not allowed:
        raise ValueError(f"all2all_backend: these ranks can use none: {'; '.join(map(str, unusable.values()))}")
    if table is not None:
        return _measured(table, conditions, allowed)
    if "nvlink" in allowed:
        return BackendChoice(name="nvlink", why=_near(conditions))
    grouped = conditions.step_rows >= GROUPED_FROM_ROWS
    why = (
        f"{unusable['nvlink']}; the largest step has {conditions.step_rows} routed rows, which is "
        f"{'enough' if grouped else 'too few'} for grouped sending (from {GROUPED_FROM_ROWS})"
    )
    if grouped and conditions.topology.rails() is not None:
        why += "; a row crosses to another domain once and is distributed there"
    return BackendChoice(name="nccl" if grouped and "nccl" in allowed else "reference", why=why)


def _measured(table: BackendTimes, conditions: BackendConditions, allowed: list[Backend]) -> BackendChoice:
    table.check(conditions.topology.num_ranks, conditions.device)
    if conditions.topology.num_domains > 1:
        raise ValueError(
            f"all2all_table {table.name!r} was measured on one machine, the ranks are in "
            f"{conditions.topology.num_domains} domains ({conditions.topology}); use none"
        )
    ranks = conditions.topology.num_ranks
    best, *others = table.fastest(ranks, conditions.step_rows / ranks * conditions.row_bytes, allowed)
    options = [f" with {name}={value}" for name, value in best.nccl.items() if value is not None]
    times = [f"{best.p50_us:.0f} us{''.join(options)}", *(f"{each.backend} {each.p50_us:.0f} us" for each in others)]
    why = (
        f"the fastest of those in {table.name}, measured on {table.machine} with {ranks} ranks of {best.tokens} tokens, "
        f"{table.nbytes(best.tokens) / 1e6:.3g} MB a rank: {', '.join(times)}"
    )
    return BackendChoice(name=cast(Backend, best.backend), why=why, nccl=best.nccl)


def _near(conditions: BackendConditions) -> str:
    if conditions.device == "cpu":
        return "all ranks are CPU processes of one machine and write into shared memory"
    return f"all {conditions.topology.num_ranks} ranks are in one NVLink domain and reach each other's memory"


def _instead(allowed: list[Backend]) -> str:
    return f"allowed here are auto, {', '.join(allowed)}" if allowed else "these ranks can use none"


def unusable_reason(backend: Backend, conditions: BackendConditions) -> str:
    """Return why the ranks cannot use a backend; "" if they can."""
    topology = conditions.topology
    if backend == "nvlink":
        if topology.num_domains > 1:
            if conditions.device == "cpu":
                return f"the CPU ranks are on {topology.num_nodes} nodes and share no memory"
            return (
                f"the ranks are in {topology.num_domains} NVLink domains ({topology}), and no rank reaches another's memory "
                "across them (every rank must see all GPUs of its node)"
            )
        if conditions.buffer_bytes > conditions.shared_bytes:
            return (
                f"the ranks' buffers do not fit into shared memory: they need {conditions.buffer_bytes} bytes, and /dev/shm has "
                f"{conditions.shared_bytes} free"
            )
        return ""
    library = "gloo" if conditions.device == "cpu" else "nccl"
    if library not in conditions.libraries:
        return f"{'CPU' if library == 'gloo' else 'GPU'} ranks need a torch with {library}"
    if conditions.device == "cuda" and conditions.gpus_shared:
        return "several ranks share a GPU, which NCCL refuses"
    return ""
