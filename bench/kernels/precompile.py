"""Time to compile the kernels of a rank's warm-up from nothing: one by one, and in several processes.

    python -m expertwire.bench.kernels.precompile [--model CONFIG_FOLDER] [--ep-size N] [--processes N] [--out FILE.json]

No GPU is needed: the launches are found without one, and compiled for an H200.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import triton

from expertwire.bench.machine import processor
from expertwire.engine.config.engine_config import EngineConfig
from expertwire.engine.models.registry import read_model_config
from expertwire.engine.runner import precompile
from expertwire.kernels.gpu import compile_ahead
from expertwire.kernels.gpu.device import H200

_CONFIGS = Path(__file__).parents[1] / "configs"


def cold_seconds(launches: Sequence[compile_ahead.Launch], num_processes: int) -> dict[str, float]:
    """Return wall-clock and CPU seconds to compile into an empty cache."""
    with tempfile.TemporaryDirectory(prefix="expertwire-triton-") as folder, triton.knobs.cache.scope():
        triton.knobs.cache.dir = folder
        wall, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        compile_ahead.compile_all(launches, H200.arch, num_processes)
        wall, after = time.perf_counter() - wall, resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"processes": num_processes, "seconds": round(wall, 1), "cpu_seconds": round(spent, 1)}


def main(argv: Sequence[str]) -> int:
    """Print the figures and write them to a file."""
    parser = argparse.ArgumentParser(prog="python -m expertwire.bench.kernels.precompile", description=__doc__)
    parser.add_argument("--model", type=Path, default=_CONFIGS / "qwen3-30b-a3b", help="(default: %(default)s)")
    parser.add_argument("--ep-size", type=int, default=1, help="ranks (default: %(default)s)")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--processes", type=int, default=cores, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, help="a JSON file")
    args = parser.parse_args(argv)
    model, config = read_model_config(args.model), EngineConfig(model=str(args.model), ep_size=args.ep_size).on("cuda")
    start, load = time.perf_counter(), round(os.getloadavg()[0], 1)  # of the machine by others
    launches = precompile.launches(
        precompile.Rank(
            config=config,
            model=model,
            max_model_len=model.max_position_embeddings,
            gpu=H200,
            rank=0,
            num_ranks=args.ep_size,
        )
    )
    found = {"model": args.model.name, "ep_size": args.ep_size, "launches": len(launches)}
    found["seconds_to_find"] = round(time.perf_counter() - start, 1)
    runs = [cold_seconds(launches, num) for num in dict.fromkeys((1, args.processes))]
    text = json.dumps({"processor": processor(), "cores": cores, "load": load, **found, "runs": runs}, indent=1)
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
