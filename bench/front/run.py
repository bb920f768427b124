"""`python -m expertwire.bench front`: tokens per second of a front's processor time, and the time that a front adds to a token.

The engine is the real one but for its ranks (`load_format` "mock"). Its steps are timed so that a front sends the tokens as they
are sampled, one in a message; `tokens_per_message` says whether it did. The case "latency" keeps a front busy for about half the
time (`load`), the others for less. Processor time is that of the front's process alone, so that it counts little what else runs.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import grpc
import psutil

import expertwire
from expertwire.bench.front.client import Client, Count, Load
from expertwire.bench.front.echo import EchoServer
from expertwire.bench.front.latency import Steps, added_ms
from expertwire.bench.machine import processor
from expertwire.deploy import runtime
from expertwire.deploy.fronts import Fronts
from expertwire.deploy.grpc.config import ServerConfig
from expertwire.engine.config.engine_config import EngineConfig
from expertwire.engine.engine import Engine

_POSITIONS = 2**17  # of the model, so that no stream ends within a measurement
_START_S = 60.0
_SETTLE_S = 0.5
_FILES = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One load.

    Args:
        rate: tokens per second that the engine samples, for all streams together.
        streams: how many.
        fronts: processes that serve them.
        session: None, or whether all streams are requests of one `Session`, "text" or "ids".
        sampling: sampling parameters besides those of all cases.
    """

    rate: float
    streams: int = 64
    fronts: int = 1
    session: Literal["text", "ids"] | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)

    @property
    def step_time_s(self) -> float:
        """Seconds of a step that samples a token for every branch."""
        return self.streams * self.sampling.get("n", 1) / self.rate


def _stops(count: int) -> dict[str, Any]:
    return {"stop": [f"stop string {number:03} that does not occur" for number in range(count)]}


CASES: Mapping[str, Case] = {
    "streams": Case(rate=6_000),
    "streams 16": Case(rate=6_000, streams=16),
    "streams 256": Case(rate=6_000, streams=256),
    "session": Case(rate=30_000, streams=256, session="text"),
    "session ids": Case(rate=50_000, streams=256, session="ids"),
    "n 4": Case(rate=6_000, streams=16, sampling={"n": 4}),
    "n 16": Case(rate=6_000, streams=4, sampling={"n": 16}),
    "logprobs 0": Case(rate=5_000, sampling={"logprobs": 0}),
    "logprobs 5": Case(rate=3_000, sampling={"logprobs": 5}),
    "logprobs 20": Case(rate=1_500, sampling={"logprobs": 20}),
    "stop 4": Case(rate=6_000, sampling=_stops(4)),
    "stop 64": Case(rate=6_000, sampling=_stops(64)),
    "fronts 2": Case(rate=6_000, fronts=2),
    "fronts 4": Case(rate=6_000, fronts=4),
}
_HALF_LOAD = Case(rate=18_000)  # as the front's processor time then says
ECHO, PACED_ECHO, LATENCY = "bare grpc.aio", "bare, in steps", "latency"


