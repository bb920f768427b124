"""Cost of a step on the control channel, beside what Ray itself would offer.

A step sends one plan to every rank and waits until every rank has answered; the ranks compute nothing. Channels:

    direct   our channel, ranks on the controller's node
    relay    our channel, all ranks on another node, whose first rank forwards plans to the others
             (on this machine, through the loopback interface)
    actor    a Ray actor call to every rank and `ray.get` of the answers
    graph    a Ray compiled graph over all ranks

All move the same arrays, packed by us: for Ray they are one `bytes` object, the best case of its serialiser.
Blocks of steps of all channels alternate, because other load on the machine comes and goes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import psutil
import ray
from ray.dag import InputNode, MultiOutputNode

from expertwire.bench.machine import processor
from expertwire.comm.control.channel import ChannelClosed, ControlHub, ControlLink, pack, unpack
from expertwire.deploy.ray.launcher import RayLauncher
from expertwire.engine.launcher import LocalLauncher, WorkerSpec
from expertwire.scheduler.plan import StepPlan, StepResult

CHANNELS = ("direct", "relay", "actor", "graph")
DECODES = (64, 3700)  # of all ranks together: plans of about 2 and 50 KB
GAPS_US = (0, 1000)  # between steps
_BLOCK = 50  # steps of a channel before the next one takes its turn
_WARM_UP_STEPS = 5


class Channel(Protocol):
    """One way to carry out a step."""

    pids: list[int]  # of the ranks

    def step(self, plan: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
        """Send the plan to every rank, wait for every answer."""
        ...


def answer(plan: dict[str, np.ndarray], num_ranks: int) -> dict[str, np.ndarray]:
    """Return a rank's answer: a `StepResult` with its share of the decodes."""
    return _arrays(StepResult, "_O", len(StepPlan.from_arrays(plan).sched_slot_S) // num_ranks, num_ranks)


def plan_of(decodes: int, num_ranks: int) -> dict[str, np.ndarray]:
    """Return a `StepPlan` in which every rank decodes its share and nothing else happens."""
    return _arrays(StepPlan, "_S", decodes, num_ranks)


def run(
    num_ranks: tuple[int, ...] = (1, 2, 4), steps: int = 1000, channels: tuple[str, ...] = CHANNELS
) -> dict[str, Any]:
    """Measure; return `rows` with, for each combination, µs per step (`p50_us`, `p99_us`) and CPU time per step.

    `controller_cpu_us` is of this process, `ranks_cpu_us` of the ranks, `ray_cpu_us` of Ray's own processes.
    """
    rows = []
    with _ray(any(name in ("actor", "graph") for name in channels)) as daemons:
        for ranks in num_ranks:
            with contextlib.ExitStack() as stack:
                opened = {name: stack.enter_context(_OPEN[name](ranks)) for name in channels}
                for decodes in DECODES:
                    plan = plan_of(decodes, ranks)
                    for gap_us in GAPS_US:
                        for name, figures in _measure(opened, plan, gap_us, steps, daemons).items():
                            row = {"channel": name, "ranks": ranks, "bytes": len(pack(plan)), "gap_us": gap_us}
                            rows.append(row | figures)
                            print(_line(rows[-1]), flush=True)
    machine = {"cpu": processor(), "cores": os.cpu_count(), "load": os.getloadavg()[0]}
    return {"machine": machine, "ray": ray.__version__, "steps": steps, "rows": rows}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `expertwire bench control`."""
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="numbers of ranks to measure")
    parser.add_argument("--steps", type=int, default=1000, help="steps per measurement")
    parser.add_argument(
        "--channels", nargs="+", choices=CHANNELS, default=list(CHANNELS), help="channels to measure (default: all)"
    )
    parser.add_argument("--json", type=Path, help="also write the results there")


def main(args: argparse.Namespace) -> int:
    """Run, print a table, write JSON."""
    print(_HEADER)
    figures = run(tuple(args.ranks), args.steps, tuple(args.channels))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


# ---- measuring


def _measure(
    channels: Mapping[str, Channel],
    plan: dict[str, np.ndarray],
    gap_us: int,
    steps: int,
    daemons: list[psutil.Process],
) -> dict[str, dict[str, float]]:
    times: dict[str, list[float]] = {name: [] for name in channels}
    cpu: dict[str, np.ndarray] = {name: np.zeros(3) for name in channels}
    for start in range(0, steps, _BLOCK):
        for name, channel in channels.items():
            ranks = [psutil.Process(pid) for pid in channel.pids]
            for _ in range(_WARM_UP_STEPS):
                channel.step(plan)
            before = np.array([time.process_time(), _cpu_s(ranks), _cpu_s(daemons)])
            times[name] += [_timed(channel, plan, gap_us) for _ in range(min(_BLOCK, steps - start))]
            cpu[name] += np.array([time.process_time(), _cpu_s(ranks), _cpu_s(daemons)]) - before
    figures = {}
    for name in channels:
        values = (*np.percentile(times[name], [50, 99]), *cpu[name] / steps)
        figures[name] = dict(zip(_FIGURES, (round(float(value) * 1e6, 1) for value in values), strict=True))
    return figures


def _timed(channel: Channel, plan: dict[str, np.ndarray], gap_us: int) -> float:
    """Return the seconds of one step."""
    if gap_us:
        time.sleep(gap_us * 1e-6)
    start = time.perf_counter()
    answers = channel.step(plan)
    seconds = time.perf_counter() - start
    assert len(answers) == len(channel.pids), f"{len(answers)} answers of {len(channel.pids)} ranks"
    return seconds


def _cpu_s(processes: list[psutil.Process]) -> float:
    return sum(times.user + times.system for times in (process.cpu_times() for process in processes))


_FIGURES = ("p50_us", "p99_us", "controller_cpu_us", "ranks_cpu_us", "ray_cpu_us")
_HEADER = (
    f"{'channel':8} {'ranks':>5} {'KB':>6} {'gap µs':>7} {'p50 µs':>8} {'p99 µs':>8} "
    f"{'hub CPU':>8} {'rank CPU':>8} {'Ray CPU':>8}"
)


def _line(row: dict[str, Any]) -> str:
    figures = " ".join(f"{row[name]:8.0f}" for name in _FIGURES)
    return f"{row['channel']:8} {row['ranks']:5} {row['bytes'] / 1024:6.1f} {row['gap_us']:7} {figures}"


def _arrays(kind: type[StepPlan] | type[StepResult], suffix: str, items: int, num_ranks: int) -> dict[str, np.ndarray]:
    """Return a plan or result with `items` entries in the fields that end with `suffix`, and nothing in the others."""
    values: dict[str, Any] = dict.fromkeys(kind.scalars, 0)
    for name, dtype in kind.dtypes.items():
        offsets = "offsets" in name or name.endswith("_P")
        values[name] = np.zeros(num_ranks + 1 if offsets else items if name.endswith(suffix) else 0, dtype)
    return kind(**values).to_arrays()


# ---- channels


class _Ours:
    def __init__(self, hub: ControlHub, pids: list[int]) -> None:
        self.pids = pids
        self._hub = hub

    def step(self, plan: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
        self._hub.publish(plan)
        return self._hub.collect(60)


class _Actors:
    def __init__(self, actors: list[Any]) -> None:
        self.pids = ray.get([actor.pid.remote() for actor in actors])
        self._actors = actors

    def step(self, plan: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
        message = pack(plan)
        return [unpack(reply) for reply in ray.get([actor.step.remote(message) for actor in self._actors])]


class _Graph:
    def __init__(self, actors: list[Any]) -> None:
        self.pids = ray.get([actor.pid.remote() for actor in actors])
        with InputNode() as message:
            outputs = MultiOutputNode([actor.step.bind(message) for actor in actors])
        self.graph = outputs.experimental_compile()

    def step(self, plan: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
        return [unpack(reply) for reply in ray.get(self.graph.execute(pack(plan)))]


class _Rank:
    """A rank as a Ray actor."""

    def __init__(self, num_ranks: int) -> None:
        self._num_ranks = num_ranks

    def pid(self) -> int:
        return os.getpid()

    def step(self, message: bytes) -> bytes:
        return pack(answer(unpack(message), self._num_ranks))


def rank_main(nodes: tuple[str, ...], rank: int, num_ranks: int, address: str, token: str, node: str, gpu: int) -> None:
    """Run a rank of our channel."""
    link = ControlLink(address, token, rank=rank, node=nodes[rank], hello={"pid": np.array([os.getpid()])})
    with contextlib.suppress(ChannelClosed):
        while (plan := link.recv(None)) is not None:
            link.send(answer(plan, num_ranks))
    link.close()


@contextlib.contextmanager
def _open_ours(nodes: tuple[str, ...]) -> Iterator[_Ours]:
    launcher = LocalLauncher("expertwire.bench.control:rank_main")
    hub = ControlHub(len(nodes), token="bench", node="here")
    try:
        launcher.start(WorkerSpec(config=nodes, num_ranks=len(nodes), address=hub.address, token="bench"))
        hellos = hub.wait_joined(60, launcher.poll)
        yield _Ours(hub, [int(hello["pid"][0]) for hello in hellos])
    finally:
        hub.close()
        launcher.stop(5)


@contextlib.contextmanager
def _open_actors(num_ranks: int) -> Iterator[list[Any]]:
    actors: list[Any] = [ray.remote(_Rank).options(num_cpus=0).remote(num_ranks) for _ in range(num_ranks)]
    try:
        yield actors
    finally:
        for actor in actors:
            ray.kill(actor)


@contextlib.contextmanager
def _open_calls(num_ranks: int) -> Iterator[_Actors]:
    with _open_actors(num_ranks) as actors:
        yield _Actors(actors)


@contextlib.contextmanager
def _open_graph(num_ranks: int) -> Iterator[_Graph]:
    with _open_actors(num_ranks) as actors:
        channel = _Graph(actors)
        try:
            yield channel
        finally:
            channel.graph.teardown()


_OPEN: dict[str, Callable[[int], contextlib.AbstractContextManager[Channel]]] = {
    "direct": lambda num_ranks: _open_ours(("here",) * num_ranks),
    "relay": lambda num_ranks: _open_ours(("there",) * num_ranks),
    "actor": _open_calls,
    "graph": _open_graph,
}


@contextlib.contextmanager
def _ray(needed: bool) -> Iterator[list[psutil.Process]]:
    """Start Ray if it is needed, and yield its own processes."""
    if not needed:
        yield []
        return
    launcher = RayLauncher()
    launcher.connect()
    try:
        children = psutil.Process().children(recursive=True)
        yield [child for child in children if child.name() in ("raylet", "gcs_server")]
    finally:
        launcher.stop(10)


if __name__ == "__main__":
    _parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(_parser)
    raise SystemExit(main(_parser.parse_args()))
