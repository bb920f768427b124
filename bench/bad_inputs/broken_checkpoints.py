"""Functions that break a copy of a checkpoint with one file of weights, given its folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from expertwire.kernels.formats import quantize

Change = Callable[[Path], object]

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def without(name: str) -> Change:
    """Remove a file."""
    return lambda folder: (folder / name).unlink()


def renamed(name: str, other: str) -> Change:
    """Rename a file."""
    return lambda folder: (folder / name).rename(folder / other)


def writing(name: str, text: str) -> Change:
    """Write `text` to a file."""
    return lambda folder: (folder / name).write_text(text)


def config(**fields: Any) -> Change:
    """Set fields of config.json; None removes one."""

    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(_merge(json.loads(file.read_text()), fields)))

    return change


def truncate(folder: Path) -> None:
    """Cut off the end of the weights."""
    file = folder / WEIGHTS
    file.write_bytes(file.read_bytes()[:-100])


def header(change: Callable[[dict[str, Any]], object]) -> Change:
    """Change the entries of tensors in the header of the weights."""

    def apply(folder: Path) -> None:
        tensors, data = _read(folder / WEIGHTS)
        change(tensors)
        _write(folder / WEIGHTS, tensors, data)

    return apply


def copied_tensor(name: str, other: str) -> Change:
    """Add a tensor `other` with the values of tensor `name`."""
    return header(lambda tensors: tensors.update({other: tensors[name]}))


def quantized(change: Change) -> Change:
    """Store the experts in FP8, with scales of blocks, then apply `change`."""

    def apply(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        for name in [name for name in tensors if ".experts." in name]:
            packed = quantize("fp8_block", tensors[name])
            tensors |= {name: packed.data, f"{name}_scale_inv": packed.scales}
        save_file(tensors, folder / WEIGHTS)
        config(quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})(folder)
        change(folder)

    return apply


def sharded(change: Change) -> Change:
    """Split the weights into the shards a.safetensors and b.safetensors, with an index, then apply `change`."""

    def apply(folder: Path) -> None:
        tensors, data = _read(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        names = sorted(tensors, key=lambda name: tensors[name]["data_offsets"])
        a, b = names[: len(names) // 2], names[len(names) // 2 :]
        end = tensors[a[-1]]["data_offsets"][1]
        for name in b:
            tensors[name]["data_offsets"] = [offset - end for offset in tensors[name]["data_offsets"]]
        _write(folder / "a.safetensors", {name: tensors[name] for name in a}, data[:end])
        _write(folder / "b.safetensors", {name: tensors[name] for name in b}, data[end:])
        weight_map = dict.fromkeys(a, "a.safetensors") | dict.fromkeys(b, "b.safetensors")
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        change(folder)

    return apply


def index(**entries: str | None) -> Change:
    """Set entries of the index; None removes one."""

    def change(folder: Path) -> None:
        file = folder / INDEX
        weight_map = json.loads(file.read_text())["weight_map"]
        file.write_text(json.dumps({"weight_map": _merge(weight_map, entries)}))

    return change


def _merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in (old | new).items() if value is not None}


def _read(file: Path) -> tuple[dict[str, Any], bytes]:
    """Return the tensors of the header, and the bytes after it."""
    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    tensors = json.loads(data[8:end])
    tensors.pop("__metadata__", None)
    return tensors, data[end:]


def _write(file: Path, tensors: dict[str, Any], data: bytes) -> None:
    text = json.dumps(tensors).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
