"""A Hugging Face checkpoint folder and where each of its tensors lies. No weight is read and no torch is needed.

A safetensors file is an 8-byte little-endian length, a JSON header of that length, and the data
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from expertwire.engine.models.hf_config import parse_json, read_json
from expertwire.scheduler.config import is_int

# Bytes of an element; a type that is not listed is an error only if its tensor is needed.
ITEM_SIZES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
# The format's own limit is 100 MB, of which Python can make 3 GB of objects. An entry has about 130 bytes.
MAX_HEADER_BYTES = 32 << 20
_MAX_DIMS = 64  # as in torch


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """The place of a tensor's bytes; `dtype` is safetensors' name, such as "BF16", and `offset` counts from the file's start."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class Checkpoint:
    """The tensors of a folder's safetensors files, whose headers are all read and verified.

    `model.safetensors` is used if it exists, else the shards of `model.safetensors.index.json` (transformers' order).

    Args:
        path: the folder.

    Attributes:
        tensors: the tensors by name.

    Raises:
        ValueError: there are no weights or only pickled ones; a shard is missing, truncated or damaged; the index lists a tensor
            that its file does not hold, or leaves one out. The message names the file and the fault.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = checkpoint_folder(path)
        single, index = self.path / "model.safetensors", self.path / "model.safetensors.index.json"
        if single.is_file():
            self.tensors: Mapping[str, StoredTensor] = _read_header(single)
        elif index.is_file():
            self.tensors = _read_indexed(index)
        else:
            raise ValueError(_no_weights(self.path))

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors."""
        return sum(stored.nbytes for stored in self.tensors.values())


def _no_weights(folder: Path) -> str:
    if any(folder.glob("*.safetensors")):
        return f"{folder} has safetensors files, but neither model.safetensors nor model.safetensors.index.json"
    for pattern in ("*.bin", "*.pt", "*.pth"):
        if any(folder.glob(pattern)):
            return f"{folder} has only pickled weights ({pattern}), which are not loaded; save them as safetensors"
    return f"{folder} has no weights (model.safetensors or model.safetensors.index.json with its shards)"


def _read_indexed(index: Path) -> dict[str, StoredTensor]:
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(f, str) and f == Path(f).name for f in files.values()):
        raise ValueError(f"{index}: weight_map must map tensor names to file names in the same folder")
    shards = {}
    for shard in sorted(set(files.values())):
        if not (index.parent / shard).is_file():
            raise ValueError(f"{index.parent} lacks {shard}, which {index.name} lists")
        shards[shard] = _read_header(index.parent / shard)
    absent = [f"{name} ({file})" for name, file in files.items() if name not in shards[file]]
    if absent:
        raise ValueError(f"{index} lists tensors that their files do not hold: {first_ten(absent)}")
    unlisted = [f"{name} ({file})" for file, tensors in shards.items() for name in tensors if name not in files]
    if unlisted:
        raise ValueError(f"{index} does not list tensors that the files hold: {first_ten(unlisted)}")
    return {name: shards[file][name] for name, file in files.items()}


def _read_header(file: Path) -> dict[str, StoredTensor]:
    size = file.stat().st_size
    with file.open("rb") as opened:
        prefix = opened.read(8)
        length = int.from_bytes(prefix, "little")
        if prefix == b"version ":
            raise ValueError(f"{file} is a git-lfs pointer, not the weights; run `git lfs pull`")
        if len(prefix) < 8:
            raise ValueError(f"{file} is not a safetensors file ({size} bytes)")
        if length > MAX_HEADER_BYTES:
            raise ValueError(
                f"{file} is not a safetensors file, or its header is too large: {length} bytes in a file of {size}; at most "
                f"{MAX_HEADER_BYTES} are allowed"
            )
        if 8 + length > size:
            raise ValueError(f"{file} is truncated: {size} bytes, its header alone should end at {8 + length}")
        header_bytes = opened.read(length)
    header = parse_json(header_bytes, f"{file}: the header")
    header.pop("__metadata__", None)
    tensors = {name: _stored(file, 8 + length, name, entry) for name, entry in header.items()}
    expected = max((t.offset + t.nbytes for t in tensors.values()), default=8 + length)
    if size != expected:
        kind = "is truncated" if size < expected else "is too long"
        raise ValueError(f"{file} {kind}: {size} bytes, expected {expected} from its header")
    return tensors


def _stored(file: Path, data_start: int, name: str, entry: object) -> StoredTensor:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)]} if (
            0 <= begin <= end
            and len(shape) <= _MAX_DIMS
            and all(is_int(n) and 0 <= n < 2**63 for n in shape)
            and (dtype not in ITEM_SIZES or end - begin == math.prod(shape) * ITEM_SIZES[dtype])
        ):
            return StoredTensor(
                file=file, dtype=dtype, shape=tuple(shape), offset=data_start + begin, nbytes=end - begin
            )
        case _:
            raise ValueError(f"{file}: the header's entry of {name} is damaged: {entry!r:.200}")


def first_ten(names: Iterable[str]) -> str:
    """Return the first ten names and the number of others."""
    names = list(names)
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(names[:10]) + more


def checkpoint_folder(path: str | Path) -> Path:
    """Return the folder `path`; raise ValueError if it does not exist."""
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(
            f"model: there is no folder {str(path)!r}; give the folder of a downloaded Hugging Face checkpoint, or a name on "
            "the hub"
        )
    return folder
