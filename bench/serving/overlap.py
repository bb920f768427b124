"""`python -m expertwire.bench.serving.overlap`: measures whether the controller's work overlaps with the ranks'.

The controller's loop (`engine.controller.step`) drives rank processes over the real control channel, with a frontend that reads
the outputs. The ranks run the engine's loop (`engine.rank_loop`) and wait instead of computing, so the period of a step is the
ranks' time (`forward_us`) plus the hosts' overhead.

By default a rank has a device that queues work, as a GPU does: its host sends the last result and launches the next step while
the device computes. With `--host-computes` it has none, as on a CPU, and both add to the step.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from expertwire.bench.scheduler.simulation import CACHES, EOS, SimulatedRanks
from expertwire.bench.serving import throughput
from expertwire.comm.control.channel import ChannelClosed, ControlHub, ControlLink, SocketChannel
from expertwire.engine import controller
from expertwire.engine.config.engine_config import ModelInfo
from expertwire.engine.frontend_hub import FrontendHub, send_connection
from expertwire.engine.launcher import LocalLauncher, WorkerSpec
from expertwire.engine.rank_loop import Launched, serve
from expertwire.scheduler.config import SchedulerConfig
from expertwire.scheduler.plan import StepPlan, StepResult
from expertwire.scheduler.request import Request
from expertwire.scheduler.sampling_params import SamplingParams
from expertwire.scheduler.scheduler import Scheduler

_WARM_UP = 20
_PROMPT = 64
_SPIN_S = 0.3e-3  # at the end of a simulated step


def main() -> int:
    """Measure with and without overlap, alternately; print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--running", type=int, default=64, help="running requests of all ranks")
    parser.add_argument("--step-ms", type=float, default=10.0, help="time of a step on the ranks")
    parser.add_argument("--host-computes", action="store_true", help="ranks without devices")
    parser.add_argument("--steps", type=int, default=300, help="steps per round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    for _ in range(args.rounds):
        for overlap in (True, False):
            rows.append({"overlap": overlap, **measure(args, overlap=overlap)})
            print(" ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    for overlap in (True, False):
        periods = [row["period_ms_p50"] for row in rows if row["overlap"] == overlap]
        print(f"overlap {'on ' if overlap else 'off'}: {statistics.median(periods):.3f} ms a step")
    if args.json:
        setting = {name: value for name, value in vars(args).items() if name != "json"}
        result = {"machine": throughput.machine("cpu"), "setting": setting, "rows": rows}
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def measure(args: argparse.Namespace, *, overlap: bool) -> dict[str, float]:
    """Return the periods of steps in ms, and the controller's times in µs per step."""
    num_tokens = args.steps + _WARM_UP + 8
    config = scheduler_config(args.ranks, args.running, _PROMPT + num_tokens)
    with _open_loop(config, args.step_ms * 1e-3, args.host_computes) as loop:
        for key in range(args.running):
            prompt = np.random.default_rng(key).integers(1, config.vocab_size, _PROMPT, dtype=np.int32)
            params = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
            rejection = loop.scheduler.submit(Request(key=key, prompt=prompt, params=params, seed=key), 0.0)
            assert rejection is None, rejection
        flight = None
        for _ in range(_WARM_UP):
            flight = controller.step(loop, flight, 60.0, overlap=overlap)
        before, times = dict(loop.totals), [time.perf_counter()]
        for _ in range(args.steps):
            flight = controller.step(loop, flight, 60.0, overlap=overlap)
            times.append(time.perf_counter())
        parts = {name: (loop.totals[name] - before[name]) / args.steps for name in before if name.endswith("_us")}
    periods = np.diff(times) * 1e3
    figures = {"period_ms_p50": np.median(periods), "period_ms_p99": np.percentile(periods, 99), **parts}
    return {name: round(float(value), 3) for name, value in figures.items()}


def scheduler_config(num_ranks: int, running: int, max_model_len: int) -> SchedulerConfig:
    """Return a configuration with slots and blocks for all requests at once."""
    blocks = -(-max_model_len // 16) * running
    return SchedulerConfig(
        num_ranks=num_ranks,
        max_num_seqs=running,
        max_num_batched_tokens=8192,
        max_model_len=max_model_len,
        block_size=16,
        num_blocks=blocks + running + 1,
        max_queued_requests=running,
        eos_token_ids=(EOS,),
        vocab_size=32000,
    )


def rank_main(
    setting: tuple[SchedulerConfig, float, bool],
    rank: int,
    num_ranks: int,
    address: str,
    token: str,
    node: str,
    gpu: int,
) -> None:
    """Run a rank with the engine's loop and a simulated model."""
    link = ControlLink(address, token, rank=rank, node=node, hello={})
    with contextlib.suppress(ChannelClosed):
        serve(link, _SimulatedRunner(*setting, rank))
    link.close()


class _SimulatedRunner:
    """A runner that takes `step_s` for every step."""

    def __init__(self, config: SchedulerConfig, step_s: float, host_computes: bool, rank: int) -> None:
        self._ranks, self._rank = SimulatedRanks(config), rank
        self._step_s, self._host_computes = step_s, host_computes
        self.depth = 1 if host_computes else 2
        self._free_at = 0.0  # when the device will have finished its queue

    def launch(self, plan: StepPlan) -> Launched:
        """See `rank_loop.Steps`."""
        mine = plan.rank(self._rank)
        start = max(time.perf_counter(), self._free_at)
        self._free_at = end = start + self._step_s

        def finish() -> StepResult:
            until = time.perf_counter() + self._step_s if self._host_computes else end
            answer = self._ranks.run(plan)[0][self._rank]
            assert len(answer.slot_O) <= len(mine.sched_slot_S), f"{len(answer.slot_O)} of {len(mine.sched_slot_S)}"
            _wait_until(until)
            return StepResult(**{**vars(answer), "forward_us": int(self._step_s * 1e6)})

        return Launched(finish, lambda: time.perf_counter() >= end - _SPIN_S)


def _wait_until(end: float) -> None:
    """Wait precisely: a sleep alone would be late by about 0.1 ms, which is not overhead of the host."""
    time.sleep(max(0.0, end - _SPIN_S - time.perf_counter()))
    while time.perf_counter() < end:
        pass


@contextlib.contextmanager
def _open_loop(config: SchedulerConfig, step_s: float, host_computes: bool) -> Iterator[controller.ControllerState]:
    launcher = LocalLauncher("expertwire.bench.serving.overlap:rank_main")
    hub = ControlHub(config.num_ranks, token="bench")
    frontends, reader = _open_frontend()
    try:
        setting = (config, step_s, host_computes)
        launcher.start(WorkerSpec(config=setting, num_ranks=config.num_ranks, address=hub.address, token="bench"))
        hub.wait_joined(60, launcher.poll)
        yield controller.ControllerState(
            scheduler=Scheduler(config, CACHES), hub=hub, info=_info(config), frontends=frontends
        )
    finally:
        hub.close()
        launcher.stop(5)
        frontends.close()
        reader.join()


def _open_frontend() -> tuple[FrontendHub, threading.Thread]:
    """Return the controller's connection to a frontend that reads all messages, and the thread that reads."""
    to_controller, newcomers = socket.socketpair()
    with to_controller:
        far = SocketChannel(send_connection(to_controller))
        frontends = FrontendHub(newcomers)
        frontends.poll(0.0)

    def read() -> None:
        with contextlib.suppress(ChannelClosed, socket.error):
            while True:
                far.recv(None)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    return frontends, reader


def _info(config: SchedulerConfig) -> ModelInfo:
    return ModelInfo(
        name="simulated",
        path="",
        architecture="",
        dtype="bfloat16",
        kv_cache_dtype="bfloat16",
        vocab_size=config.vocab_size,
        max_model_len=config.max_model_len,
        eos_token_ids=config.eos_token_ids,
        num_layers=1,
        num_experts=1,
        top_k=1,
        ep_size=config.num_ranks,
        device="cpu",
        all_to_all="",
        block_size=config.block_size,
        cache_tokens=0,
        cache_blocks={},
        cache_bytes={},
        max_num_seqs=config.max_num_seqs,
        max_queued_requests=config.max_queued_requests,
        max_queued_requests_per_tenant=config.max_queued_requests,
        seed=0,
    )


if __name__ == "__main__":
    raise SystemExit(main())
