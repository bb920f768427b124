"""Copies between host and device, on a GPU through pinned buffers that are allocated once and used in turn.

A step's inputs take one copy and its results another. Pinned memory is not allocated while steps run: it would cost a call of the
driver, and during a capture it is an error. A buffer is reused once an event says that the copy that reads it has been made (a
copy from pinned memory is asynchronous: the driver reads it when the stream gets there).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

_ALIGNMENT = 16  # bytes: kernels are compiled apart for pointers that are not
_BYTES = 1 << 18  # of a buffer at first


class BufferEvent(Protocol):
    """The end of a buffer's use: a CUDA event (`torch.cuda.Event`), or nothing to wait for."""

    def record(self) -> None:
        """Mark the work that the current stream was given so far."""
        ...

    def synchronize(self) -> None:
        """Wait until that work is done; return at once if nothing was recorded."""
        ...


class HostMemory(Protocol):
    """Allocator of the buffers."""

    def allocate(self, num_bytes: int) -> Tensor:
        """Return u8 [num_bytes], from which a device can copy asynchronously."""
        ...

    def event(self) -> BufferEvent: ...


class PinnedMemory:
    """Page-locked host memory, for a CUDA device."""

    def allocate(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def event(self) -> BufferEvent:
        return torch.cuda.Event()


class _Done:
    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass


class PlainMemory:
    """Pageable memory, for tests that run GPU kernels on a CPU, and for the device "meta", where nothing is copied."""

    def allocate(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def event(self) -> BufferEvent:
        return _Done()


def memory_of(device: str) -> HostMemory:
    return PinnedMemory() if device.startswith("cuda") else PlainMemory()


class Upload(Protocol):
    """Brings arrays to the device of a model."""

    def __call__(self, *arrays: np.ndarray) -> list[Tensor]:
        """Return tensors of the arrays' shapes and dtypes."""
        ...


class Download(Protocol):
    """Brings tensors to the host."""

    def __call__(self, tensors: Sequence[Tensor]) -> Callable[[], list[np.ndarray]]:
        """Ask for the tensors; return a function that is called once, when the device has computed them, and returns arrays."""
        ...


def upload_nowhere(*arrays: np.ndarray) -> list[Tensor]:
    """As `Upload`, where the host computes: the tensors share the arrays' memory."""
    return [torch.from_numpy(array) for array in arrays]


def download_nowhere(tensors: Sequence[Tensor]) -> Callable[[], list[np.ndarray]]:
    """As `Download`, where the host computes: the arrays share the tensors' memory."""
    return lambda: [tensor.numpy() for tensor in tensors]


class Uploads:
    """As `Upload`, by one copy for all arrays, each of which begins at a multiple of 16 bytes.

    Args:
        num_buffers: copies that may be in flight; a further one waits for the oldest.
    """

    def __init__(self, device: str, memory: HostMemory, num_buffers: int = 8) -> None:
        self._device, self._memory, self._next = device, memory, 0
        self._buffers = [memory.allocate(_BYTES) for _ in range(num_buffers)]
        self._copied = [memory.event() for _ in range(num_buffers)]

    def __call__(self, *arrays: np.ndarray) -> list[Tensor]:
        starts = np.cumsum([0, *(-(-array.nbytes // _ALIGNMENT) * _ALIGNMENT for array in arrays)]).tolist()
        packed = self._buffer(starts[-1])
        words = packed.numpy()
        for start, array in zip(starts, arrays, strict=False):
            words[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        tensor = packed.to(self._device, non_blocking=True, copy=True)
        self._copied[self._next].record()
        self._next = (self._next + 1) % len(self._buffers)
        return [
            tensor[start : start + array.nbytes].view(torch.from_numpy(array[:0]).dtype).view(array.shape)
            for start, array in zip(starts, arrays, strict=False)
        ]

    def _buffer(self, num_bytes: int) -> Tensor:
        """Return the next buffer, which no copy reads any more; replace it by a larger one if necessary."""
        self._copied[self._next].synchronize()
        if len(self._buffers[self._next]) < num_bytes:
            self._buffers[self._next] = self._memory.allocate(1 << (num_bytes - 1).bit_length())
        return self._buffers[self._next][:num_bytes]


class Downloads:
    """As `Download`, by one copy for all tensors.

    Args:
        num_buffers: the most downloads that are under way or not read.
    """

    def __init__(self, memory: HostMemory, num_buffers: int) -> None:
        self._memory = memory
        self._free = [memory.allocate(_BYTES) for _ in range(num_buffers)]

    def __call__(self, tensors: Sequence[Tensor]) -> Callable[[], list[np.ndarray]]:
        if not tensors:
            return list
        parts = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors]
        packed = parts[0] if len(parts) == 1 else torch.cat(parts)
        assert self._free, "more downloads under way than there are buffers: steps were not finished"
        buffer = self._free.pop()
        if len(buffer) < len(packed):
            buffer = self._memory.allocate(1 << (len(packed) - 1).bit_length())
        buffer[: len(packed)].copy_(packed, non_blocking=True)
        like = [(tensor.shape, torch.empty(0, dtype=tensor.dtype).numpy().dtype, tensor.nbytes) for tensor in tensors]

        def read() -> list[np.ndarray]:
            data, start, found = buffer.numpy(), 0, []
            for shape, dtype, num_bytes in like:
                found.append(data[start : start + num_bytes].copy().view(dtype).reshape(shape))
                start += num_bytes
            self._free.append(buffer)
            return found

        return read
