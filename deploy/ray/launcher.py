"""Launcher of workers as Ray actors, one per rank, on one machine or many.

Ray places the actors and watches them; a step involves no Ray object. All machines of the cluster need the same version of
`expertwire`.
"""

from __future__ import annotations

import importlib
import logging
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import psutil
import ray
from ray.exceptions import ActorDiedError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from expertwire.comm.control.channel import this_node
from expertwire.deploy.ray import address as addresses
from expertwire.deploy.ray import guard, placement
from expertwire.deploy.ray.placement import Node
from expertwire.engine.frontend.api import EngineFailed
from expertwire.engine.launcher import WORKER, RankFailed, WorkerSpec

_OBJECT_STORE_BYTES = 80 << 20  # unused; Ray's minimum
_START_S = 120.0  # for Ray to provide the actors' processes
_GRACE_S = 0.5
# By default an actor sees its own GPU only, as device 0, and ranks could not reach each other's memory
# (set_current_process_visible_accelerator_ids in ray/_private/accelerators/nvidia_gpu.py, ray 2.50 to 2.60).
_ALL_DEVICES = {"env_vars": {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}}

_logger = logging.getLogger(__name__)


class _Worker:
    """The actor of a rank."""

    def where(self) -> tuple[str, int]:
        """Return this node's address and the process id."""
        return ray.util.get_node_ip_address(), os.getpid()

    def run(self, path: list[str], target: str, spec: WorkerSpec, rank: int) -> None:
        """Run the worker's entry point with the driver's import path, until the engine ends."""
        sys.path += [entry for entry in path if entry and entry not in sys.path]
        module, _, function = target.partition(":")
        main = getattr(importlib.import_module(module), function)
        gpu = placement.ordinal(ray.get_gpu_ids(), os.environ.get("CUDA_VISIBLE_DEVICES"))
        main(spec.config, rank, spec.num_ranks, spec.address, spec.token, this_node(), gpu)


