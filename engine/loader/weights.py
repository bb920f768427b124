"""Filling a rank's parameters: from a checkpoint, reading only the bytes that this rank needs, or with random weights."""

from __future__ import annotations

import contextlib
import hashlib
import math
import mmap
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import psutil
import torch
from tqdm import tqdm

from expertwire.engine.loader import reading
from expertwire.engine.loader.checkpoint import Checkpoint, some
from expertwire.engine.loader.weight_map import Destination, ParamSpec, WeightMap

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
HUGE_PAGE_BYTES = 2 << 20
NOISE_SIZE = 1 << 18  # random values drawn at a time; fits a core's cache


def allocate(specs: Mapping[str, ParamSpec], dtype: torch.dtype, device: torch.device | str) -> dict[str, torch.Tensor]:
    """Uninitialised contiguous parameters; call `check_memory` with `memory.peak_bytes` first."""
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
    checkpoint. Extra memory, for each of at most `reading.MAX_READERS` threads: one piece of a tensor, if it does not lie in its
    parameter as it is stored, and on a GPU two pinned buffers of 16 MiB.

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
    pieces = [piece for stored, destinations in wanted for piece in reading.pieces(stored, destinations, params)]
    device = next(iter(params.values())).device if params else torch.device("cpu")
    ways = reading.transfers(device, min(reading.MAX_READERS, max(2, torch.get_num_threads())))
    total, num_tensors, read = sum(piece.nbytes for piece in pieces), sum(piece.last for piece in pieces), 0
    with tqdm(total=total, desc="loading weights", unit="B", unit_scale=True, disable=not progress) as bar:

        def done(piece: reading.Piece) -> None:
            nonlocal read
            read += piece.last
            bar.set_postfix_str(f"{read}/{num_tensors} tensors", refresh=False)
            bar.update(piece.nbytes)

        reading.read(pieces, ways, done)


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
