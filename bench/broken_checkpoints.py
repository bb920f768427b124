"""Ways to break a copy of a checkpoint folder that has one file of weights.

Each is a function of the folder, or makes one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Change = Callable[[Path], object]


def without(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


def renamed(name: str, other: str) -> Change:
    return lambda folder: (folder / name).rename(folder / other)


def writing(name: str, text: str) -> Change:
    return lambda folder: (folder / name).write_text(text)


def config(**fields: Any) -> Change:
    """Set fields of config.json; None removes one."""

    def change(folder: Path) -> None:
        file = folder / "config.json"
        values = json.loads(file.read_text()) | fields
        file.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))

    return change


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _read(file: Path) -> tuple[dict[str, Any], bytes]:
    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def _write(file: Path, header: dict[str, Any], data: bytes) -> None:
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def header(change: Callable[[dict[str, Any]], object]) -> Change:
    """Change the header of model.safetensors."""

    def apply(folder: Path) -> None:
        header, data = _read(folder / "model.safetensors")
        change(header)
        _write(folder / "model.safetensors", header, data)

    return apply


def sharded(change: Change) -> Change:
    """Split model.safetensors into the shards a and b, whose tensors keep their places, and change the folder then."""

    def apply(folder: Path) -> None:
        header, data = _read(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        names = sorted((name for name in header if name != "__metadata__"), key=lambda n: header[n]["data_offsets"])
        half = len(names) // 2
        end = header[names[half - 1]]["data_offsets"][1]
        for name in names[half:]:
            header[name]["data_offsets"] = [offset - end for offset in header[name]["data_offsets"]]
        parts = {"a.safetensors": (names[:half], data[:end]), "b.safetensors": (names[half:], data[end:])}
        for file, (inside, part) in parts.items():
            _write(folder / file, {name: header[name] for name in inside}, part)
        weight_map = {name: file for file, (inside, _) in parts.items() for name in inside}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        change(folder)

    return apply


def index(entries: dict[str, str | None]) -> Change:
    """Set entries of the index; None removes one."""

    def change(folder: Path) -> None:
        file = folder / "model.safetensors.index.json"
        weight_map = json.loads(file.read_text())["weight_map"] | entries
        file.write_text(json.dumps({"weight_map": {n: f for n, f in weight_map.items() if f is not None}}))

    return change
