"""A fake `ProcessGroupNCCL` over gloo, as strict as ProcessGroupNCCL.cpp.

- A call of all ranks makes the communicator; to exchange rows or enter a barrier without one, and without `device_ids`, is an
  error (NCCL would make one then, or guess a device).
- Exchanged and gathered tensors are dense.
- The first exchange with a rank connects it, which takes memory (`p2pTaskAppend` in NCCL's enqueue.cc): `connected` are those.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.distributed as dist


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
        self.options = options
        self._device: torch.device | None = None
        self.connected: set[int] = set()
        self.num_calls = 0
        self.aborted = False

    def eager_connect_single_device(self, device: torch.device) -> None:
        assert device.type == "cuda", device
        assert device.index is not None, device
        self._gloo.barrier(dist.BarrierOptions()).wait()
        self._device = device

    def alltoall_base(self, out, rows, out_counts, counts, options):
        self._check(out, rows)
        self.connected |= set(range(len(counts)))
        return self._gloo.alltoall_base(out, rows, out_counts, counts, options)

    def _allgather_base(self, out, rows):
        self._check(out, rows)
        return self._gloo._allgather_base(out, rows)

    def _check(self, *tensors):
        assert self._device, "no communicator"
        assert all(tensor.is_contiguous() for tensor in tensors), "tensors must be contiguous"
        self.num_calls += 1

    def barrier(self, options: dist.BarrierOptions):
        assert list(options.device_ids) == [self._device.index], f"device {options.device_ids}, has {self._device}"
        return self._gloo.barrier(dist.BarrierOptions())

    def abort(self):
        self.aborted = True
