"""Times of the all-to-all backends as a sweep has measured them, and which of them was the fastest for steps of some size.

The file is JSON, as `expertwire bench all-to-all --sweep FILE` writes it:

    {"machine": {"device": "cpu" or "cuda", "name": ...}, "row_bytes": of a row that goes out and one that comes home, "top_k": K,
     "entries": [{"ranks": P, "tokens": of a rank, "backend": ..., "nccl": {options of the communicator}, "p50_us": both phases}]}

All ranks of a sweep are on one machine, in one NVLink domain. Pure.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expertwire.comm.topology.topology import check_fields, check_items, check_text

NCCL_OPTIONS = ("min_ctas", "max_ctas")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One measurement: `p50_us` of dispatch and combine together, with `tokens` on each rank."""

    ranks: int
    tokens: int
    backend: str
    nccl: Mapping[str, Any]
    p50_us: float


@dataclass(frozen=True, kw_only=True)
class Table:
    """What a file holds. `name`: the file; `device`: "cpu" or "cuda"; `machine`: its name."""

    name: str
    device: str
    machine: str
    row_bytes: int
    top_k: int
    entries: tuple[Entry, ...]

    def fastest(self, ranks: int, nbytes: float, backends: Collection[str]) -> list[Entry]:
        """One entry of each of the backends that was measured, fastest first, for the number of tokens whose rows are closest to
        `nbytes` a rank.

        Raises:
            ValueError: none of them was measured with as many ranks.
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
        found: dict[str, Entry] = {}
        for entry in sorted(fitting, key=lambda entry: entry.p50_us):
            if entry.tokens == tokens:
                found.setdefault(entry.backend, entry)
        return list(found.values())

    def check(self, ranks: int, device: str) -> None:
        """Whether it is one of as many ranks on such a device.

        Raises:
            ValueError: it is not.
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
        """Of a rank's routed rows, out and home."""
        return tokens * self.top_k * self.row_bytes


def read(path: str) -> Table:
    """The table of a file.

    Raises:
        ValueError: there is no such file, or it says something wrong; the message names the field.
    """
    try:
        return _parse(path, json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"all2all_table must be a readable file, got {path!r}: {error}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"all2all_table {path!r} is not JSON: {error}") from None
    except ValueError as error:
        raise ValueError(f"all2all_table {path!r}: {error}") from None


def _parse(name: str, data: Any) -> Table:
    check_fields("the file", data, {"machine", "row_bytes", "top_k", "entries"})
    machine = data["machine"]
    check_fields("machine", machine, {"device", "name"}, set(machine) if isinstance(machine, dict) else ())
    if machine["device"] not in ("cpu", "cuda"):
        raise ValueError(f"device of machine must be one of cpu, cuda, got {machine['device']!r}")
    return Table(
        name=name,
        device=machine["device"],
        machine=check_text("name of machine", machine["name"]),
        row_bytes=_positive("row_bytes", data["row_bytes"]),
        top_k=_positive("top_k", data["top_k"]),
        entries=tuple(map(_entry, check_items("entries", data["entries"]))),
    )


def _entry(data: Any) -> Entry:
    check_fields("an entry", data, {"ranks", "tokens", "backend", "nccl", "p50_us"})
    check_fields("nccl of an entry", data["nccl"], (), NCCL_OPTIONS)
    us = data["p50_us"]
    if isinstance(us, bool) or not isinstance(us, (int, float)) or not us > 0:
        raise ValueError(f"p50_us of an entry must be a number > 0, got {us!r}")
    return Entry(
        ranks=_positive("ranks of an entry", data["ranks"]),
        tokens=_positive("tokens of an entry", data["tokens"]),
        backend=check_text("backend of an entry", data["backend"]),
        nccl=dict(data["nccl"]),
        p50_us=us,
    )


def _positive(what: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{what} must be an integer >= 1, got {value!r}")
    return value
