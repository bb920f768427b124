"""A worker without a model, which joins the hub and does what each message asks.

`config` is a dictionary: `nodes` (node id by rank; the real one if missing), `fail_at_start` (a rank that raises).
A plan has `step`, and may have `die`, `hang`, `quit` or `fail` (a rank), `nap_us` (sleep at random up to that), `answer`
(items to send back).
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import expertwire
from expertwire.comm.control.channel import ChannelClosed, ControlHub, ControlLink
from expertwire.engine import process

TOKEN = "a secret"


def worker_main(config: dict, rank: int, num_ranks: int, address: str, token: str, node: str, gpu: int) -> None:
    """Run a rank; the signature is that of `expertwire.engine.worker.worker_main`."""
    config = config if isinstance(config, dict) else {}
    if config.get("fail_at_start") == rank:
        raise RuntimeError("cannot start")
    node = config["nodes"][rank] if "nodes" in config else node
    hello = {
        "pid": np.array([os.getpid()]),
        "node": np.frombuffer(node.encode(), np.uint8),
        "shadows": np.array([_num_shadows()]),
        "gpu": np.array([gpu]),
        "visible": np.frombuffer(os.environ.get("CUDA_VISIBLE_DEVICES", "all").encode(), np.uint8),
    }
    link = ControlLink(address, token, rank=rank, node=node, hello=hello)
    dice = random.Random(rank)
    with contextlib.suppress(ChannelClosed):
        while True:
            plan = link.recv(None)
            action = next(
                (name for name in ("die", "hang", "quit", "fail") if name in plan and plan[name][0] == rank), None
            )
            if action == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            elif action == "hang":
                time.sleep(3600)
            elif action == "quit":
                return link.close()
            elif action == "fail":
                link.fail("out of luck")
                continue
            if "nap_us" in plan:
                time.sleep(dice.random() * 1e-6 * plan["nap_us"][0])
            answer = np.full(int(plan["answer"][0]) if "answer" in plan else 0, rank, np.int64)
            link.send({"step": plan["step"], "sum": plan["data"].sum(keepdims=True), "answer": answer})
    link.close()


def _num_shadows() -> int:
    """Return how many of our folders would be imported by their bare names, in place of other packages."""
    root = str(Path(expertwire.__file__).parent.parent)
    specs = [
        importlib.util.find_spec(name) for name in ("bench", "comm", "deploy", "engine", "kernels", "moe", "scheduler")
    ]
    return sum(spec is not None and str(spec.origin).startswith(root + os.sep) for spec in specs)


def controller_main(num_ranks: int, config: dict) -> None:
    """Run a controller that prints the pids of its ranks and steps until it is killed."""
    hub = ControlHub(num_ranks, token=TOKEN)
    workers = [start_rank(config, rank, num_ranks, hub.address) for rank in range(num_ranks)]
    hub.wait_joined(30, lambda: None)
    print(*[worker.pid for worker in workers], flush=True)
    for step in range(10**9):
        hub.publish(plan(step))
        hub.collect(30)


def start_rank(config: dict, rank: int, num_ranks: int, address: str, token: str = TOKEN) -> subprocess.Popen[bytes]:
    return process.start_call(
        "helpers.control_ranks:worker_main", config, rank, num_ranks, address, token, config.get("node", "here"), rank
    )


@contextlib.contextmanager
def joined(nodes: str, config: dict | None = None) -> Iterator[tuple[ControlHub, list[subprocess.Popen[bytes]]]]:
    """Yield a hub on node A with a rank on each of `nodes` ("AAB": two on A and one on B), and the rank processes."""
    hub = ControlHub(len(nodes), token=TOKEN, node="A")
    config = {"nodes": tuple(nodes)} | (config or {})
    workers = [start_rank(config, rank, len(nodes), hub.address) for rank in range(len(nodes))]
    try:
        hub.wait_joined(60, lambda: None)
        yield hub, workers
    finally:
        hub.close()
        process.stop_all(workers, 5)


def plan(step: int, size: int = 10, **actions: int) -> dict[str, np.ndarray]:
    """Return a plan whose data sum to `step * size`."""
    return {
        "step": np.array([step]),
        "data": np.full(size, step),
        **{name: np.array([value]) for name, value in actions.items()},
    }
