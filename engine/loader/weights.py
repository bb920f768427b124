"""Loading of a rank's share of a model: from a checkpoint, of which only the needed bytes are read, or with random weights."""

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

from expertwire.engine.kv_cache import memory
from expertwire.engine.layers.step import RankContext
from expertwire.engine.loader import reader
from expertwire.engine.loader.checkpoint import Checkpoint, first_ten
from expertwire.engine.loader.param_specs import ParamSpec
from expertwire.engine.loader.parameters import Destination, WeightMap
from expertwire.engine.models.decoder import Decoder
from expertwire.engine.models.model_config import ModelConfig

# The stored types that may be loaded into a parameter of a type: floats are rounded, 4-bit numbers are bytes of either sign,
# powers of two become floats or stay exponents.
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


def load_model(
    config: ModelConfig,
    context: RankContext,
    checkpoint: Checkpoint | None,
    *,
    quantize: str | None = None,
    seed: int = 0,
    sharers: int = 1,
    progress: bool = False,
) -> Decoder:
    """Return the rank's share of a model, ready to run.

    Args:
        config: its configuration.
        context: where it runs.
        checkpoint: its weights; None: random ones.
        quantize: as `Decoder` has it.
        seed: of random weights.
        sharers: number of ranks that load as much at the same time into the same memory.
        progress: show a bar on stderr.

    Raises:
        ValueError: the checkpoint does not belong to this config, or the weights do not fit in memory.
    """
    model = Decoder(config, context, None if checkpoint is None else checkpoint.tensors, quantize)
    peak = memory.peak_bytes(config, model.layout, context.device, quantize=quantize, fast=context.ops.fast)
    check_memory(peak, context.device, sharers=sharers)
    params = allocate(model.layout.specs, context.dtype, context.device)
    if checkpoint is None:
        dummy_weights(model.layout.specs, params, seed)
    else:
        ignored = [entry.pattern for entry in config.ignored_tensors]
        load_weights(checkpoint, model.layout.sources, params, ignored=ignored, progress=progress)
    with torch.inference_mode():
        model.bind(params)
    return model


def allocate(specs: Mapping[str, ParamSpec], dtype: torch.dtype, device: torch.device | str) -> dict[str, torch.Tensor]:
    """Return uninitialized contiguous parameters; call `check_memory` with `memory.peak_bytes` first."""
    return {name: _empty(spec.shape, spec.dtype or dtype, torch.device(device)) for name, spec in specs.items()}


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < HUGE_PAGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    # Small batches are bound by reading weights, of which a TLB miss for every page of 4 KB takes a tenth.
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


def load_weights(
    checkpoint: Checkpoint,
    weight_map: WeightMap,
    params: Mapping[str, torch.Tensor],
    *,
    ignored: Sequence[str] = (),
    progress: bool,
) -> None:
    """Fill `params` in place from the checkpoint, converting between float32, bfloat16 and float16 (rounding to nearest).

    Everything is checked from the headers before a byte is read. Extra memory for each of at most `reader.MAX_READERS` threads:
    one piece of a tensor, unless it is read in place, and on a GPU two pinned buffers of 16 MiB.

    Args:
        checkpoint: the tensors.
        weight_map: every tensor of the checkpoint with the regions that it fills. Those that fill none may be missing.
        params: the parameters, on one device; filled completely.
        ignored: regular expressions for whole names of tensors that are not loaded.
        progress: show a bar on stderr.

    Raises:
        ValueError: a tensor is not in the map, is missing, or has a wrong shape or an unsupported type; a parameter is not
            filled; a file has changed. The message names the tensor, parameter or file.
    """
    check(checkpoint, weight_map, params, ignored)
    wanted = [(checkpoint.tensors[name], destinations) for name, destinations in weight_map.items() if destinations]
    wanted.sort(key=lambda item: (item[0].file, item[0].offset))
    pieces = [piece for stored, destinations in wanted for piece in reader.pieces(stored, destinations, params)]
    device = next(iter(params.values())).device if params else torch.device("cpu")
    transfers = reader.transfers(device, min(reader.MAX_READERS, max(2, torch.get_num_threads())))
    total, num_tensors, read = sum(piece.nbytes for piece in pieces), sum(piece.last for piece in pieces), 0
    with tqdm(total=total, desc="loading weights", unit="B", unit_scale=True, disable=not progress) as bar:

        def done(piece: reader.FilePiece) -> None:
            nonlocal read
            read += piece.last
            bar.set_postfix_str(f"{read}/{num_tensors} tensors", refresh=False)
            bar.update(piece.nbytes)

        reader.read(pieces, transfers, done)