class RayLauncher:
    """A `Launcher` on a Ray cluster.

    A rank takes one GPU if the config's `device` is "cuda", or "auto" on a cluster with GPUs, and sees all GPUs of its node;
    otherwise it takes one CPU, or the largest fraction 1/k of a CPU with which all ranks fit. GPU ranks are placed in one NVLink
    domain if one is large enough (`deploy.ray.placement`).

    Args:
        address: "host:port" of a running cluster, "auto" for the one on this machine, or "local", which starts Ray on this
            machine, and ends it in `stop`; None is Ray's variable RAY_ADDRESS, and "local" without it. A process that is
            already connected to Ray stays with that cluster.
        worker: the worker's entry point, "package.module:function".
        connect_timeout_s: seconds within which a cluster must answer.

    Raises:
        ValueError: `address` is malformed.
    """

    def __init__(self, address: str | None = None, *, worker: str = WORKER, connect_timeout_s: float = 30.0) -> None:
        addresses.check_address(address)
        self._address = address or addresses.from_environment() or "local"
        self._worker = worker
        self._connect_timeout_s = connect_timeout_s
        self._owns_ray = False
        self._guard: subprocess.Popen[bytes] | None = None
        self._group: PlacementGroup | None = None
        self._actors: list[Any] = []
        self._runs: list[ray.ObjectRef] = []
        self._places: list[tuple[str, int]] = []

    def connect(self) -> None:
        """See `engine.launcher.Launcher`: connect to Ray, or start it.

        Raises:
            ValueError: no Ray cluster answers at the given address, or it refuses our token.
            EngineFailed: Ray cannot be started.
        """
        if ray.is_initialized():
            return
        if self._address == "local":
            self._start_ray()
            return
        if self._address != "auto":
            addresses.check_answers(self._address, self._connect_timeout_s)
        _init_within(self._address, self._connect_timeout_s)
        self._owns_ray = True  # only the connection; `stop` leaves the cluster running

    def hub_address(self) -> str:
        """See `engine.launcher.Launcher`. Connects to a cluster; a Ray of its own is started by `connect`, beside the controller.

        Raises:
            ValueError: no Ray cluster answers at the given address, or it refuses our token.
        """
        if self._address == "local" and not ray.is_initialized():
            return "tcp:127.0.0.1:0"  # all ranks will be on this machine
        self.connect()
        return f"tcp:{ray.util.get_node_ip_address()}:0"

    def start(self, spec: WorkerSpec) -> None:
        """See `engine.launcher.Launcher`; waits for the actors' processes.

        Raises:
            ValueError: the cluster is too small, or cannot be reached.
            EngineFailed: Ray cannot be started.
            RankFailed: no room in time, or a process did not start.
        """
        assert not self._actors, f"{len(self._actors)} workers run already"
        self.connect()
        deadline = time.monotonic() + _START_S
        entries = [entry for entry in ray.nodes() if entry["Alive"]]
        nodes = [Node.of(entry) for entry in entries]
        resources = _resources(spec, entries)
        group = self._reserve(spec, resources, nodes)
        bundle_nodes = placement_group_table(group)["bundles_to_node_id"]
        for bundle in placement.in_order(bundle_nodes, nodes, ray.get_runtime_context().get_node_id()):
            strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle)
            worker = ray.remote(_Worker).options(
                max_restarts=0,
                num_cpus=resources["CPU"],
                num_gpus=resources.get("GPU", 0),
                scheduling_strategy=strategy,
                runtime_env=_ALL_DEVICES if "GPU" in resources else None,
            )
            self._actors.append(worker.remote())
        for rank, actor in enumerate(self._actors):
            self._places.append(self._await_actor(rank, actor, deadline))
        # The ranks run in these calls, whose references report their end.
        self._runs = [actor.run.remote(sys.path, self._worker, spec, rank) for rank, actor in enumerate(self._actors)]

    def poll(self) -> None:
        """See `engine.launcher.Launcher`. Of several dead workers, one whose process died is named."""
        if not self._runs:
            return
        done, _ = ray.wait(self._runs, num_returns=len(self._runs), timeout=0)
        if done:
            ends = {rank: _how_it_ended(ref) for rank, ref in enumerate(self._runs) if ref in done}
            rank = min(ends, key=lambda rank: ends[rank][0])
            ip, pid = self._places[rank]
            raise RankFailed(rank, f"worker process {pid} on {ip} {ends[rank][1]}")

    def stop(self, timeout_s: float) -> None:
        """See `engine.launcher.Launcher`. Ray itself is ended only if it was started here."""
        if ray.is_initialized():
            deadline = time.monotonic() + timeout_s
            if self._runs:
                ray.wait(self._runs, num_returns=len(self._runs), timeout=min(_GRACE_S, timeout_s))
            for actor in self._actors:
                ray.kill(actor, no_restart=True)
            if self._group:
                remove_placement_group(self._group)
            here = ray.util.get_node_ip_address()
            _await_gone([pid for ip, pid in self._places if ip == here], deadline)
            if self._owns_ray:
                ray.shutdown()
        if self._guard:
            guard.stop(self._guard)
        self._guard = None
        self._actors, self._runs, self._places, self._group, self._owns_ray = [], [], [], None, False

    def _start_ray(self) -> None:
        on_sigterm = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(
                address="local",
                include_dashboard=False,
                logging_level=logging.ERROR,
                object_store_memory=_OBJECT_STORE_BYTES,
            )
        except Exception as error:  # Ray raises nothing narrower
            raise EngineFailed(f"Ray cannot be started on this machine: {_in_one_line(error)}") from error
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, on_sigterm)  # Ray's own exits with code 15
        self._owns_ray = True
        if sys.platform == "linux":
            raylet = next(child for child in psutil.Process().children() if child.name() == "raylet")
            self._guard = guard.start(raylet.pid)

    def _reserve(self, spec: WorkerSpec, resources: dict[str, float], nodes: list[Node]) -> PlacementGroup:
        """Return a placement group for the ranks: the first layout for which there are free resources."""
        bundles = [resources] * spec.num_ranks
        selectors: list[list[dict[str, str]] | None] = [None]
        if "GPU" in resources:
            found = placement.layouts(nodes, spec.num_ranks)
            selectors = [list(layout.selectors) for layout in found]
            if (num_domains := len(found[0].domains)) > 1:
                _across_domains(spec, num_domains, nodes)
        for selector in selectors:
            self._group = placement_group(bundles, strategy="PACK", bundle_label_selector=selector)
            if self._group.wait(_START_S / len(selectors)):
                return self._group
            remove_placement_group(self._group)
        self._group = None
        raise RankFailed(
            -1,
            f"Ray found no room for {spec.num_ranks} ranks of {resources} within {_START_S:g} s: "
            f"{ray.available_resources()} are free",
        )

    def _await_actor(self, rank: int, actor: Any, deadline: float) -> tuple[str, int]:
        try:
            return ray.get(actor.where.remote(), timeout=max(0.0, deadline - time.monotonic()))
        except ray.exceptions.GetTimeoutError as error:
            raise RankFailed(rank, f"its process did not start within {_START_S:g} s") from error
        except RayError as error:
            raise RankFailed(rank, f"its process did not start: {_in_one_line(error)}") from error


