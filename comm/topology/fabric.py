"""Checks before memory is allocated across nodes: one NVLink fabric, and memory of a peer can be imported.

torch's symmetric memory exports fabric handles where it can and otherwise file descriptors, which hang between hosts
(https://github.com/pytorch/pytorch/pull/194912). GPUs in one clique may still not be able to import each other's memory:
the IMEX channel may be missing, which no field of NVML shows. So every rank exports a page of its memory, imports that of
the next rank, and reads a word that the next rank has written there.

Never run on a GPU by us; the tests use a driver made of Python functions.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch

from expertwire.comm.group import Group, all_gather_rows, all_gather_text
from expertwire.comm.topology.probe import RankReport

_HANDLE_BYTES = 64  # CUmemFabricHandle
# Values of CUmemAllocationType, CUmemAllocationHandleType, CUmemLocationType and CUmemAccess_flags.
_PINNED, _FABRIC, _DEVICE, _READ_WRITE = 1, 8, 1, 3


class _Location(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _AllocationFlags(ctypes.Structure):
    _fields_ = (
        ("compression", ctypes.c_ubyte),
        ("rdma", ctypes.c_ubyte),
        ("usage", ctypes.c_ushort),
        ("reserved", ctypes.c_ubyte * 4),
    )


class AllocationProp(ctypes.Structure):
    """CUmemAllocationProp."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("handle_types", ctypes.c_int),
        ("location", _Location),
        ("win32", ctypes.c_void_p),
        ("flags", _AllocationFlags),
    )


class AccessDesc(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = (("location", _Location), ("flags", ctypes.c_int))


class DriverError(RuntimeError):
    """A driver call returned an error."""


class Driver:
    """Calls of libcuda.

    Args:
        library: libcuda.
        device: ordinal of this rank's GPU, whose context is current.
    """

    def __init__(self, library: Any, device: int) -> None:
        self._library = library
        self._prop = AllocationProp(type=_PINNED, handle_types=_FABRIC, location=_Location(type=_DEVICE, id=device))
        self._size = 0  # of a page, known once one is exported

    def export_page(self, word: int) -> tuple[bytes, Any]:
        """Return a handle of new memory that begins with the u32 `word`, and the allocation for `release`."""
        granularity, allocation = ctypes.c_size_t(), ctypes.c_ulonglong()
        self._call("cuMemGetAllocationGranularity", ctypes.byref(granularity), ctypes.byref(self._prop), 0)
        self._size = granularity.value
        prop, size = ctypes.byref(self._prop), ctypes.c_size_t(self._size)
        self._call("cuMemCreate", ctypes.byref(allocation), size, prop, ctypes.c_ulonglong(0))
        address = self._map(allocation)
        self._call("cuMemsetD32_v2", address, ctypes.c_uint(word), ctypes.c_size_t(1))
        self._call("cuCtxSynchronize")
        handle = (ctypes.c_ubyte * _HANDLE_BYTES)()
        self._call("cuMemExportToShareableHandle", handle, allocation, ctypes.c_int(_FABRIC), ctypes.c_ulonglong(0))
        return bytes(handle), (allocation, address)

    def import_page(self, handle: bytes) -> int:
        """Return the word that the exporter wrote."""
        allocation, word = ctypes.c_ulonglong(), ctypes.c_uint()
        raw = (ctypes.c_ubyte * _HANDLE_BYTES)(*handle)
        self._call("cuMemImportFromShareableHandle", ctypes.byref(allocation), raw, ctypes.c_int(_FABRIC))
        kept = (allocation, self._map(allocation))
        try:
            self._call("cuMemcpyDtoH_v2", ctypes.byref(word), kept[1], ctypes.c_size_t(4))
        finally:
            self.release(kept)
        return word.value

    def release(self, kept: Any) -> None:
        """Free an allocation of `export_page`."""
        allocation, address = kept
        self._call("cuMemUnmap", address, ctypes.c_size_t(self._size))
        self._call("cuMemAddressFree", address, ctypes.c_size_t(self._size))
        self._call("cuMemRelease", allocation)

    def _map(self, allocation: ctypes.c_ulonglong) -> ctypes.c_ulonglong:
        address, size, zero = ctypes.c_ulonglong(), ctypes.c_size_t(self._size), ctypes.c_ulonglong(0)
        access = AccessDesc(location=self._prop.location, flags=_READ_WRITE)
        self._call("cuMemAddressReserve", ctypes.byref(address), size, ctypes.c_size_t(0), zero, zero)
        self._call("cuMemMap", address, size, ctypes.c_size_t(0), allocation, zero)
        self._call("cuMemSetAccess", address, size, ctypes.byref(access), ctypes.c_size_t(1))
        return address

    def _call(self, name: str, *args: Any) -> None:
        if code := getattr(self._library, name)(*args):
            raise DriverError(f"{name} answered {code}")


def load_driver(device: str) -> Driver:
    """Return this machine's driver; `device` is "cuda:N"."""
    torch.cuda.current_stream(device)  # makes the context current
    return Driver(ctypes.CDLL("libcuda.so.1"), torch.device(device).index)


def check_fabric(reports: Sequence[RankReport]) -> None:
    """Refuse ranks on several nodes without a common fabric.

    Raises:
        ValueError: names the rank and what is wrong with its GPU.
    """
    if len({report.node for report in reports}) == 1:
        return
    for rank, report in enumerate(reports):
        where = f"all2all_backend 'nvlink' across nodes: rank {rank} on {report.node}"
        if report.fabric_state != "completed":
            raise ValueError(f"{where} has its NVLink fabric {report.fabric_state}; {_ELSE}")
        if not report.in_fabric:
            raise ValueError(
                f"{where} is in no fabric (status {report.fabric_error}, cluster {report.cluster}); {_ELSE}"
            )
        if (report.cluster, report.clique) != (reports[0].cluster, reports[0].clique):
            raise ValueError(
                f"{where} is in clique {report.clique} of fabric {report.cluster}, but rank 0 is in clique "
                f"{reports[0].clique} of {reports[0].cluster}; {_ELSE}"
            )


_ELSE = "it must be completed, in one clique of one fabric on all nodes; otherwise use all2all_backend 'nccl' or 'reference'"


def check_import(group: Group, driver: Driver, device: str) -> None:
    """Import a page of the next rank's memory. All ranks call it together, and all raise if one fails.

    Raises:
        ValueError: names the ranks whose import failed, and why.
    """
    problem, handle, kept = "", bytes(_HANDLE_BYTES), None
    try:
        handle, kept = driver.export_page(_word(group.rank))
    except DriverError as error:
        problem = str(error)
    handles = all_gather_rows(group, torch.frombuffer(bytearray(handle), dtype=torch.uint8).to(device))
    peer = (group.rank + 1) % group.size
    try:
        if not problem and (found := driver.import_page(bytes(handles[peer].cpu().numpy()))) != _word(peer):
            problem = f"the memory of rank {peer} holds {found:#x} instead of {_word(peer):#x}"
    except DriverError as error:
        problem = f"{error} for the memory of rank {peer}"
    problems = all_gather_text(group, problem, device)
    if kept is not None:
        driver.release(kept)
    if failed := [f"rank {rank}: {text}" for rank, text in enumerate(problems) if text]:
        raise ValueError(
            f"all2all_backend 'nvlink': a peer's memory cannot be imported ({'; '.join(failed[:4])}); "
            "the nodes need one IMEX domain and channel (nvidia-imex-ctl -N); otherwise use all2all_backend 'nccl' or 'reference'"
        )


def _word(rank: int) -> int:
    return 0x5EED0000 + rank
