"""A fake of torch's symmetric memory, as strict as c10d/symm_mem/CUDASymmetricMemory.cu.

- The group is resolved in torch's real registry (`GroupRegistry.cpp`): a name that is not registered, or whose process group
  has been destroyed, is torch's own error. The rendezvous uses that group's store.
- Rendezvous are counted by process, here by thread, for all groups together: ranks with different counts hang, here for a
  second.
- Two ranks on one (host, device) are refused.
- The mappings of the ranks' memory belong to the handle and to the local allocation; the tensors of `get_buffer` own nothing.
  Use of one when both are gone raises `IllegalAddress`.

Memory is a file that all ranks map, so that ranks may be threads or processes. It is filled with garbage at first.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import threading
import weakref
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch._C._distributed_c10d import _resolve_process_group

_GARBAGE = 0xA5


class IllegalAddress(RuntimeError):
    """The error of a GPU for memory that is no longer mapped."""


class _Mapping:
    """A rank's memory as mapped by one process; unmapped with its last reference."""

    def __init__(self, path: str, nbytes: int) -> None:
        file = os.open(path, os.O_RDWR)
        self.tensor = torch.frombuffer(mmap.mmap(file, nbytes), dtype=torch.uint8)
        os.close(file)


class _Block:
    """A local allocation. `mappings_of`: all ranks' mappings, by group name."""

    def __init__(self, nbytes: int, device: int) -> None:
        file, self.path = tempfile.mkstemp(prefix="symmetric-")
        os.truncate(file, nbytes)
        os.close(file)
        weakref.finalize(self, Path(self.path).unlink, missing_ok=True)
        self.nbytes, self.device = nbytes, device
        self.mapping = _Mapping(self.path, nbytes)
        self.mapping.tensor.fill_(_GARBAGE)
        self.mappings_of: dict[str, list[_Mapping]] = {}


class _Guarded(torch.Tensor):
    """A tensor that raises when its memory is unmapped, as do its views."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        guards = [arg.__dict__.get("mapping") for arg in (*args, *kwargs.values()) if isinstance(arg, _Guarded)]
        if any(guard is not None and guard() is None for guard in guards):
            raise IllegalAddress("an illegal memory access was encountered")
        out = super().__torch_function__(function, types, args, kwargs)
        if isinstance(out, _Guarded) and "mapping" not in out.__dict__ and guards:
            out.mapping = guards[0]
        return out


class _Owning(torch.Tensor):
    """The local tensor, which owns its block."""


class FakeSymmetricMemory:
    """A fake of `torch._C._distributed_c10d._SymmetricMemory`.

    Args:
        shared_devices: several ranks may share a device (TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES).
        backend: the kind of memory (TORCH_SYMMMEM).
    """

    def __init__(self, *, shared_devices: bool = False, timeout_s: float = 1.0, backend: str = "CUDA") -> None:
        self._shared_devices, self._timeout_s, self._backend = shared_devices, timeout_s, backend
        self._of_thread = threading.local()

    def enter(self, host: str) -> None:
        """Set the host of this thread's process."""
        self._of_thread.host = host

    def get_backend(self, device: torch.device) -> str:
        return self._backend

    def empty_strided_p2p(self, size, stride, dtype, device, group_name=None, alloc_id=None) -> torch.Tensor:
        assert torch.device(device).type == "cuda", f"symmetric memory on {device}"
        assert tuple(stride) == (1,), stride
        block = _Block(size[0] * dtype.itemsize, torch.device(device).index)
        local = block.mapping.tensor.view(dtype).as_subclass(_Owning)
        local.block = block
        return local

    def rendezvous(self, tensor: torch.Tensor, group_name: str) -> _Handle:
        block = tensor.block
        if group_name not in block.mappings_of:
            block.mappings_of[group_name] = self._rendezvous(block, group_name)
        return _Handle(block.mappings_of[group_name], block.nbytes)

    def _rendezvous(self, block: _Block, name: str) -> list[_Mapping]:
        group = _resolve_process_group(name)
        store, rank, size = group.get_group_store(), group.rank(), group.size()
        number = self._of_thread.rendezvous_count = getattr(self._of_thread, "rendezvous_count", -1) + 1
        keys = [f"CUDASymmetricMemory/{number}/{peer}" for peer in range(size)]
        store.set(
            keys[rank], f"{getattr(self._of_thread, 'host', 'host')}\n{block.device}\n{block.nbytes}\n{block.path}"
        )
        store.wait(keys, timedelta(seconds=self._timeout_s))
        texts = [store.get(key).decode().split("\n") for key in keys]
        if len({(host, device) for host, device, *_ in texts}) < size and not self._shared_devices:
            raise RuntimeError("rendezvous: detected allocations from overlapping devices from different ranks.")
        assert len({nbytes for _, _, nbytes, _ in texts}) == 1, f"ranks have allocated differently: {texts}"
        return [
            block.mapping if peer == rank else _Mapping(path, int(nbytes))
            for peer, (_, _, nbytes, path) in enumerate(texts)
        ]


class _Handle:
    def __init__(self, mappings: list[_Mapping], nbytes: int) -> None:
        self._mappings, self._nbytes = mappings, nbytes

    def get_buffer(self, rank: int, sizes: Any, dtype: torch.dtype, storage_offset: int = 0) -> torch.Tensor:
        mapping = self._mappings[rank]
        assert sizes[0] * dtype.itemsize <= self._nbytes, f"{sizes} of {self._nbytes} bytes"
        buffer = mapping.tensor[: sizes[0] * dtype.itemsize].view(dtype).as_subclass(_Guarded)
        buffer.mapping = weakref.ref(mapping)
        return buffer
