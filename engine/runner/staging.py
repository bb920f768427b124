"""Host memory for copies to and from a GPU, allocated once and used in turn.

A step's numbers go up in one copy and its results come home in one. Pinned memory is not allocated while steps run: it would cost
a call of the driver, and under stream capture it is an error. A buffer is written anew when the copy that reads it has been made,
which an event says (a copy from pinned memory is asynchronous: the driver reads it when the stream gets there).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

_ALIGNMENT = 16  # bytes: kernels are compiled apart for pointers that are not
_BYTES = 1 << 18  # of a buffer at first


class Event(Protocol):
    """Of a stream; `torch.cuda.Event`."""

    def record(self) -> None:
        """Mark what the current stream has been given so far."""
        ...

    def synchronize(self) -> None:
        """Wait until that is done; at once if nothing was recorded."""
        ...


class HostMemory(Protocol):
    """Where buffers come from."""

    def allocate(self, num_bytes: int) -> Tensor:
        """u8 [num_bytes], from which a device copies asynchronously."""
        ...

    def event(self) -> Event: ...


class PinnedMemory:
    """For a CUDA device."""

    def allocate(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def event(self) -> Event:
        return torch.cuda.Event()


class _Done:
    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass


class PlainMemory:
    """For a CPU in a GPU's place, whose copies are made at once, and for "meta", where there is nothing to copy."""

    def allocate(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def event(self) -> Event:
        return _Done()


def memory_of(device: str) -> HostMemory:
    return PinnedMemory() if device.startswith("cuda") else PlainMemory()


class Uploads:
    """Brings arrays to the device.

    Args:
        num_buffers: a copy is waited for when so many others have been asked for since.
    """

    def __init__(self, device: str, memory: HostMemory, num_buffers: int = 8) -> None:
        self._device, self._memory, self._next = device, memory, 0
        self._buffers = [memory.allocate(_BYTES) for _ in range(num_buffers)]
        self._copied = [memory.event() for _ in range(num_buffers)]

    def __call__(self, *arrays: np.ndarray) -> list[Tensor]:
        """Tensors of the arrays' shapes and dtypes, by one copy for all; each begins at a multiple of 16 bytes."""
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
        """The next one, which no copy reads any more; a larger one in its place if that is needed."""
        self._copied[self._next].synchronize()
        if len(self._buffers[self._next]) < num_bytes:
            self._buffers[self._next] = self._memory.allocate(1 << (num_bytes - 1).bit_length())
        return self._buffers[self._next][:num_bytes]


class Downloads:
    """Brings results home.

    Args:
        num_buffers: as many may be on their way or not read.
    """

    def __init__(self, memory: HostMemory, num_buffers: int) -> None:
        self._memory = memory
        self._free = [memory.allocate(_BYTES) for _ in range(num_buffers)]

    def __call__(self, tensors: Sequence[Tensor]) -> Callable[[], list[np.ndarray]]:
        """Ask for one copy of them all. What is returned is called once, when the device has made it, and gives arrays."""
        if not tensors:
            return list
        parts = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors]
        packed = parts[0] if len(parts) == 1 else torch.cat(parts)
        assert self._free, "more results on their way than there are buffers: steps were not finished"
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
