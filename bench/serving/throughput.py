"""`expertwire bench throughput`: tokens per second, per core-second and per GPU with random prompts, through a frontend.

Processor time and memory are those of this process and all that it has started: controller, ranks, and Ray's if it is used.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from expertwire.bench.machine import processor
from expertwire.deploy.options import add_engine_options, engine_config
from expertwire.engine.config.engine_config import EngineConfig, ModelInfo
from expertwire.engine.frontend.api import EngineFailed
from expertwire.scheduler.sampling_params import SamplingParams

_POLL_S = 0.2
_PACKAGES = ("expertwire", "torch", "triton", "numpy", "numba", "ray")
_WARM_UP_TOKENS = 4


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Random prompts of one length, `concurrency` at a time, whose outputs ignore the end of sequence."""

    input_len: int
    output_len: int
    num_prompts: int
    concurrency: int
    temperature: float

    def __post_init__(self) -> None:
        for name in ("input_len", "output_len", "num_prompts", "concurrency"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {getattr(self, name)}")

    def params(self, output_len: int) -> SamplingParams:
        return SamplingParams(temperature=self.temperature, max_tokens=output_len, ignore_eos=True)


@dataclass
class _Job:
    submitted: float
    arrivals: list[float] = field(default_factory=list)  # of each token


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A point in time: wall clock and processor seconds of all processes."""

    wall: float
    cpu: float

    @classmethod
    def now(cls) -> Mark:
        times = [process.cpu_times() for process in _processes()]
        return cls(wall=time.perf_counter(), cpu=sum(t.user + t.system for t in times))


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A measurement. `prefilled` is the time of the last first token, if all requests ran at once."""

    jobs: list[_Job]
    begin: Mark
    prefilled: Mark | None
    end: Mark


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    for name, default, text in (
        ("--input-len", 128, "tokens per prompt"),
        ("--output-len", 64, "tokens per output"),
        ("--num-prompts", 32, "number of prompts"),
        ("--concurrency", 32, "number of prompts at a time"),
    ):
        parser.add_argument(name, type=int, default=default, metavar="N", help=f"{text} (default: {default})")
    text = "sampling temperature; 0 is greedy (default: %(default)s)"
    parser.add_argument("--temperature", type=float, default=0.0, metavar="X", help=text)
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the report there")
    add_engine_options(parser)


def main(args: argparse.Namespace) -> int:
    """Measure and print a report."""
    from expertwire.deploy.runtime import open_frontend

    workload = Workload(**{f.name: getattr(args, f.name) for f in dataclasses.fields(Workload)})
    config = engine_config(args)
    if args.json and not args.json.parent.is_dir():
        raise ValueError(f"--json: there is no folder {args.json.parent}")
    with open_frontend(config) as frontend:
        generator = np.random.default_rng(config.seed)
        num_warm_up = min(workload.concurrency, workload.num_prompts)
        shape = (num_warm_up + workload.num_prompts, workload.input_len)
        prompts = list(generator.integers(0, frontend.model_info.vocab_size, shape, dtype=np.int32))
        warm_up = workload.params(min(_WARM_UP_TOKENS, workload.output_len))
        run(frontend, prompts[:num_warm_up], warm_up, workload.concurrency)
        memory = [_memory_pss()]
        sample = run(frontend, prompts[num_warm_up:], workload.params(workload.output_len), workload.concurrency)
        memory.append(_memory_pss())
        result = report(config, frontend.model_info, workload, sample, max(memory))
    print(table(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


def run(frontend: Any, prompts: list[np.ndarray], params: SamplingParams, concurrency: int) -> Sample:
    """Submit all prompts, `concurrency` at a time, and record when each token arrives.

    Args:
        frontend: a `Frontend`.
        prompts: token ids, i32 [length] each.
        params: sampling parameters of all prompts.
        concurrency: maximum number of running prompts.

    Raises:
        EngineFailed: the engine has failed.
        ValueError: a prompt was refused.
    """
    todo, jobs, without_token = iter(prompts), {}, len(prompts)
    begin, prefilled = Mark.now(), None

    def submit() -> None:
        while frontend.num_open < concurrency and (prompt := next(todo, None)) is not None:
            submitted = time.perf_counter()
            jobs[frontend.submit(frontend.encode(prompt, params), params)] = _Job(submitted)

    submit()
    while frontend.num_open:
        updates = frontend.poll(_POLL_S)
        now = time.perf_counter()
        for update in updates:
            if update.error is not None:
                raise (EngineFailed if frontend.failure else ValueError)(update.error.message)
            arrivals = jobs[update.request_id].arrivals
            without_token -= not arrivals
            arrivals.extend([now] * len(update.token_ids))
        submit()
        if not without_token and prefilled is None and len(prompts) <= concurrency:
            prefilled = Mark.now()
    return Sample(jobs=list(jobs.values()), begin=begin, prefilled=prefilled, end=Mark.now())


def report(
    config: EngineConfig, info: ModelInfo, workload: Workload, sample: Sample, memory_pss: int
) -> dict[str, Any]:
    """Return a measurement as JSON values; rates in tokens per second, per rank, GPU and core-second."""
    outputs = sum(len(job.arrivals) for job in sample.jobs)
    inputs = workload.num_prompts * workload.input_len
    rates: dict[str, dict[str, float | None] | None] = {
        name: _rate(tokens, sample.begin, sample.end, info)
        for name, tokens in (("input", inputs), ("output", outputs), ("total", inputs + outputs))
    }
    if sample.prefilled is not None:
        late = sum(arrival > sample.prefilled.wall for job in sample.jobs for arrival in job.arrivals)
        rates["prefill"] = _rate(inputs, sample.begin, sample.prefilled, info)
        rates["decode"] = _rate(late, sample.prefilled, sample.end, info) if late else None
    ttft = [job.arrivals[0] - job.submitted for job in sample.jobs]
    tpot = [(j.arrivals[-1] - j.arrivals[0]) / (len(j.arrivals) - 1) for j in sample.jobs if len(j.arrivals) > 1]
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(info.device),
        "versions": _versions(),
        "config": dataclasses.asdict(config),
        "model": info.to_dict(),
        "workload": dataclasses.asdict(workload),
        "tokens_per_s": rates,
        "ttft_ms": _quantiles(ttft),
        "tpot_ms": _quantiles(tpot),
        "wall_s": sample.end.wall - sample.begin.wall,
        "cpu_s": sample.end.cpu - sample.begin.cpu,
        "processes": len(_processes()),
        "memory_pss_mib": memory_pss / 2**20,
    }


def table(result: dict[str, Any]) -> str:
    """Return a report as text."""
    model, load = result["model"], result["workload"]
    lines = [
        f"{model['name']} ({model['architecture']}, {model['dtype']}) on {model['ep_size']} {model['device']} rank(s), "
        f"{result['machine']['cpu']}, {result['machine']['cores']} cores",
        f"{load['num_prompts']} prompts of {load['input_len']} tokens, outputs of {load['output_len']}, "
        f"{load['concurrency']} at a time, temperature {load['temperature']:g}",
        "",
        f"{'tokens/s':<10}{'all':>12}{'per rank':>12}{'per GPU':>12}{'per core-s':>12}",
    ]
    for name, rate in result["tokens_per_s"].items():
        if rate is not None:
            lines.append(f"{name:<10}" + "".join(f"{_number(value):>12}" for value in rate.values()))
    lines += ["", f"{'ms':<10}{'median':>12}{'p99':>12}"]
    for name in ("ttft_ms", "tpot_ms"):
        values = result[name]
        lines.append(f"{name[:4].upper():<10}" + "".join(f"{_number(value):>12}" for value in values.values()))
    lines += [
        "",
        f"{result['wall_s']:.2f} s, {result['cpu_s']:.2f} core-seconds and {result['memory_pss_mib']:.0f} MiB (PSS) "
        f"in {result['processes']} processes",
    ]
    return "\n".join(lines)


def machine(device: str) -> dict[str, Any]:
    """Return a description of the machine."""
    gpus = []
    if device == "cuda":
        import torch

        gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": processor(),
        "cores": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": gpus,
        "system": platform.platform(),
        "load_average": os.getloadavg()[0],
    }


def _rate(tokens: int, begin: Mark, end: Mark, info: ModelInfo) -> dict[str, float | None]:
    rate = tokens / (end.wall - begin.wall)
    cpu = end.cpu - begin.cpu  # counted in ticks of 10 ms, so it may be 0 in a short phase
    per_rank = rate / info.ep_size
    return {
        "all": rate,
        "per_rank": per_rank,
        "per_gpu": per_rank if info.device == "cuda" else None,
        "per_core_s": tokens / cpu if cpu else None,
    }


def _quantiles(seconds: list[float]) -> dict[str, float | None]:
    if not seconds:
        return {"median": None, "p99": None}
    return {"median": 1e3 * statistics.median(seconds), "p99": 1e3 * float(np.quantile(seconds, 0.99))}


def _number(value: float | None) -> str:
    if value is None:
        return "n/a"
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"


def _processes() -> list[psutil.Process]:
    me = psutil.Process()
    return [me, *me.children(recursive=True)]


def _memory_pss() -> int:
    """Return the bytes of all processes, shared pages divided among those that share them (left out except on Linux)."""
    infos = [process.memory_full_info() for process in _processes()]
    return sum(getattr(info, "pss", info.uss) for info in infos)


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
