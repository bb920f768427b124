"""Which all-to-all the ranks use: chosen once, at start, the same on all of them; never a silent fallback."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch.distributed as dist

from expertwire.comm import topology_fabric, topology_probe
from expertwire.comm.a2a_local import LocalAllToAll
from expertwire.comm.a2a_nccl import NcclAllToAll
from expertwire.comm.a2a_reference import ReferenceAllToAll
from expertwire.comm.all_to_all import AllToAll, AllToAllSpec
from expertwire.comm.arena import ArenaLayout
from expertwire.comm.group import TorchGroup
from expertwire.comm.topology_all_to_all import HierarchicalAllToAll
from expertwire.comm.topology_choice import Choice, Situation, choose
from expertwire.comm.topology_probe import RankReport
from expertwire.kernels.registry import Ops


def build(wanted: str, spec: AllToAllSpec, ops: Ops, node: str, device: str) -> tuple[AllToAll, Choice]:
    """The all-to-all `wanted`: "auto", "reference", "nccl" or "nvlink", and why; a single rank needs none of them.

    All ranks call it together. `node` is this rank's host, `device` "cpu" or "cuda:N".

    Raises:
        ValueError: these ranks cannot use it, with the reason.
    """
    if spec.group.size == 1:
        alone: AllToAll = LocalAllToAll(spec, ops.permute) if ops.on_device else ReferenceAllToAll(spec)
        return alone, Choice(name="reference", why="there is one rank, and nothing travels")
    reports = topology_probe.gather(spec.group, topology_probe.probe(node, device), device)
    here = _situation(spec, reports, device)
    choice = choose(wanted, here)
    if choice.name == "nvlink" and device != "cpu" and len({report.node for report in reports}) > 1:
        topology_fabric.check_fabric(reports)
        topology_fabric.check_import(spec.group, topology_fabric.load_driver(device), device)
    if choice.name == "nccl" and (rails := here.topology.rails()):
        group, (domain_P, place_P) = cast(TorchGroup, spec.group), rails
        across, within = group.part(place_P), group.part(domain_P)
        return HierarchicalAllToAll(spec, across=across, within=within, make=NcclAllToAll), choice
    return make(choice.name, spec, device), choice


def make(name: str, spec: AllToAllSpec, device: str) -> AllToAll:
    """The backend, without asking whether the ranks can use it. All ranks call it together."""
    if name == "nvlink" and device == "cpu":
        from expertwire.comm import a2a_nvlink

        return a2a_nvlink.build(spec)
    if name == "nvlink":
        from expertwire.comm import a2a_nvlink_gpu  # Triton is of no use elsewhere

        return a2a_nvlink_gpu.build(spec)
    return NcclAllToAll(spec) if name == "nccl" else ReferenceAllToAll(spec)


def _situation(spec: AllToAllSpec, reports: Sequence[RankReport], device: str) -> Situation:
    gpus = [report.gpu for report in reports if report.gpu]
    shared_bytes = min(report.shared_bytes for report in reports)
    return Situation(
        topology=topology_probe.assemble(reports),
        device=device.partition(":")[0],
        step_rows=spec.group.size * spec.max_tokens * spec.top_k,
        libraries=libraries(),
        gpus_shared=len(set(gpus)) < len(gpus),
        arena_fits=device != "cpu" or shared_bytes >= spec.group.size * ArenaLayout.of(spec).nbytes,
    )


def libraries() -> tuple[str, ...]:
    """Those that this torch sends with."""
    return tuple(
        name for name, there in (("gloo", dist.is_gloo_available()), ("nccl", dist.is_nccl_available())) if there
    )
