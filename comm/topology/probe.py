"""The topology of the machines at hand: what every rank finds out about its GPU, and what follows from all of it.

A rank asks NVML for its GPU's place in the NVLink fabric (https://docs.nvidia.com/deploy/nvml-api) and tries its peers on the
same node: bytes that it writes to them must come back. Nothing is inferred from the name of a machine. Without a GPU there is
nothing to probe: each node is then a domain, as its processes can share memory.
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

from expertwire.comm.group import Group, everyones_text
from expertwire.comm.topology.topology import Place, Topology

FABRIC_STATES = ("not supported", "not started", "in progress", "completed")
_COMPLETED = FABRIC_STATES[3]
_NO_CLUSTER = "00" * 16
_PATTERN_WORDS = 1 << 12
_PROBE_TIMEOUT_S = 60.0


@dataclass(frozen=True, kw_only=True)
class RankReport:
    """What a rank has found.

    Args:
        node: its host, as the launcher calls it.
        gpu: the GPU's identity; "" on a CPU.
        cluster, clique: which fabric it belongs to, and which part of it; GPUs reach each other if both are equal.
        fabric_state: one of `FABRIC_STATES`.
        fabric_error: NVML's status of the registration, 0 for success.
        peers: GPUs of this node whose memory it reads and writes.
        shared_bytes: free in the memory that processes of this node share; 0 if they share none.
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
        """Whether GPUs of other nodes may be reached at all."""
        return self.fabric_state == _COMPLETED and self.fabric_error == 0 and self.cluster != _NO_CLUSTER


def probe(node: str, device: str) -> RankReport:
    """What this rank finds; `device` is "cpu" or "cuda:N", with the node's other GPUs visible too.

    Raises:
        ValueError: a peer could be neither reached nor found out of reach.
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
    """The GPUs that `device` reaches. A process of its own tries, as what it opens on every GPU takes some of its memory.

    Raises:
        ValueError: it has failed.
    """
    command = [sys.executable, "-P", "-m", "expertwire.comm.topology.probe", str(device)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PROBE_TIMEOUT_S, check=True)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        said = (error.stderr or b"") if isinstance(error.stderr, bytes) else (error.stderr or "").encode()
        last = said.decode(errors="replace").strip().rpartition("\n")[2]
        raise ValueError(f"the peers of GPU {device} cannot be tried: {last or error}") from None
    return json.loads(done.stdout)


def reaches(device: int, peer: int) -> bool:
    """Whether the GPU `device` reads and writes the memory of `peer`: the driver must say so, and a pattern must come back."""
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
        ValueError: the package or the driver's library is not there, or refuses.
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
    """Return fields of `RankReport`; none from a driver that knows no fabric.

    Raises:
        ValueError: there is no such GPU.
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


def gather(group: Group, report: RankReport, device: str) -> list[RankReport]:
    """Everybody's reports, by rank. All ranks call it together."""
    said = everyones_text(group, json.dumps(asdict(report)), device)
    return [RankReport(**{**fields, "peers": tuple(fields["peers"])}) for fields in map(json.loads, said)]


def assemble(reports: Sequence[RankReport]) -> Topology:
    """The topology that follows from the reports, which are in the order of the ranks.

    GPUs of one node share a domain if they reach each other both ways; GPUs of two nodes if they are in one clique of one fabric.
    CPU ranks of one node share one.
    """
    domain_P = list(range(len(reports)))
    for rank, report in enumerate(reports):
        for other in range(rank):
            if joined(report, reports[other]):
                old, new = domain_P[rank], domain_P[other]
                domain_P = [new if domain == old else domain for domain in domain_P]
    places = [
        Place(domain=f"domain of rank {domain}", node=report.node, failure_domain=report.node)
        for domain, report in zip(domain_P, reports, strict=True)
    ]
    return Topology(name="these machines", places=tuple(places))


def joined(one: RankReport, other: RankReport) -> bool:
    """Whether they reach each other's memory, by what they have found."""
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
