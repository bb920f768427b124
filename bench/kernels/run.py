"""`python -m expertwire.bench kernels`: correctness of the GPU kernels, and their speed beside the
hardware's limits.

Needs torch, Triton and numpy, and a GPU; with `--device cpu` and TRITON_INTERPRET=1 it checks tiny
shapes and times nothing.

A run consists of suites, the most important first, and those of items, each with a share of the
time. They run in a process of their own: if a kernel never returns or breaks the device's context,
its item has failed and a new process continues with the next one. Results are in DIR/kernels.json
after every item, so `--resume` continues where a run has ended. Before that, kernels are compiled
by many processes at once. Everything is timed in a CUDA graph; weights and caches rotate, so that
none are in the L2 cache when they are used again; every replica has a routing of its own.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import multiprocessing
import os
import platform
import secrets
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from expertwire.bench.kernels.results import NAME, Results, bars, figures

SECONDS = (470.0, 112.0)  # a full run, a quick one
COMPILE_SECONDS = (100.0, 40.0)
ITEM_SECONDS = 60.0  # an item that takes longer is taken to hang
WRITING_SECONDS = 8.0
SUITE_NAMES = (
    "experts-qwen3",
    "attention",
    "check-experts",
    "experts-deepseek",
    "check-attention",
    "bits",
    "routing",
    "check-layer-ops",
    "experts-gpt-oss",
    "sampling",
    "latent",
    "layer-ops",
    "recurrent",
    "experts-more",
)
CHECKS = ("check-experts", "check-attention", "check-layer-ops", "bits")  # can run on a CPU


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"error: {message} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(2)


def run(argv: Sequence[str]) -> int:
    """Run the command; return the exit code: 1 if a result is wrong or an item has failed, 2 for a wrong option."""
    args = make_parser().parse_args(argv)
    try:
        return main(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's options."""
    parser = _Parser(
        prog="python -m expertwire.bench kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("kernels-bench"),
        metavar="DIR",
        help="folder for the results, created if missing (default: %(default)s)",
    )
    parser.add_argument("--quick", action="store_true", help="under 2 minutes instead of 8: fewer shapes")
    parser.add_argument("--only", metavar="NAME,...", help=f"some suites only: {', '.join(SUITE_NAMES)}")
    parser.add_argument("--resume", action="store_true", help="keep what DIR has; failed items run again")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: check, do not time")
    return parser


def main(args: argparse.Namespace, seconds: float | None = None) -> int:
    """Run the suites, write the results, print the tables.

    Args:
        args: the command's options.
        seconds: time limit; None: `SECONDS`.

    Raises:
        ValueError: an option is wrong, or there is no such device.
        OSError: the results cannot be written.
    """
    began = time.time()
    names = suite_names(args.only, args.device)
    found = environment(args.device)
    results = open_results(args, found)
    deadline = began + (seconds or SECONDS[args.quick]) - WRITING_SECONDS
    if args.device == "cuda":
        compile_beforehand(results, names, args.quick, deadline)
        supervise(args.out, names, args.quick, deadline)
        results = Results.read(args.out)
    else:
        work(args.out, names, args.quick, args.device, deadline if seconds else float("inf"))
        results = Results.read(args.out)
    results.data["seconds"] = results.data.get("seconds", 0.0) + time.time() - began
    write_report(args.out, results, names)
    wrong = [key for _, key, item in results.items(kind="findings") if not item["ok"]]
    return int(bool(wrong or list(results.items(kind="error"))))


def suite_names(only: str | None, device: str) -> list[str]:
    """Return the suites to run, in their order.

    Raises:
        ValueError: there is no suite of such a name, or it cannot run on the device.
    """
    wanted = [name.strip() for name in only.split(",")] if only else list(SUITE_NAMES if device == "cuda" else CHECKS)
    unknown = [name for name in wanted if name not in SUITE_NAMES]
    if unknown:
        raise ValueError(f"--only: unknown {', '.join(map(repr, unknown))}; allowed are {', '.join(SUITE_NAMES)}")
    timed = [name for name in wanted if name not in CHECKS]
    if device == "cpu" and timed:
        raise ValueError(f"--device cpu times nothing, so not {', '.join(timed)}; it can do {', '.join(CHECKS)}")
    return [name for name in SUITE_NAMES if name in wanted]


def environment(device: str) -> dict[str, Any]:
    """Return what results depend on: device, CUDA and package versions.

    Raises:
        ValueError: there is no such device, or Triton is missing or not in the mode that the device needs.
    """
    missing = [name for name in ("torch", "triton") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"{' and '.join(missing)} must be installed")
    import torch
    import triton

    interpreted = triton.knobs.runtime.interpret
    if device == "cpu" and not interpreted:
        raise ValueError("--device cpu runs Triton's interpreter: set TRITON_INTERPRET=1")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("there is no CUDA device; --device cpu checks correctness in Triton's interpreter")
    if device == "cuda" and interpreted:
        raise ValueError("TRITON_INTERPRET=1 is for --device cpu only")
    packages = [name for name in ("torch", "triton", "numpy", "transformers") if importlib.util.find_spec(name)]
    versions = {name: importlib.metadata.version(name) for name in packages}
    gpu = torch.cuda.get_device_name() if device == "cuda" else "CPU (interpreter)"
    return {
        "device": device,
        "gpu": gpu,
        "cuda": torch.version.cuda if device == "cuda" else None,
        "versions": {"python": platform.python_version(), **versions},
    }


