"""A fake `ProcessGroupNCCL` over gloo, as strict as ProcessGroupNCCL.cpp.

- `_end_coalescing` is None where nothing was sent or received since `_start_coalescing`.
- A call of all ranks makes the communicator; to send, receive or enter a barrier without one, and without `device_ids`, is an
  error (NCCL would make one for each pair, or guess a device).
- The first exchange with a rank connects it, which takes memory (`p2pTaskAppend` in NCCL's enqueue.cc): rows for a rank that
  no exchange of all ranks has connected would take it while serving, and are an error.
- Outside of coalescing, sending and receiving between two ranks in different orders would hang: it is an error.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist


class _Work:
    def __init__(self, works: list[Any]) -> None:
        self._works = works

    def wait(self) -> None:
        for work in self._works:
            work.wait()


class FakeProcessGroupNCCL:
    """The fake; see the module."""

    class Options:
        def __init__(self) -> None:
            self.config, self._timeout = SimpleNamespace(), None

    def __init__(self, store: dist.Store, rank: int, size: int, options: Options) -> None:
        gloo = dist.ProcessGroupGloo._Options()
        gloo._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        gloo._timeout = options._timeout
        self._gloo = dist.ProcessGroupGloo(store, rank, size, gloo)
        self._connected: torch.device | None = None
        self._coalesced: list[Any] | None = None
        self._paired: set[int] = set()
        self.aborted = False

    def eager_connect_single_device(self, device: torch.device) -> None:
        assert device.type == "cuda", device
        assert device.index is not None, device
        self._gloo.barrier(dist.BarrierOptions()).wait()
        self._connected = device

    def alltoall_base(self, out, rows, out_counts, counts, options):
        assert self._connected, "no communicator"
        self._paired |= {peer for peer, pair in enumerate(zip(out_counts, counts, strict=True)) if all(pair)}
        return self._gloo.alltoall_base(out, rows, out_counts, counts, options)

    def _allgather_base(self, out, rows):
        assert self._connected, "no communicator"
        return self._gloo._allgather_base(out, rows)

    def send(self, tensors, peer, tag):
        return self._point_to_point(self._gloo.send, tensors, peer, tag)

    def recv(self, tensors, peer, tag):
        return self._point_to_point(self._gloo.recv, tensors, peer, tag)

    def _point_to_point(self, call, tensors, peer, tag):
        assert self._connected, "a communicator would be made by the ranks that send, and only by them"
        assert peer in self._paired, f"rank {peer} is connected while serving, by memory that nobody has measured"
        assert self._coalesced is not None, "sends and receives that are not coalesced wait for each other"
        assert all(tensor.is_contiguous() for tensor in tensors), "NCCL takes dense tensors only"
        self._coalesced.append(call(tensors, peer, tag))
        return _Work([])  # as in NCCL, only the whole group of calls can be waited for

    def _start_coalescing(self):
        assert self._coalesced is None, "coalescing twice"
        self._coalesced = []

    def _end_coalescing(self):
        works, self._coalesced = self._coalesced, None
        return _Work(works) if works else None

    def barrier(self, options: dist.BarrierOptions):
        assert list(options.device_ids) == [self._connected.index], (
            f"device {options.device_ids}, has {self._connected}"
        )
        return self._gloo.barrier(dist.BarrierOptions())

    def abort(self):
        self.aborted = True
