"""Topology reports: each rank probes its GPU, and the topology is assembled from the reports of all ranks.

A rank reads its GPU's position in the NVLink fabric from NVML (https://docs.nvidia.com/deploy/nvml-api) and tests its
peers on the same node by writing to their memory and reading back. Nothing is inferred from a machine's name. CPU ranks
of a node form a domain, as their processes can share memory.

P ranks.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from expertwire.comm.group import Group, all_gather_text
from expertwire.comm.topology.topology import RankLocation, Topology

FABRIC_STATES = ("not supported", "not started", "in progress", "completed")
_COMPLETED = FABRIC_STATES[3]
_NO_CLUSTER = "00" * 16
_PATTERN_WORDS = 1 << 12
_PROBE_TIMEOUT_S, _PROBE_GPU_S = 60.0, 20.0  # for imports, and for a context on each GPU while other ranks make theirs


@dataclass(frozen=True, kw_only=True)
class RankReport:
    """A rank's topology report.

    Args:
        node: its host's name, from the launcher.
        gpu: the GPU's UUID; "" on a CPU.
        cluster, clique: its fabric and the part of it; GPUs reach each other if both are equal.
        fabric_state: one of `FABRIC_STATES`.
        fabric_error: NVML's status of the registration, 0 for success.
        peers: GPUs of this node whose memory it can read and write.
        shared_bytes: free shared memory of this node; 0 if there is none.
    """

    node: str
    gpu: str = ""
    cluster: str = _NO_CLUSTER
    clique: int = 0
    fabric_state: str = FABRIC_STATES[0]
    fabric_error: int = 0
    peers: tuple[str, ...] = ()
    shared_bytes: int = 0

    @property
    def in_fabric(self) -> bool:
        """Return whether the GPU can reach those of other nodes."""
        return self.fabric_state == _COMPLETED and self.fabric_error == 0 and self.cluster != _NO_CLUSTER


def probe(node: str, device: str) -> RankReport:
    """Return this rank's report; `device` is "cpu" or "cuda:N", with the node's other GPUs visible too.

    Raises:
        ValueError: the test of the peers failed.
    """
    if device == "cpu":
        return RankReport(node=node, shared_bytes=_free_shared_bytes())
    mine = torch.device(device).index
    gpus = [_identity(index) for index in range(torch.cuda.device_count())]
    peers = tuple(gpus[index] for index in peers_of(mine))
    try:
        fabric = fabric_info(load_nvml(), gpus[mine])
    except ValueError as error:
        fabric = {"fabric_state": f"unknown ({error})"}
    return RankReport(node=node, gpu=gpus[mine], peers=peers, **fabric)


def _free_shared_bytes() -> int:
    try:
        found = os.statvfs("/dev/shm")
    except OSError:
        return 0
    return found.f_bavail * found.f_frsize


def _identity(index: int) -> str:
    return f"GPU-{torch.cuda.get_device_properties(index).uuid}"


def peers_of(device: int) -> list[int]:
    """Return the GPUs that `device` reaches, tested in another process, because a context takes memory on every GPU.

    Raises:
        ValueError: the test failed.
    """
    command = [sys.executable, "-P", "-m", "expertwire.comm.topology.probe", str(device)]
    timeout_s = _PROBE_TIMEOUT_S + _PROBE_GPU_S * torch.cuda.device_count()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=True)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        said = (error.stderr or b"") if isinstance(error.stderr, bytes) else (error.stderr or "").encode()
        last = said.decode(errors="replace").strip().rpartition("\n")[2]
        raise ValueError(f"the peers of GPU {device} cannot be tried: {last or error}") from None
    return json.loads(done.stdout)


def reaches(device: int, peer: int) -> bool:
    """Return whether GPU `device` can use the memory of `peer`: the driver says so, and a pattern survives a round trip."""
    if not torch.cuda.can_device_access_peer(device, peer):
        return False
    pattern = torch.arange(_PATTERN_WORDS, dtype=torch.int32, device=f"cuda:{device}").mul_(2654435761 % 2**31)
    there = torch.empty_like(pattern, device=f"cuda:{peer}").copy_(pattern)
    torch.cuda.synchronize(peer)
    back = torch.empty_like(pattern).copy_(there)
    return torch.equal(back, pattern)


def load_nvml() -> Any:
    """Return NVIDIA's package for NVML, initialised.

    Raises:
        ValueError: the package or the driver's library is missing or fails.
    """
    try:
        import pynvml  # of nvidia-ml-py, which only machines with GPUs need
    except ImportError:
        raise ValueError(
            "the topology cannot be read: nvidia-ml-py is not installed (the extras cuda12 and cuda13 have it)"
        ) from None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise ValueError(f"the topology cannot be read: {error}") from None
    return pynvml


def fabric_info(nvml: Any, gpu: str) -> dict[str, Any]:
    """Return the fabric's fields of `RankReport`; none if the driver has no such call.

    Raises:
        ValueError: NVML does not know the GPU.
    """
    try:
        handle = nvml.nvmlDeviceGetHandleByUUID(gpu)
    except nvml.NVMLError as error:
        raise ValueError(f"the topology cannot be read: NVML knows no {gpu} ({error})") from None
    info = nvml.c_nvmlGpuFabricInfo_t()
    try:
        nvml.nvmlDeviceGetGpuFabricInfo(handle, ctypes.byref(info))
    except nvml.NVMLError:
        return {}
    return {
        "cluster": bytes(info.clusterUuid).hex(),
        "clique": info.cliqueId,
        "fabric_state": FABRIC_STATES[info.state],
        "fabric_error": info.status,
    }


def gather_reports(group: Group, report: RankReport, device: str) -> list[RankReport]:
    """Return the reports of all ranks. All ranks call it together."""
    texts = all_gather_text(group, json.dumps(asdict(report)), device)
    return [RankReport(**{**fields, "peers": tuple(fields["peers"])}) for fields in map(json.loads, texts)]


def assemble(reports: Sequence[RankReport]) -> Topology:
    """Return the topology of the reports, which are in rank order.

    GPUs of one node share a domain if they reach each other both ways; GPUs of two nodes if they are in one clique of
    one fabric. CPU ranks of one node share one.
    """
    domain_P = list(range(len(reports)))
    for rank, report in enumerate(reports):
        for other in range(rank):
            if connected(report, reports[other]):
                old, new = domain_P[rank], domain_P[other]
                domain_P = [new if domain == old else domain for domain in domain_P]
    locations = [
        RankLocation(domain=f"domain of rank {domain}", node=report.node, failure_domain=report.node)
        for domain, report in zip(domain_P, reports, strict=True)
    ]
    return Topology(name="these machines", locations=tuple(locations))


def connected(one: RankReport, other: RankReport) -> bool:
    """Return whether two ranks reach each other's memory."""
    if one.node == other.node:
        if not one.gpu or one.gpu == other.gpu:  # no GPU, or several ranks on one
            return one.gpu == other.gpu
        return other.gpu in one.peers and one.gpu in other.peers
    return one.in_fabric and other.in_fabric and (one.cluster, one.clique) == (other.cluster, other.clique)


def _main() -> None:
    device = int(sys.argv[1])
    reached = [peer for peer in range(torch.cuda.device_count()) if peer != device and reaches(device, peer)]
    sys.stdout.write(json.dumps(reached))


if __name__ == "__main__":
    _main()
