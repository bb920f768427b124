"""`expertwire bench all-to-all`: dispatch and combine, measured here, or modelled beside what others have published.

Ranks are processes of this machine, on CPUs over gloo or shared memory, or with a GPU each. A time is the slowest rank's; p50
and p99 are over the steps of a run, and the median of the runs is shown. A barrier precedes every phase. Rates are stated
three ways, and the bound is the bytes that must move at the line rate of the GPU, or the rate of a plain copy between CPUs.
Backends that can are replayed from CUDA graphs too. If there are more ranks than GPUs, they share one, and their rows are
checked but not timed.

Never run on a GPU by us.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from expertwire.bench.all_to_all import loopback
from expertwire.bench.all_to_all import model as all_to_all_model
from expertwire.bench.all_to_all import shared as all_to_all_shared
from expertwire.bench.all_to_all import text as all_to_all_text
from expertwire.bench.all_to_all.ranks import GRAPH_SAFE, Candidate, Setting, run
from expertwire.bench.machine import processor
from expertwire.comm.group import NcclOptions
from expertwire.comm.topology.backend_choice import BACKENDS
from expertwire.kernels.ops import quantize

PHASES = ("dispatch", "combine")
FORMATS = ("bf16", "fp8")
DECODE, PREFILL = (1, 32, 128), (512,)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `expertwire bench all-to-all`."""
    text = (
        "print bounds, a model of the best published kernel and published figures for this machine, without measuring"
    )
    parser.add_argument("--model", choices=tuple(all_to_all_model.MACHINES), help=text)
    parser.add_argument(
        "--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS), help="backends to measure (default: all)"
    )
    text = "formats of dispatched rows (default: bf16)"
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=["bf16"], help=text)
    parser.add_argument(
        "--ranks", type=int, nargs="+", default=[2, 4], metavar="N", help="numbers of ranks (default: 2 4)"
    )
    text = "one GPU runs one of 8, 64 and 72 ranks: times of the kernels without NVLink, and NVL72 modelled from them"
    parser.add_argument("--loopback", action="store_true", help=text)
    text = "numbers of tokens per rank (default: %(default)s)"
    parser.add_argument("--tokens", type=int, nargs="+", default=[*DECODE, *PREFILL], metavar="N", help=text)
    parser.add_argument("--hidden-size", type=int, default=7168, metavar="N", help="model width (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="steps per run (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="number of runs (default: %(default)s)")
    text = "measure all backends, NCCL's with several settings, and write the table for --all2all-table"
    parser.add_argument("--sweep", type=Path, metavar="FILE", help=text)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results there")


def main(args: argparse.Namespace) -> int:
    """Print a table, write JSON.

    Raises:
        ValueError: an option is not usable, or a rank has failed.
    """
    if args.model:
        figures = all_to_all_model.report(args.model)
        lines = all_to_all_text.lines(figures)
    elif args.loopback:
        figures = loopback.run(args.hidden_size)
        lines = all_to_all_text.loopback(figures)
    else:
        figures = measure(args)
        lines = all_to_all_text.measured(figures)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print("\n".join(lines))
    return 0


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of all numbers of ranks; with --sweep, write its table."""
    for name in ("tokens", "ranks", "steps", "runs", "hidden_size"):
        values = getattr(args, name)
        if min(values if isinstance(values, list) else [values]) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be >= 1, got {values}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shared = [ranks for ranks in args.ranks if device == "cuda" and ranks > torch.cuda.device_count()]
    if shared and (args.sweep or "nvlink" not in args.backends):
        raise ValueError(
            f"--ranks must be in [1, {torch.cuda.device_count()}], the GPUs here, got {args.ranks}; several ranks on one GPU are "
            "checked, not measured, and only of --backends nvlink"
        )
    if "fp8" in args.formats and args.hidden_size % quantize.GROUP:
        raise ValueError(
            f"--hidden-size must be a multiple of {quantize.GROUP} with --formats fp8, got {args.hidden_size}"
        )
    candidates = sweep(device, max(args.ranks)) if args.sweep else _candidates(args.backends, args.formats, device)
    setting = Setting(
        candidates=candidates,
        tokens=tuple(args.tokens),
        hidden_size=args.hidden_size,
        steps=args.steps,
        runs=args.runs,
        device=device,
    )
    apart = [ranks for ranks in args.ranks if ranks not in shared]
    here = machine(device, measured=bool(apart))  # its load before that of the ranks
    rows = [row for ranks in apart for row in summarise(run(setting, ranks), setting)]
    checked = [row for ranks in shared for row in check_shared(setting, ranks, args.formats)]
    figures = {"machine": here, "setting": _shape(setting), "rows": rows, "checked": checked}
    if args.sweep:
        args.sweep.write_text(json.dumps(table(figures), indent=1) + "\n", encoding="utf-8")
    return figures


def check_shared(setting: Setting, num_ranks: int, formats: Sequence[str]) -> list[dict[str, Any]]:
    """Return what was checked with ranks that share a GPU."""
    shape = {name: getattr(setting, name) for name in ("num_experts", "top_k", "hidden_size", "steps", "device")}
    pairs = itertools.product(setting.tokens, formats)
    with torch.inference_mode():
        return [row for pair in pairs for row in all_to_all_shared.run(num_ranks, *pair, **shape)]


def _candidates(names: Sequence[str], formats: Sequence[str], device: str) -> tuple[Candidate, ...]:
    """Return each backend with each format, on GPUs also from graphs where possible."""
    return tuple(
        Candidate(backend=name, format=format, graph=graph)
        for name, format in itertools.product(names, formats)
        for graph in ((False, True) if device != "cpu" and name in GRAPH_SAFE else (False,))
    )


def sweep(device: str, num_ranks: int) -> tuple[Candidate, ...]:
    """Return what --sweep measures; gloo has no number of thread blocks."""
    if device == "cpu":
        return tuple(Candidate(backend=name) for name in BACKENDS)
    limits = [NcclOptions(max_ctas=ctas) for ctas in (None, 4, 8, 16, 32)]
    pairs = itertools.permutations(range(num_ranks), 2)
    reached = all(torch.cuda.can_device_access_peer(*pair) for pair in pairs)
    return (
        Candidate(backend="reference"),
        *(Candidate(backend="nccl", nccl=nccl) for nccl in limits),
        *([Candidate(backend="nvlink")] if reached else []),
    )


def table(figures: dict[str, Any]) -> dict[str, Any]:
    """Return the table for `comm.topology.backend_times`: times of both phases, fastest first by ranks and tokens."""
    setting = figures["setting"]
    entries = [
        {name: row[name] for name in ("ranks", "tokens", "backend", "nccl")}
        | {"p50_us": sum(row[phase]["p50_us"] for phase in PHASES)}
        for row in figures["rows"]
    ]
    return {
        "machine": figures["machine"],
        "row_bytes": 2 * setting["hidden_size"] * torch.bfloat16.itemsize,
        "top_k": setting["top_k"],
        "entries": sorted(entries, key=lambda entry: (entry["ranks"], entry["tokens"], entry["p50_us"])),
    }


def summarise(answers: Sequence[Sequence[dict[str, Any]]], setting: Setting) -> Iterator[dict[str, Any]]:
    """Yield a row for each candidate and number of tokens, from those of every rank."""
    for same in zip(*answers, strict=True):
        us_by_rank = np.array([row["us"] for row in same])
        first = same[0]
        row = {
            "ranks": len(answers),
            "candidate": first["candidate"],
            "backend": first["backend"],
            "format": first["format"],
            "nccl": first["nccl"],
            "graph": first["graph"],
            "tokens": first["tokens"],
        }
        for index, phase in enumerate(PHASES):
            us_by_run = us_by_rank[:, :, index].max(axis=0).reshape(setting.runs, setting.steps)
            # The rank that sends most over the wire determines the bound.
            traffic = max((rank["bytes"][index] for rank in same), key=lambda part: part["wire"])
            row[phase] = _phase(
                us_by_run, traffic, line_gb_s(setting.device) or min(rank["copy_gb_s"] for rank in same)
            )
        yield row


def _phase(us_by_run: np.ndarray, traffic: dict[str, float], gb_s: float) -> dict[str, Any]:
    p50, p99 = (float(np.median(np.percentile(us_by_run, percent, axis=1))) for percent in (50, 99))
    bound = traffic["wire"] / gb_s / 1e3
    return {
        "p50_us": p50,
        "p99_us": p99,
        "bytes": traffic,
        "gb_s": {name: nbytes / p50 / 1e3 for name, nbytes in traffic.items()},
        "bound_us": bound,
        "ratio": p50 / bound if bound else None,
    }


def line_gb_s(device: str) -> float | None:
    """Return the NVLink rate of this machine's GPUs in one direction; None on a CPU.

    Raises:
        ValueError: the line rate is not known.
    """
    if device == "cpu":
        return None
    name = torch.cuda.get_device_name()
    for model, rate in sorted(all_to_all_model.LINE_GB_S.items(), key=lambda item: -len(item[0])):
        if model in name:
            return rate
    known = ", ".join(all_to_all_model.LINE_GB_S)
    raise ValueError(f"the line rate of {name!r} is not known; known are {known}")


def machine(device: str, *, measured: bool = True) -> dict[str, Any]:
    """Return the machine, and a label that says what its times mean."""
    if device == "cpu":
        label = "CPU ranks: compares the backends here, says nothing about GPUs"
        here = {"device": device, "name": processor(), "cores": os.cpu_count(), "load": os.getloadavg()[0]}
        return {**here, "label": label}
    return {
        "device": device,
        "name": torch.cuda.get_device_name(),
        "devices": torch.cuda.device_count(),
        "label": "a GPU for every rank" if measured else "too few GPUs to measure anything",
    }


def _shape(setting: Setting) -> dict[str, Any]:
    names = ("num_experts", "top_k", "hidden_size", "steps", "runs", "device")
    return {"dtype": "bfloat16", "routing": "uniform"} | {name: getattr(setting, name) for name in names}