def dummy_weights(specs: Mapping[str, ParamSpec], params: Mapping[str, torch.Tensor], seed: int) -> None:
    """Fill `params` with normal(0, 1/sqrt(fan_in)) values, or as `ParamSpec` says where `fan_in` is None.

    Values depend on the seed, the parameter's name, the expert and the type of device alone, so they are equal on all ranks and
    for any number of ranks. Extra memory: about 2 MiB.
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
    """Fill a parameter with normal numbers, or with random bits if `fan_in` is None."""
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
    checkpoint: Checkpoint, weight_map: WeightMap, params: Mapping[str, torch.Tensor], ignored: Sequence[str] = ()
) -> None:
    """Check that every tensor is known or ignored and that the parameters are filled exactly once; raise as `load_weights` does.

    The parameters may be on the device "meta".
    """

    def refuse(fault: str, names: Sequence[str]) -> None:
        if names:
            raise ValueError(f"{checkpoint.path}: {fault}: {first_ten(names)}")

    tensors, skip = checkpoint.tensors, re.compile("|".join(f"(?:{pattern})" for pattern in ignored) or "(?!)")
    unknown = [name for name in tensors if name not in weight_map and not skip.fullmatch(name)]
    refuse("the model does not know these tensors", unknown)
    wanted = {name: destinations for name, destinations in weight_map.items() if destinations}
    refuse("the model needs tensors that are missing", [name for name in wanted if name not in tensors])
    _check_filled(wanted.values(), params)
    misshapen, unsupported = [], []
    for name, destinations in wanted.items():
        shape, dtype = tensors[name].shape, tensors[name].dtype
        expected = {d.expected_shape(tuple(params[d.param].shape)) for d in destinations}
        if expected != {shape}:
            shapes = " and ".join(str(list(s)) for s in sorted(expected))
            misshapen.append(f"{name} is {list(shape)}, expected {shapes}")
        if dtype not in (accepted := ACCEPTED[params[destinations[0].param].dtype]):
            unsupported.append(f"{name} ({dtype}, allowed: {', '.join(accepted)})")
    refuse("wrong shapes", misshapen)
    refuse("tensors of a type that is not supported there", unsupported)


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
        raise ValueError(f"the model's weight map leaves parameters unfilled: {first_ten(unfilled)}")


def _box(destination: Destination, shape: Sequence[int]) -> Box:
    box = [(i.start, i.stop) if isinstance(i, slice) else (i, i + 1) for i in destination.region]
    box += [(0, size) for size in shape[len(box) :]]
    inside = len(box) == len(shape) and all(0 <= a <= b <= n for (a, b), n in zip(box, shape, strict=True))
    assert inside, f"{destination} is not within {list(shape)}"
    return tuple(box)


def _tile(boxes: Sequence[Box], shape: Sequence[int]) -> bool:
    """Return whether the boxes fill `shape` exactly once: equal or adjacent along each dimension, from the first to the last."""
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
    """Check that the weights of a rank fit in memory.

    Args:
        bytes_needed: bytes of the weights of one rank.
        device: "cpu" or a CUDA device.
        sharers: number of ranks that load as much at the same time into the same memory.

    Raises:
        ValueError: they do not fit; the message says how much is needed and free, and what to change.
    """
    free = free_memory(device)
    if bytes_needed * sharers > free:
        ranks = f" on each of {sharers} ranks" if sharers > 1 else ""
        raise ValueError(
            f"the weights need {bytes_needed / 1e9:.2f} GB{ranks}, but only {free / 1e9:.2f} GB of memory are free on "
            f"{device}; use more ranks on more devices (ep_size), dtype='bfloat16', or a smaller model"
        )


def free_memory(device: torch.device | str) -> int:
    """Return the bytes that can still be allocated: of the GPU, or of this machine and this process's control groups."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = psutil.virtual_memory().available
    return min([available, *cgroup_free(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))])


def cgroup_free(membership: Path, mount: Path) -> list[int]:
    """Return the bytes left below the limit of each control group (version 1 or 2) of this process (kernel's cgroup-v2.rst).

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
