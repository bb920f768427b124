"""Construction of the all-to-all that the ranks use, chosen once at start, without silent fallbacks.

P ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import cast

import torch.distributed as dist
from torch import Tensor

from expertwire.comm.all_to_all import nvlink
from expertwire.comm.all_to_all.base import AllToAll, AllToAllSpec
from expertwire.comm.all_to_all.fp8 import Fp8AllToAll, packed
from expertwire.comm.all_to_all.hierarchical import HierarchicalAllToAll
from expertwire.comm.all_to_all.local import LocalAllToAll
from expertwire.comm.all_to_all.nccl import NcclAllToAll
from expertwire.comm.all_to_all.reference import ReferenceAllToAll
from expertwire.comm.all_to_all.symmetric_buffer import BufferLayout
from expertwire.comm.group import NcclOptions, TorchGroup
from expertwire.comm.topology import fabric
from expertwire.comm.topology import probe as topology_probe
from expertwire.comm.topology.backend_choice import SINGLE_RANK, BackendChoice, BackendConditions, choose
from expertwire.comm.topology.backend_times import BackendTimes
from expertwire.comm.topology.probe import RankReport
from expertwire.kernels.ops import quantize
from expertwire.kernels.ops.quantize import QuantizedRows
from expertwire.kernels.registry import Ops


def build(
    wanted: str,
    spec: AllToAllSpec,
    ops: Ops,
    node: str,
    device: str,
    *,
    fp8: bool = False,
    table: BackendTimes | None = None,
) -> tuple[tuple[AllToAll, ...], BackendChoice]:
    """Return an all-to-all for each micro-batch, none sharing memory or messages with another, and why it was chosen.

    All ranks call it together. A single rank gets one that sends nothing.

    Args:
        wanted: "auto", "reference", "nccl" or "nvlink".
        node: this rank's host.
        device: "cpu" or "cuda:N".
        fp8: dispatch rows in fp8 (see `comm.all_to_all.fp8`). Experts on a GPU get packed rows and must be able to read them.
        table: measured times to choose by.

    Raises:
        ValueError: these ranks cannot use the backend; says why.
    """
    if spec.group.size == 1:
        if ops.on_device:  # experts that read packed rows quantise these themselves, to the same values
            return tuple(LocalAllToAll(each, ops.permute) for each in _micro_batches(spec)), SINGLE_RANK
        return make("reference", spec, device, fp8=fp8), SINGLE_RANK
    dispatched = packed(spec) if fp8 else spec
    reports = topology_probe.gather_reports(spec.group, topology_probe.probe(node, device), device)
    conditions = _conditions(dispatched, reports, device)
    choice = choose(wanted, conditions, table)
    if device != "cpu" and choice.name != "nvlink":
        group = cast(TorchGroup, spec.group)
        spec = replace(spec, group=group.split([0] * group.size, NcclOptions(**choice.nccl)))
    if choice.name == "nvlink" and device != "cpu" and len({report.node for report in reports}) > 1:
        fabric.check_fabric(reports)
        fabric.check_import(spec.group, fabric.load_driver(device), device)
    if choice.name == "nccl" and (rails := conditions.topology.rails()):
        return tuple(_with_fp8(_hierarchical(each, rails), each, device, fp8) for each in _micro_batches(spec)), choice
    return make(choice.name, spec, device, fp8=fp8), choice


def make(name: str, spec: AllToAllSpec, device: str, *, fp8: bool = False) -> tuple[AllToAll, ...]:
    """Return the backend, one for each micro-batch, without checking that the ranks can use it.

    All ranks call it together.
    """
    if name == "nvlink" and device != "cpu":
        from expertwire.comm.all_to_all import nvlink_gpu

        return nvlink_gpu.build(packed(spec) if fp8 else spec)
    if device != "cpu":
        spec.group.connect()
    backends: dict[str, Callable[[AllToAllSpec], AllToAll]] = {
        "reference": ReferenceAllToAll,
        "nccl": NcclAllToAll,
        "nvlink": nvlink.build,
    }
    return tuple(_with_fp8(backends[name], each, device, fp8) for each in _micro_batches(spec))


def _micro_batches(spec: AllToAllSpec) -> list[AllToAllSpec]:
    return [replace(spec, micro_batch=index) for index in range(spec.num_micro_batches)]


def _hierarchical(spec: AllToAllSpec, rails: tuple[list[int], list[int]]) -> Callable[[AllToAllSpec], AllToAll]:
    """Return the constructor of an all-to-all across domains, with groups of its own. All ranks call it together."""
    group, (domain_P, place_P) = cast(TorchGroup, spec.group), rails
    across, within = group.split(place_P), group.split(domain_P)
    for each in (across, within):
        each.connect()
    return partial(HierarchicalAllToAll, across=across, within=within, make=NcclAllToAll)


def _with_fp8(make: Callable[[AllToAllSpec], AllToAll], spec: AllToAllSpec, device: str, fp8: bool) -> AllToAll:
    """Return `make(spec)`; with `fp8` rows are quantised before it and, for experts on a CPU, dequantised behind it."""
    if not fp8:
        return make(spec)
    return Fp8AllToAll(spec, make(packed(spec)), quantize=_quantizer(device), unpacks=device == "cpu")


def _quantizer(device: str) -> Callable[[Tensor], QuantizedRows]:
    if device == "cpu":
        return quantize.reference
    from expertwire.kernels.gpu import quantize as gpu_quantize

    return gpu_quantize.quantize


def _conditions(spec: AllToAllSpec, reports: Sequence[RankReport], device: str) -> BackendConditions:
    gpus = [report.gpu for report in reports if report.gpu]
    shared_bytes, layout = min(report.shared_bytes for report in reports), BufferLayout.of(spec)
    num_buffers = spec.group.size * spec.num_micro_batches
    return BackendConditions(
        topology=topology_probe.assemble(reports),
        device=device.partition(":")[0],
        step_rows=spec.group.size * spec.max_tokens * spec.top_k,
        row_bytes=layout.dispatch_rows.shape[-1] + layout.combine_rows.shape[-1],
        libraries=libraries(),
        gpus_shared=len(set(gpus)) < len(gpus),
        buffer_bytes=num_buffers * layout.nbytes if device == "cpu" else 0,
        shared_bytes=shared_bytes,
    )


def libraries() -> tuple[str, ...]:
    """Return the communication libraries that this torch has."""
    return tuple(
        name for name, there in (("gloo", dist.is_gloo_available()), ("nccl", dist.is_nccl_available())) if there
    )