def open_results(args: argparse.Namespace, found: dict[str, Any]) -> Results:
    """Return new results, or those of an earlier run.

    Raises:
        ValueError: the earlier run was measured under other conditions.
        OSError: the folder cannot be written.
    """
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        if not args.out.is_dir() or not os.access(args.out, os.W_OK):
            raise PermissionError("not a folder that can be written")
    except OSError as error:
        raise OSError(f"--out {args.out}: {error.strerror or error}") from None
    if args.resume:
        results = Results.read(args.out)
        before = {"environment": results.data.get("environment"), "quick": results.data.get("quick")}
        now = {"environment": found, "quick": args.quick}
        if before != now:
            raise ValueError(f"--resume: {args.out / NAME} is of {before}, this run of {now}")
        results.forget_failures()
    else:
        date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        data = {"date": date, "environment": found, "quick": args.quick, "seed": secrets.randbits(31), "suites": {}}
        results = Results(args.out, data)
    results.write()
    return results


def compile_beforehand(results: Results, names: list[str], quick: bool, deadline: float) -> None:
    """Fill Triton's cache, with as many processes as there are processors to spare."""
    from expertwire.bench.kernels import suites as kernels_suites

    began = time.time()
    until = min(deadline, began + COMPILE_SECONDS[quick])
    processes = max(1, min(16, (os.cpu_count() or 2) - 1))
    tasks = kernels_suites.to_compile(results, names, quick)
    failures, done = kernels_suites.compile_all(tasks, quick, processes, until)
    results.data["compiled"] = {
        "items": done,
        "of": len(tasks),
        "seconds": time.time() - began,
        "processes": processes,
        "failures": failures,
    }
    results.write()
    print(f"compiled {done} of {len(tasks)} items in {time.time() - began:.0f} s, {len(failures)} failures", flush=True)


def supervise(folder: Path, names: list[str], quick: bool, deadline: float) -> None:
    """Start measuring processes, one after the other, until all is done or the time is over.

    Raises:
        ValueError: a process ended without a single result.
    """
    context = multiprocessing.get_context("spawn")
    while time.time() < deadline:
        process = context.Process(target=work, args=(folder, names, quick, "cuda", deadline))
        before = len(list(Results.read(folder).items()))
        process.start()
        reason = watch(process, folder / NAME, deadline)
        results = Results.read(folder)
        if process.exitcode == 0:
            return
        failed = results.fail_running(reason)
        print(f"  {', '.join(failed) or 'the measuring process'}: {reason}", flush=True)
        if len(list(results.items())) == before:
            raise ValueError(f"the measuring process {reason} and has measured nothing")


def watch(process: Any, file: Path, deadline: float) -> str:
    """Wait for the process, end it if an item hangs or time is long over, and return how it ended."""
    began = time.time()
    while process.is_alive():
        process.join(0.3)
        quiet, late = time.time() - max(began, file.stat().st_mtime), time.time() > deadline + WRITING_SECONDS / 2
        if process.is_alive() and (quiet > ITEM_SECONDS or late):
            process.kill()
            process.join()
            return "was cut off at the end of the time" if late else f"did not return in {quiet:.0f} s"
    return f"ended its process with exit code {process.exitcode}"


def work(folder: Path, names: list[str], quick: bool, device: str, deadline: float) -> None:
    """Run the items without a result. A broken device ends the process, with exit code 3."""
    from expertwire.bench.kernels import interpreter
    from expertwire.bench.kernels import suites as kernels_suites

    if device == "cpu":
        interpreter.prepare()
    warnings.filterwarnings("ignore", message=".*deterministic.*")
    results = Results.read(folder)
    kernels_suites.run_suites(results, names, quick, device, deadline)


def write_report(folder: Path, results: Results, names: list[str]) -> None:
    """Write figures into the JSON file, the long table and the plot; print the short table."""
    from expertwire.bench.kernels import plot, tables
    from expertwire.bench.kernels import suites as kernels_suites

    data, ceilings = results.data, results.ceilings()
    tiny = data["environment"]["device"] == "cpu"
    data["not_reached"] = kernels_suites.missing(results, names, data["quick"], tiny)
    data["bars"] = bars(results)
    if ceilings is not None:
        data["figures"] = {key: figures(item, ceilings) for _, key, item in results.items(kind="us")}
        series = plot.points(results, ceilings)
        title = f"{data['environment']['gpu']}, {data['date']}"
        if series:
            plot.save_roofline(folder, series, ceilings, title)
    results.write()
    (folder / "report.txt").write_text(tables.long_table(results) + "\n", encoding="utf-8")
    print(tables.short_table(results), flush=True)