def _init_within(address: str, timeout_s: float) -> None:
    """Call `ray.init` with a timeout; by itself it tries for minutes to reach an address that is not Ray's."""
    failure: list[BaseException] = []

    def init() -> None:
        try:
            ray.init(address=address, logging_level=logging.ERROR)
        except BaseException as error:  # noqa: BLE001 - raised in the caller's thread
            failure.append(error)

    thread = threading.Thread(target=init, name="ray.init", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if thread.is_alive():
        raise ValueError(f"ray_address {address!r}: no Ray cluster answered within {timeout_s:g} s")
    if failure:
        raise ValueError(f"ray_address {address!r}: cannot connect: {_in_one_line(failure[0])}") from failure[0]


def _across_domains(spec: WorkerSpec, num_domains: int, nodes: list[Node]) -> None:
    """Warn that tokens will leave their NVLink domain.

    Raises:
        ValueError: the all-to-all backend that was chosen does not allow it.
    """
    message = (
        f"ep_size {spec.num_ranks} is more than any NVLink domain of the Ray cluster has GPUs, so the ranks are in {num_domains} "
        f"(nodes are in one domain if their label {' or '.join(placement.DOMAIN_LABELS)} is the same; "
        f"{sum(node.label not in placement.DOMAIN_LABELS for node in nodes)} of {len(nodes)} nodes have none)"
    )
    if getattr(spec.config, "all2all_backend", "auto") == "nvlink":
        raise ValueError(f"all2all_backend 'nvlink' cannot be used: {message}; use a smaller ep_size, 'nccl' or 'auto'")
    _logger.warning("%s", message)


def _resources(spec: WorkerSpec, entries: list[dict[str, Any]]) -> dict[str, float]:
    """Return the resources of one rank, by Ray's names."""
    nodes = [entry["Resources"] for entry in entries]
    device = getattr(spec.config, "device", "cpu")
    needs_gpu = device == "cuda" or (device == "auto" and any(node.get("GPU", 0) for node in nodes))
    cpus = [node.get("CPU", 0) for node in nodes]
    if not any(cpus):
        raise ValueError("the Ray cluster has no CPUs; start its nodes with --num-cpus of at least 1")
    if not needs_gpu:
        share = next(k for k in range(1, 10_000) if sum(int(cpu * k) for cpu in cpus) >= spec.num_ranks)
        return {"CPU": _part(share)}
    # A rank takes its share of a CPU where its GPU is, whatever other nodes have.
    of_gpus = [(node.get("CPU", 0), node["GPU"]) for node in nodes if node.get("GPU", 0)]
    if not all(cpu for cpu, _ in of_gpus):
        raise ValueError("a node of the Ray cluster has GPUs and no CPUs; start it with --num-cpus of at least 1")
    share = next(k for k in range(1, 10_000) if all(int(cpu * k) >= gpu for cpu, gpu in of_gpus))
    return {"CPU": _part(share), "GPU": 1}


def _part(share: int) -> float:
    """Return one of so many equal parts of a CPU, which Ray counts in 1/10,000."""
    return math.floor(1e4 / share) / 1e4


def _how_it_ended(run: ray.ObjectRef) -> tuple[int, str]:
    """Return how likely this end is a consequence of another rank's (0 is the least), and a description."""
    try:
        ray.get(run)
    except ActorDiedError as error:
        return 0, f"has died: {_in_one_line(error)}"
    except RayTaskError as error:
        return 1, f"failed: {_in_one_line(error.cause)}"
    except RayError as error:
        return 0, f"is lost: {_in_one_line(error)}"
    return 2, "has ended"


def _in_one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or repr(error)
    # The relevant part of Ray's message about a lost process.
    detail = re.search(r"Worker exit detail: (.*?)(?: Some common causes|$)", text)
    return (detail[1] if detail else text)[:600]


def _await_gone(pids: list[int], deadline: float) -> None:
    while any(map(psutil.pid_exists, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
