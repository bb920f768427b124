"""Measure the speed of reading weights from files into a rank's parameters, and compare it with the machine's limits.

    python -m expertwire.bench.serving.loading [--folder DIR] [--gigabytes N] [--out FILE.json]

A checkpoint of random bytes is written to a folder, a RAM disk by default, and read several times: by the loader with 1, 2 and 4
threads, by safetensors' own reader and by `cat`; its bytes are also copied from memory to memory, with one thread. The memory of
the parameters has been touched before, so page faults do not count. The best of several rounds is reported, in wall time and in
processor time, as other programs may be running.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from expertwire.bench.machine import processor
from expertwire.engine.loader import reader, weights
from expertwire.engine.loader.checkpoint import Checkpoint
from expertwire.engine.loader.param_specs import ParamSpec
from expertwire.engine.loader.parameters import Destination

_ROWS, _COLUMNS = 2048, 7168  # an expert's matrix in DeepSeek-V3, e4m3
_PER_FILE = 32  # matrices
_ROUNDS = 5


def write(folder: Path, gigabytes: float) -> None:
    """Write a checkpoint of matrices of 14.7 MB, in files of 32 of them."""
    generator = torch.Generator().manual_seed(0)
    number = max(1, round(gigabytes * 1e9 / (_ROWS * _COLUMNS)))
    files: dict[str, str] = {}
    for start in range(0, number, _PER_FILE):
        file = f"model-{start:05}.safetensors"
        names = [f"experts.{i}" for i in range(start, min(number, start + _PER_FILE))]
        values = torch.randint(0, 120, (len(names), _ROWS, _COLUMNS), dtype=torch.uint8, generator=generator)
        save_file(dict(zip(names, values.view(torch.float8_e4m3fn).unbind(), strict=True)), folder / file)
        files |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Loading speed in GB per second of wall time, and of processor time of this process and its children."""

    wall: float
    processor: float


def measure(folder: Path) -> dict[str, Speed]:
    """Return the speed of each way of reading."""
    checkpoint = Checkpoint(folder)
    names = list(checkpoint.tensors)
    spec = ParamSpec(shape=(len(names), _ROWS, _COLUMNS), fan_in=1, dtype=torch.float8_e4m3fn)
    params = weights.allocate({"experts": spec}, torch.bfloat16, "cpu")
    params["experts"].view(torch.uint8).fill_(0)
    pieces = [
        piece
        for slot, name in enumerate(names)
        for piece in reader.pieces(checkpoint.tensors[name], [Destination(param="experts", region=(slot,))], params)
    ]
    ways: dict[str, Callable[[], None]] = {
        f"loader, {number} thread{'s' if number > 1 else ''}": partial(_load, pieces, number) for number in (1, 2, 4)
    }
    ways |= {
        "safetensors": lambda: _safetensors(folder, params["experts"], names),
        "cat": lambda: _cat(folder),
        "memory to memory, 1 thread": lambda: _copy(params["experts"]),
    }
    took: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(_ROUNDS):
        for name, run in ways.items():
            wall, before = time.perf_counter(), _spent()
            run()
            took[name].append((time.perf_counter() - wall, _spent() - before))
    gigabytes = checkpoint.nbytes / 1e9
    return {
        name: Speed(
            wall=round(gigabytes / min(wall for wall, _ in times), 2),
            processor=round(gigabytes / min(spent for _, spent in times), 2),
        )
        for name, times in took.items()
    }


def _spent() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _load(pieces: Sequence[reader.FilePiece], number: int) -> None:
    reader.read(pieces, reader.transfers(torch.device("cpu"), number), lambda piece: None)


def _safetensors(folder: Path, target: torch.Tensor, names: Sequence[str]) -> None:
    slots = {name: slot for slot, name in enumerate(names)}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dictionary
                target[slots[name]].copy_(opened.get_tensor(name))


def _cat(folder: Path) -> None:
    """Read all files through a pipe, so that every byte is copied."""
    files = [str(file) for file in sorted(folder.glob("*.safetensors"))]
    with subprocess.Popen(["cat", *files], stdout=subprocess.PIPE) as cat:
        assert isinstance(cat.stdout, io.BufferedReader)
        buffer = bytearray(1 << 20)
        while cat.stdout.readinto(buffer):
            pass


def _copy(target: torch.Tensor) -> None:
    values = target.view(torch.uint8).view(-1).numpy()
    block = np.ones(min(64 << 20, len(values)), np.uint8)
    for at in range(0, len(values), len(block)):
        values[at : at + len(block)] = block[: len(values) - at]


def main(argv: Sequence[str]) -> int:
    """Print and write the speeds."""
    parser = argparse.ArgumentParser(prog="python -m expertwire.bench.serving.loading", description=__doc__)
    parser.add_argument("--folder", default="/dev/shm", help="folder for the checkpoint (default: %(default)s)")
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of the checkpoint (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="also write the speeds there, as JSON")
    args = parser.parse_args(argv)
    load = round(os.getloadavg()[0], 1)  # load of the machine by other processes
    with tempfile.TemporaryDirectory(prefix="expertwire-loading-", dir=args.folder) as folder:
        write(Path(folder), args.gigabytes)
        found = measure(Path(folder))
    print(f"{'GB/s':<28}{'wall time':>14}{'CPU time':>14}")
    for name, speed in found.items():
        print(f"{name:<28}{speed.wall:>14.2f}{speed.processor:>14.2f}")
    if args.out is not None:
        machine = {"processor": processor(), "cores": len(os.sched_getaffinity(0)), "folder": args.folder, "load": load}
        speeds = {name: asdict(speed) for name, speed in found.items()}
        args.out.write_text(json.dumps(machine | {"gigabytes": args.gigabytes, "speeds": speeds}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