def run(argv: Sequence[str]) -> int:
    """Measure, print a line a case, and write JSON; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m expertwire.bench front", description=__doc__)
    add_arguments(parser)
    return main(parser.parse_args(argv))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    names = (ECHO, PACED_ECHO, LATENCY, *CASES)
    parser.add_argument("--cases", nargs="+", choices=names, default=names, metavar="CASE", help=", ".join(names))
    parser.add_argument("--seconds", type=float, default=4.0, metavar="X", help="of a run (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="of which the median counts (default: 3)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results there")


def main(args: argparse.Namespace) -> int:
    """Measure and print."""
    results: dict[str, Any] = {}
    with _model_folder() as model:
        for name in args.cases:
            if name in (ECHO, PACED_ECHO):
                results[name] = _measure_echo(args.seconds, args.runs, in_steps=name == PACED_ECHO)
            elif name == LATENCY:
                results[name] = _measure_latency(model, args.seconds, args.runs)
            else:
                results[name] = _measure(model, CASES[name], args.seconds, args.runs)
            print(f"{name:<14} {_line(results[name])}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(_about() | {"results": results}, indent=1) + "\n")
    return 0


def _measure(model: Path, case: Case, seconds: float, runs: int) -> dict[str, Any]:
    with _server(model, case) as (address, pids, _), Client(_load(case, address)) as client:
        _await_streams(client, case.streams)
        return _summary([_window(client, pids, seconds) for _ in range(runs)])


def _measure_echo(seconds: float, runs: int, *, in_steps: bool) -> dict[str, Any]:
    case = CASES["streams"]
    with EchoServer(case.step_time_s if in_steps else 0.0) as server, Client(_load(case, server.address)) as client:
        _await_streams(client, case.streams)
        return _summary([_window(client, [server.pid], seconds) for _ in range(runs)])


def _measure_latency(model: Path, seconds: float, runs: int) -> dict[str, Any]:
    """Return the time from a step's outputs on a bare link to a token's arrival at a client, beside other streams."""
    case, found = _HALF_LOAD, []
    with _server(model, case) as (address, pids, engine), Client(_load(case, address)) as client:
        _await_streams(client, case.streams)
        for _ in range(runs):
            with Steps(engine) as steps, Client(_load(case, address, streams=1)) as probe:
                _await_streams(probe, 1)
                probe.take()
                count = _window(client, pids, seconds)
                values = sorted(added_ms(probe.take().arrivals, steps.times_s))
            p99_ms = values[int(0.99 * (len(values) - 1))]
            found.append(count | {"added_p50_ms": statistics.median(values), "added_p99_ms": p99_ms})
    return _summary(found)


@contextlib.contextmanager
def _server(model: Path, case: Case) -> Iterator[tuple[str, list[int], Engine]]:
    """Yield the address of a server, the process ids of its fronts, and its engine."""
    config = EngineConfig(
        model=str(model),
        load_format="mock",
        mock_step_time_s=min(1.0, case.step_time_s),
        max_num_seqs=case.streams * case.sampling.get("n", 1) + 8,
        enable_prefix_caching=False,
    )
    with contextlib.ExitStack() as stack:
        engine = stack.enter_context(Engine(config, runtime.make_launcher(config)))
        others = set(psutil.Process().children())
        server = ServerConfig(port=0, fronts=case.fronts)
        fronts = stack.enter_context(contextlib.closing(Fronts([(engine, config)], server)))
        pids = [child.pid for child in psutil.Process().children() if child not in others]
        assert len(pids) == case.fronts, f"{len(pids)} new processes, {case.fronts} fronts"
        ended = threading.Event()
        watching = threading.Thread(target=_watch, args=(fronts, ended))
        watching.start()
        stack.callback(watching.join)
        stack.callback(ended.set)
        yield f"127.0.0.1:{fronts.port}", pids, engine


def _watch(fronts: Fronts, ended: threading.Event) -> None:
    while not ended.is_set():
        fronts.watch()


def _load(case: Case, address: str, streams: int | None = None) -> Load:
    sampling = {"max_tokens": _POSITIONS - 64, "ignore_eos": True, "seed": 1, **case.sampling}
    channels = 1 if case.fronts == 1 else 8 * case.fronts
    return Load(
        address=address, streams=streams or case.streams, channels=channels, session=case.session, sampling=sampling
    )


def _await_streams(client: Client, streams: int) -> None:
    deadline = time.monotonic() + _START_S
    while (begun := client.take().begun) < streams:
        if time.monotonic() > deadline:
            raise RuntimeError(f"{begun} of {streams} streams have begun within {_START_S:g} s")
        time.sleep(0.1)
    time.sleep(_SETTLE_S)


def _window(client: Client, pids: Sequence[int], seconds: float) -> dict[str, float]:
    """Return rates of a client and of the processes that serve it."""
    client.take()
    began, before = time.monotonic(), sum(map(_cpu_s, pids))
    time.sleep(seconds)
    count, wall_s = client.take(), time.monotonic() - began
    return _rates(count, wall_s, sum(map(_cpu_s, pids)) - before)


def _rates(count: Count, wall_s: float, cpu_s: float) -> dict[str, float]:
    return {
        "tokens_per_cpu_s": count.tokens / cpu_s,
        "messages_per_cpu_s": count.messages / cpu_s,
        "tokens_per_message": count.tokens / max(1, count.messages),
        "bytes_per_message": count.num_bytes / max(1, count.messages),
        "tokens_per_s": count.tokens / wall_s,
        "load": cpu_s / wall_s,
    }


def _cpu_s(pid: int) -> float:
    """Return the processor time of a process; that of /proc has ticks of 10 ms, of which a run may have no more than 20."""
    return time.clock_gettime(~pid << 3 | 2)  # the clock that clock_getcpuclockid(3) returns on Linux


def _summary(runs: list[dict[str, float]]) -> dict[str, Any]:
    medians = {name: round(statistics.median(run[name] for run in runs), 3) for name in runs[0]}
    return medians | {"runs": [{name: round(value, 3) for name, value in run.items()} for run in runs]}


def _line(result: Mapping[str, Any]) -> str:
    added = (
        f", added p50 {result['added_p50_ms']:.2f} p99 {result['added_p99_ms']:.2f} ms"
        if "added_p50_ms" in result
        else ""
    )
    return (
        f"{result['tokens_per_cpu_s']:>10,.0f} tokens, {result['messages_per_cpu_s']:>8,.0f} messages a CPU-second; "
        f"{result['tokens_per_message']:.2f} tokens and {result['bytes_per_message']:.0f} bytes a message, "
        f"{result['tokens_per_s']:,.0f} tokens/s at load {result['load']:.2f}{added}"
    )


def _about() -> dict[str, Any]:
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {"cpu": processor(), "cores": os.cpu_count(), "load_average": os.getloadavg()},
        "versions": {"python": platform.python_version(), "grpcio": grpc.__version__},
    }


@contextlib.contextmanager
def _model_folder() -> Iterator[Path]:
    """Yield a folder with the demo model's tokenizer, and its config with more positions."""
    demo = Path(expertwire.__file__).with_name("demo_model")
    with tempfile.TemporaryDirectory(prefix="expertwire-bench-") as name:
        folder = Path(name)
        for file in _FILES:
            shutil.copy(demo / file, folder)
        config = json.loads((demo / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": _POSITIONS}))
        yield folder
