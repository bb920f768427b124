"""Which all-to-all the ranks use: chosen once, at start, the same on all of them; never a silent fallback."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import cast

import torch.distributed as dist
from torch import Tensor

from expertwire.comm.all_to_all import fp8 as a2a_fp8
from expertwire.comm.all_to_all import nvlink
from expertwire.comm.all_to_all.base import AllToAll, AllToAllSpec
from expertwire.comm.all_to_all.fp8 import Fp8AllToAll
from expertwire.comm.all_to_all.hierarchical import HierarchicalAllToAll
from expertwire.comm.all_to_all.local import LocalAllToAll
from expertwire.comm.all_to_all.nccl import NcclAllToAll
from expertwire.comm.all_to_all.reference import ReferenceAllToAll
from expertwire.comm.all_to_all.symmetric_buffer import ArenaLayout
from expertwire.comm.group import NcclOptions, TorchGroup
from expertwire.comm.topology import fabric
from expertwire.comm.topology import probe as topology_probe
from expertwire.comm.topology.backend_choice import Choice, Situation, choose
from expertwire.comm.topology.backend_times import Table
from expertwire.comm.topology.probe import RankReport
from expertwire.kernels.ops import quantize
from expertwire.kernels.ops.quantize import Quantized
from expertwire.kernels.registry import Ops


def build(
    wanted: str,
    spec: AllToAllSpec,
    ops: Ops,
    node: str,
    device: str,
    *,
    fp8: bool = False,
    table: Table | None = None,
) -> tuple[tuple[AllToAll, ...], Choice]:
    """The all-to-all `wanted`: "auto", "reference", "nccl" or "nvlink", one for each part of a step, as what one has to say or
    to store never meets another's; and why. A single rank needs none of them.

    All ranks call it together.

    Args:
        node: this rank's host.
        device: "cpu" or "cuda:N".
        fp8: rows go out quantised (see `comm.all_to_all.fp8`): experts on a GPU get packed rows, which they must be able to read.
        table: measured times to choose by.

    Raises:
        ValueError: these ranks cannot use it, with the reason.
    """
    if spec.group.size == 1:
        choice = Choice(name="reference", why="there is one rank, and nothing travels")
        if ops.on_device:  # experts that read packed rows would quantise these just so
            return tuple(LocalAllToAll(part, ops.permute) for part in _parts(spec)), choice
        return make("reference", spec, device, fp8=fp8), choice
    sent = a2a_fp8.packed(spec) if fp8 else spec
    reports = topology_probe.gather(spec.group, topology_probe.probe(node, device), device)
    here = _situation(sent, reports, device)
    choice = choose(wanted, here, table)
    if (options := NcclOptions(**choice.nccl)) != NcclOptions():
        spec = replace(spec, group=cast(TorchGroup, spec.group).part([0] * spec.group.size, options))
    if choice.name == "nvlink" and device != "cpu" and len({report.node for report in reports}) > 1:
        fabric.check_fabric(reports)
        fabric.check_import(spec.group, fabric.load_driver(device), device)
    if choice.name == "nccl" and (rails := here.topology.rails()):
        return tuple(_over(_hierarchical(part, rails), part, device, fp8) for part in _parts(spec)), choice
    return make(choice.name, spec, device, fp8=fp8), choice


def make(name: str, spec: AllToAllSpec, device: str, *, fp8: bool = False) -> tuple[AllToAll, ...]:
    """The backend, one for each part of a step, without asking whether the ranks can use it. All ranks call it together."""
    if name == "nvlink" and device != "cpu":
        from expertwire.comm.all_to_all import nvlink_gpu

        return nvlink_gpu.build(a2a_fp8.packed(spec) if fp8 else spec)
    backends: dict[str, Callable[[AllToAllSpec], AllToAll]] = {
        "reference": ReferenceAllToAll,
        "nccl": NcclAllToAll,
        "nvlink": nvlink.build,
    }
    return tuple(_over(backends[name], part, device, fp8) for part in _parts(spec))


def _parts(spec: AllToAllSpec) -> list[AllToAllSpec]:
    return [replace(spec, part=part) for part in range(spec.num_parts)]


def _hierarchical(spec: AllToAllSpec, rails: tuple[list[int], list[int]]) -> Callable[[AllToAllSpec], AllToAll]:
    """Across domains, over groups of its own. All ranks call it together."""
    group, (domain_P, place_P) = cast(TorchGroup, spec.group), rails
    return partial(HierarchicalAllToAll, across=group.part(place_P), within=group.part(domain_P), make=NcclAllToAll)


def _over(inner: Callable[[AllToAllSpec], AllToAll], spec: AllToAllSpec, device: str, fp8: bool) -> AllToAll:
    """What `inner` makes; with `fp8`, rows are quantised before it and, for experts on a CPU, numbers again behind it."""
    if not fp8:
        return inner(spec)
    packed = inner(a2a_fp8.packed(spec))
    return Fp8AllToAll(spec, packed, quantize=_quantizer(device), unpacks=device == "cpu")


def _quantizer(device: str) -> Callable[[Tensor], Quantized]:
    if device == "cpu":
        return quantize.reference
    from expertwire.kernels.gpu import quantize as gpu_quantize

    return gpu_quantize.quantize


def _situation(spec: AllToAllSpec, reports: Sequence[RankReport], device: str) -> Situation:
    gpus = [report.gpu for report in reports if report.gpu]
    shared_bytes, layout = min(report.shared_bytes for report in reports), ArenaLayout.of(spec)
    arenas = spec.group.size * spec.num_parts
    return Situation(
        topology=topology_probe.assemble(reports),
        device=device.partition(":")[0],
        step_rows=spec.group.size * spec.max_tokens * spec.top_k,
        row_bytes=layout.rows.shape[-1] + layout.home.shape[-1],
        libraries=libraries(),
        gpus_shared=len(set(gpus)) < len(gpus),
        arena_fits=device != "cpu" or shared_bytes >= arenas * layout.nbytes,
    )


def libraries() -> tuple[str, ...]:
    """Those that this torch sends with."""
    return tuple(
        name for name, there in (("gloo", dist.is_gloo_available()), ("nccl", dist.is_nccl_available())) if there
    )
