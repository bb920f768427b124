"""Measured times of the all-to-all backends, to choose the fastest for steps of some size.

The file is JSON, as `expertwire bench all-to-all --sweep FILE` writes it:

    {"machine": {"device": "cpu" or "cuda", "name": ...}, "row_bytes": of a dispatched and a combined row, "top_k": K,
     "entries": [{"ranks": P, "tokens": of a rank, "backend": ..., "nccl": {options of the communicator}, "p50_us": both phases}]}

All ranks of a sweep are on one machine, in one NVLink domain.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from expertwire.comm.topology.json_fields import check_fields, list_of, positive_int, read_file, text_of

NCCL_OPTIONS = ("min_ctas", "max_ctas")


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One measurement: `p50_us` of dispatch and combine together, with `tokens` on each rank."""

    ranks: int
    tokens: int
    backend: str
    nccl: Mapping[str, Any]
    p50_us: float


@dataclass(frozen=True, kw_only=True)
class BackendTimes:
    """Measurements of a file. `name`: the file; `device`: "cpu" or "cuda"; `machine`: its name."""

    name: str
    device: str
    machine: str
    row_bytes: int
    top_k: int
    entries: tuple[Measurement, ...]

    def fastest(self, ranks: int, nbytes: float, backends: Collection[str]) -> list[Measurement]:
        """Return the best measurement of each backend, fastest first, at the number of tokens closest to `nbytes` a rank.

        Raises:
            ValueError: no backend was measured with this number of ranks.
        """
        fitting = [entry for entry in self.entries if entry.ranks == ranks and entry.backend in backends]
        if not fitting:
            measured = sorted({entry.backend for entry in self.entries if entry.ranks == ranks})
            raise ValueError(
                f"all2all_table {self.name!r} has no time of {' or '.join(backends)} with {ranks} ranks, only of "
                f"{', '.join(measured)}"
            )
        tokens = min(
            {entry.tokens for entry in fitting}, key=lambda tokens: abs(math.log(self.nbytes(tokens) / nbytes))
        )
        found: dict[str, Measurement] = {}
        for entry in sorted(fitting, key=lambda entry: entry.p50_us):
            if entry.tokens == tokens:
                found.setdefault(entry.backend, entry)
        return list(found.values())

    def check(self, ranks: int, device: str) -> None:
        """Check that the measurements are of this number of ranks and device.

        Raises:
            ValueError: they are not.
        """
        if device != self.device:
            raise ValueError(
                f"all2all_table {self.name!r} was measured on {self.device}, the ranks are on {device}; use one of this device"
            )
        if ranks not in (measured := sorted({entry.ranks for entry in self.entries})):
            raise ValueError(
                f"all2all_table {self.name!r} was measured with {' and '.join(map(str, measured))} ranks, not with {ranks}"
            )

    def nbytes(self, tokens: int) -> int:
        """Return the bytes of a rank's routed rows, dispatched and combined."""
        return tokens * self.top_k * self.row_bytes


def read(path: str) -> BackendTimes:
    """Return the measurements of a file.

    Raises:
        ValueError: the file cannot be read, or has an error; names the field.
    """
    return read_file("all2all_table", path, lambda data: _parse(path, data))


def _parse(name: str, data: Any) -> BackendTimes:
    check_fields("the file", data, {"machine", "row_bytes", "top_k", "entries"})
    machine = data["machine"]
    check_fields("machine", machine, {"device", "name"}, set(machine) if isinstance(machine, dict) else ())
    if machine["device"] not in ("cpu", "cuda"):
        raise ValueError(f"device of machine must be one of cpu, cuda, got {machine['device']!r}")
    return BackendTimes(
        name=name,
        device=machine["device"],
        machine=text_of("name of machine", machine["name"]),
        row_bytes=positive_int("row_bytes", data["row_bytes"]),
        top_k=positive_int("top_k", data["top_k"]),
        entries=tuple(map(_entry, list_of("entries", data["entries"]))),
    )


def _entry(data: Any) -> Measurement:
    check_fields("an entry", data, {"ranks", "tokens", "backend", "nccl", "p50_us"})
    check_fields("nccl of an entry", data["nccl"], (), NCCL_OPTIONS)
    us = data["p50_us"]
    if isinstance(us, bool) or not isinstance(us, (int, float)) or not us > 0:
        raise ValueError(f"p50_us of an entry must be a number > 0, got {us!r}")
    return Measurement(
        ranks=positive_int("ranks of an entry", data["ranks"]),
        tokens=positive_int("tokens of an entry", data["tokens"]),
        backend=text_of("backend of an entry", data["backend"]),
        nccl=dict(data["nccl"]),
        p50_us=us,
    )
