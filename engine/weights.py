"""Filling a rank's parameters: from a checkpoint, reading only the bytes that this rank needs, or with random weights.

Bytes are read with plain reads into one small buffer instead of a mapping of the file: a mapping's pages count as the
process's memory, and a file that shrinks under it kills the process.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import mmap
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from itertools import groupby
from pathlib import Path

import psutil
import torch
from tqdm import tqdm

from expertwire.engine.checkpoint import Checkpoint, StoredTensor, some
from expertwire.engine.weight_map import Destination, ParamSpec, WeightMap

STORED_DTYPES = {
    "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu, "I32": torch.int32, "U8": torch.uint8, "I8": torch.uint8,
}  # fmt: skip
# What may be loaded into a parameter of a type: floating-point numbers are rounded; 4-bit numbers are bytes, whatever these
# are called; powers of two may be kept as their exponents.
_FLOATS = ("F32", "BF16", "F16")
ACCEPTED = {
    torch.float32: (*_FLOATS, "F8_E8M0"),
    torch.bfloat16: _FLOATS,
    torch.float8_e4m3fn: ("F8_E4M3",),
    torch.int32: ("I32",),
    torch.uint8: ("U8", "I8", "F8_E8M0"),
}
CHUNK_BYTES = 16 << 20
HUGE_PAGE_BYTES = 2 << 20
NOISE_SIZE = 1 << 18  # random values drawn at a time; fits a core's cache


def allocate(specs: Mapping[str, ParamSpec], dtype: torch.dtype, device: torch.device | str) -> dict[str, torch.Tensor]:
    """Uninitialised contiguous parameters; call `check_memory` with `nbytes(specs, dtype)` first."""
    return {name: _empty(spec.shape, spec.dtype or dtype, torch.device(device)) for name, spec in specs.items()}


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < HUGE_PAGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    # Reading weights is what few rows cost, and a page of 4 KB every few hundred cycles costs a tenth of it.
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def nbytes(specs: Mapping[str, ParamSpec], dtype: torch.dtype) -> int:
    """Bytes of the parameters that `allocate` makes."""
    return sum((spec.dtype or dtype).itemsize * math.prod(spec.shape) for spec in specs.values())


def load_weights(
    checkpoint: Checkpoint,
    weight_map: WeightMap,
    params: Mapping[str, torch.Tensor],
    *,
    skipped: Sequence[str] = (),
    progress: bool,
) -> None:
    """Fills `params` in place from the checkpoint, converting between float32, bfloat16 and float16 (rounding to nearest).

    Everything is checked from the headers before a byte is read. A map's entry without destinations may be missing in the
    checkpoint. Extra memory: one buffer of 16 MiB, or of the longest row (index of the first dimension) of a tensor.

    Args:
        checkpoint: where the tensors are.
        weight_map: for every tensor of the checkpoint, where it goes on this rank.
        params: filled completely; on one device.
        skipped: regular expressions of whole names of tensors that are knowingly not read.
        progress: show a bar on stderr.

    Raises:
        ValueError: a tensor that the map does not know, one it needs that is missing, of a wrong shape or of an unsupported
            stored type, a parameter that would not be filled, a file that changed: names the tensor, parameter or file.
    """
    check(checkpoint, weight_map, params, skipped)
    wanted = [(checkpoint.tensors[name], destinations) for name, destinations in weight_map.items() if destinations]
    wanted.sort(key=lambda item: (item[0].file, item[0].offset))
    reads = [(stored, read) for stored, destinations in wanted for read in _reads(stored, destinations)]
    longest = max((read.unit_bytes for _, read in reads), default=0)
    on_cuda = any(param.is_cuda for param in params.values())
    buffer = torch.empty(max(CHUNK_BYTES, longest), dtype=torch.uint8, pin_memory=on_cuda)
    total = sum(read.nbytes for _, read in reads)
    with tqdm(total=total, desc="loading weights", unit="B", unit_scale=True, disable=not progress) as bar:
        for path, in_file in groupby(enumerate(reads, 1), key=lambda item: item[1][0].file):
            with path.open("rb", buffering=0) as file:
                for number, (stored, read) in in_file:
                    _copy(file, stored, read, params, buffer)
                    bar.set_postfix_str(f"{number}/{len(reads)} tensors", refresh=False)
                    bar.update(read.nbytes)


def dummy_weights(specs: Mapping[str, ParamSpec], params: Mapping[str, torch.Tensor], seed: int) -> None:
    """Fills `params` with normal(0, 1/sqrt(fan_in)) values, or ones where `fan_in` is None.

    Values depend on the seed, the parameter's name, the expert and the type of device, not on what else a rank holds: so they are
    equal on all ranks and at any number of them. Extra memory: about 2 MiB.
    """
    for name, spec in specs.items():
        if spec.fan_in is None and spec.value is not None:
            params[name].copy_(torch.tensor(spec.value))
        elif spec.experts is None:
            _fill_random(params[name], f"{seed}/{name}", spec.fan_in)
        else:
            for values, expert in zip(params[name], spec.experts, strict=True):
                _fill_random(values, f"{seed}/{name}/{expert}", spec.fan_in)


def _fill_random(param: torch.Tensor, key: str, fan_in: int | None) -> None:
    """Normal numbers, or bits if `fan_in` is None."""
    values = param.view(-1)
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    generator = torch.Generator(values.device).manual_seed(int.from_bytes(digest, "little") >> 1)
    if fan_in is None:
        raw = values.view(torch.uint8)
        torch.randint(0, 256, raw.shape, dtype=torch.uint8, device=raw.device, generator=generator, out=raw)
        return
    noise = torch.empty(min(NOISE_SIZE, values.numel()), dtype=torch.float32, device=values.device)
    for chunk in values.split(NOISE_SIZE):
        chunk.copy_(noise[: len(chunk)].normal_(0, fan_in**-0.5, generator=generator))


def check(
    checkpoint: Checkpoint, weight_map: WeightMap, params: Mapping[str, torch.Tensor], skipped: Sequence[str] = ()
) -> None:
    """Raises as `load_weights` does unless the map uses or ignores every tensor and fills every parameter, exactly once.

    Only the parameters' shapes and types count: they may be on the device "meta".
    """
    unread = re.compile("|".join(f"(?:{pattern})" for pattern in skipped) or "(?!)")
    unknown = [name for name in checkpoint.names() if name not in weight_map and not unread.fullmatch(name)]
    if unknown:
        raise ValueError(f"{checkpoint.path}: the model does not know these tensors: {some(unknown)}")
    wanted = {name: destinations for name, destinations in weight_map.items() if destinations}
    missing = [name for name in wanted if name not in checkpoint.tensors]
    if missing:
        raise ValueError(f"{checkpoint.path}: the model needs tensors that are missing: {some(missing)}")
    _check_filled(wanted.values(), params)
    misshapen = []
    for name, destinations in wanted.items():
        found, expected = checkpoint.shape(name), {d.expected(tuple(params[d.param].shape)) for d in destinations}
        if expected != {found}:
            misshapen.append(
                f"{name} is {list(found)}, expected {' and '.join(str(list(s)) for s in sorted(expected))}"
            )
    if misshapen:
        raise ValueError(f"{checkpoint.path}: wrong shapes: {some(misshapen)}")
    unsupported = [
        f"{name} ({checkpoint.dtype(name)}, allowed: {', '.join(accepted)})"
        for name, destinations in wanted.items()
        if checkpoint.dtype(name) not in (accepted := ACCEPTED[params[destinations[0].param].dtype])
    ]
    if unsupported:
        raise ValueError(f"{checkpoint.path}: tensors of a type that is not supported there: {some(unsupported)}")


Box = tuple[tuple[int, int], ...]  # [start, stop) along each dimension


def _check_filled(wanted: Iterable[Sequence[Destination]], params: Mapping[str, torch.Tensor]) -> None:
    boxes: dict[str, list[Box]] = {name: [] for name in params}
    for destinations in wanted:
        for d in destinations:
            assert d.param in params, f"the weight map fills {d.param}, which is no parameter of this rank"
            boxes[d.param].append(_box(d, params[d.param].shape))
    unfilled = []
    for name, param in params.items():
        filled = sum(math.prod(stop - start for start, stop in box) for box in boxes[name])
        if filled < param.numel():
            unfilled.append(f"{name} ({filled} of {param.numel()} elements)")
        else:
            assert _tile(boxes[name], param.shape), f"the regions of {name} {list(param.shape)} overlap: {boxes[name]}"
    if unfilled:
        raise ValueError(f"the model's weight map leaves parameters unfilled: {some(unfilled)}")


def _box(destination: Destination, shape: Sequence[int]) -> Box:
    box = [(i.start, i.stop) if isinstance(i, slice) else (i, i + 1) for i in destination.region]
    box += [(0, size) for size in shape[len(box) :]]
    inside = len(box) == len(shape) and all(0 <= a <= b <= n for (a, b), n in zip(box, shape, strict=True))
    assert inside, f"{destination} is not within {list(shape)}"
    return tuple(box)


def _tile(boxes: Sequence[Box], shape: Sequence[int]) -> bool:
    """Whether the boxes fill `shape` exactly once: equal or adjacent along each dimension, from the first to the last."""
    if not shape:
        return len(boxes) == 1
    groups: dict[tuple[int, int], list[Box]] = {}
    for box in boxes:
        groups.setdefault(box[0], []).append(box[1:])
    end = 0
    for start, stop in sorted(groups):
        if start != end:
            return False
        end = stop
    return end == shape[0] and all(_tile(group, shape[1:]) for group in groups.values())


@dataclass(frozen=True, kw_only=True)
class _Read:
    """Consecutive bytes of a tensor: all of it, or one index of its first dimension, `lead`.

    What goes to parameters as it lies is read row by row, `unit_bytes` at least at a time; a part of it, or what is transposed or
    repeated, all at once.
    """

    lead: int | None
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    unit_bytes: int
    whole: bool
    destinations: tuple[Destination, ...]


def _reads(stored: StoredTensor, destinations: Sequence[Destination]) -> Iterator[_Read]:
    for lead in sorted({d.lead for d in destinations}, key=lambda lead: -1 if lead is None else lead):
        of_lead = tuple(d for d in destinations if d.lead == lead)
        shape = stored.shape if lead is None else stored.shape[1:]
        nbytes = stored.nbytes if lead is None else stored.nbytes // stored.shape[0]
        offset = stored.offset + (0 if lead is None else lead * nbytes)
        skip = 0 if lead is None else 1
        whole = any(len(d.source) > skip or d.transposed or d.repeated for d in of_lead)
        rows = max(1, shape[0]) if shape else 1
        yield _Read(
            lead=lead,
            shape=shape,
            offset=offset,
            nbytes=nbytes,
            unit_bytes=nbytes if whole else nbytes // rows,
            whole=whole,
            destinations=of_lead,
        )


def _copy(
    file: FileIO, stored: StoredTensor, read: _Read, params: Mapping[str, torch.Tensor], buffer: torch.Tensor
) -> None:
    """Copies it to each of its destinations, as many rows at a time as fit the buffer."""
    if read.nbytes == 0:
        return
    file.seek(read.offset)
    dtype, targets = STORED_DTYPES[stored.dtype], [params[d.param][d.region] for d in read.destinations]
    if read.whole:
        raw = buffer[: read.nbytes]
        _read_into(file, raw)
        source = raw.view(dtype).view(read.shape)
        for d, target in zip(read.destinations, targets, strict=True):
            _put(target, _taken(source, d, skip=0 if read.lead is None else 1), repeated=d.repeated)
        return
    step, rows = len(buffer) // read.unit_bytes, read.nbytes // read.unit_bytes
    for start in range(0, rows, step):
        count = min(step, rows - start)
        raw = buffer[: count * read.unit_bytes]
        _read_into(file, raw)
        source = raw.view(dtype).view(count, -1)
        for target in targets:
            _put(target.view(rows, -1)[start : start + count], source)


def _taken(source: torch.Tensor, destination: Destination, skip: int) -> torch.Tensor:
    taken = source[destination.source[skip:]]
    return taken.transpose(-1, -2) if destination.transposed else taken


def _put(target: torch.Tensor, source: torch.Tensor, *, repeated: bool = False) -> None:
    if source.dtype == torch.float8_e8m0fnu and target.dtype == torch.uint8:
        source = source.view(torch.uint8)
    target.copy_(source.reshape(-1, *[1] * (target.dim() - 1)) if repeated else source.reshape(target.shape))


def _read_into(file: FileIO, raw: torch.Tensor) -> None:
    unread = memoryview(raw.numpy())
    while unread:
        count = file.readinto(unread)
        if not count:
            raise ValueError(f"{file.name} became shorter while it was read")
        unread = unread[count:]


def check_memory(bytes_needed: int, device: torch.device | str, *, sharers: int = 1) -> None:
    """Raises before memory runs out.

    Args:
        bytes_needed: of the weights of one rank.
        device: "cpu" or a CUDA device.
        sharers: ranks that load as much at the same time from the same memory.

    Raises:
        ValueError: they do not fit; says how much is needed and free, and what to change.
    """
    free = free_memory(device)
    if bytes_needed * sharers > free:
        ranks = f" on each of {sharers} ranks" if sharers > 1 else ""
        raise ValueError(
            f"the weights need {bytes_needed / 1e9:.2f} GB{ranks}, but only {free / 1e9:.2f} GB of memory are free on "
            f"{device}; use more ranks on more devices (ep_size), dtype='bfloat16', or a smaller model"
        )


def free_memory(device: torch.device | str) -> int:
    """Bytes that can still be allocated there: of the GPU, or of this machine and this process's control group."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = psutil.virtual_memory().available
    return min([available, *cgroup_free(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))])


def cgroup_free(membership: Path, mount: Path) -> list[int]:
    """Bytes below the limit of each control group, of version 1 or 2, that this process is in (kernel's cgroup-v2.rst).

    Cached file pages count as free: the kernel drops them first.
    """
    if not membership.is_file():
        return []
    free = []
    for line in membership.read_text().splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            base, limit_file, usage_file = mount, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            base, limit_file, usage_file = mount / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        # A container may see its own group as the mount's root, whatever its name outside.
        inner = base / group.lstrip("/")
        for folder in [inner, *(p for p in inner.parents if p.is_relative_to(base))]:
            if (folder / limit_file).is_file() and (limit := (folder / limit_file).read_text().strip()) != "max":
                stat = dict(item.split() for item in (folder / "memory.stat").read_text().splitlines())
                prefix = "total_" if controllers else ""
                cache = sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
                free.append(int(limit) - int((folder / usage_file).read_text()) + cache)
    return free
