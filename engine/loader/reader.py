"""The reader of checkpoint files: several threads copy tensors to a rank's parameters at the speed of the disk or the bus.

A tensor is cut into pieces of consecutive bytes, which the threads take in the order of the files. On a CPU a piece is read
straight into its parameter if it is stored there with the same type and layout. To a GPU it is copied through two pinned buffers
per thread: one is filled from the file while the other is being copied, on a stream of the thread's own.

safetensors' own reader is not used: it has one thread (1.8 GB/s instead of 5 GB/s, `python -m expertwire.bench.serving.loading`)
and maps the file, so that the pages count as this process's memory and a file that shrinks meanwhile kills it. It does not tell
either where a tensor's bytes are, so `checkpoint` parses the headers.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from expertwire.engine.loader.checkpoint import StoredTensor
from expertwire.engine.loader.parameters import Destination

STORED_DTYPES = {
    "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu, "I32": torch.int32, "U8": torch.uint8, "I8": torch.uint8,
}  # fmt: skip
CHUNK_BYTES = 16 << 20  # the most bytes of a piece that is cut, and the size of a pinned buffer
MAX_READERS = 8


@dataclass(frozen=True, kw_only=True)
class _Fill:
    """A region of a parameter and the part of a piece that fills it.

    Attributes:
        target: the region.
        destination: which part of the piece; None: all of it.
        skip: number of leading indices of `destination.source` that the piece has been reduced to already.
    """

    target: Tensor
    destination: Destination | None = None
    skip: int = 0

    def copy_from(self, source: Tensor) -> None:
        """Convert and copy the part of `source` that belongs here."""
        d, target = self.destination, self.target
        if d is not None:
            source = source[d.source[self.skip :]]
            source = source.transpose(-1, -2) if d.transposed else source
        if source.dtype == torch.float8_e8m0fnu and target.dtype == torch.uint8:
            source = source.view(torch.uint8)
        repeated = d is not None and d.repeated
        target.copy_(source.reshape(-1, *[1] * (target.dim() - 1)) if repeated else source.reshape(target.shape))


@dataclass(frozen=True, kw_only=True)
class FilePiece:
    """Consecutive bytes of a file and the regions that they fill; `last`: whether it is the last piece of its tensor."""

    file: Path
    offset: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    fills: tuple[_Fill, ...]
    last: bool

    @property
    def direct(self) -> Tensor | None:
        """The bytes of the first region, if the piece can be read straight into it."""
        fill = self.fills[0]
        types = self.dtype, fill.target.dtype
        same = types[0] == types[1] or types == (torch.float8_e8m0fnu, torch.uint8)
        if fill.destination is not None or not same or not fill.target.is_contiguous():
            return None
        return fill.target.view(-1).view(torch.uint8)


def pieces(
    stored: StoredTensor, destinations: Sequence[Destination], params: Mapping[str, Tensor]
) -> Iterator[FilePiece]:
    """Yield what must be read of a tensor, in the order of the file: all of it, or some indices of its first dimension.

    Pieces are cut between rows, every `CHUNK_BYTES` or after each row if rows are longer. A tensor of which only a part is
    needed, or that is transposed or repeated, is one piece.
    """
    dtype = STORED_DTYPES[stored.dtype]
    for lead in sorted({d.lead for d in destinations}, key=lambda lead: -1 if lead is None else lead):
        of_lead = [d for d in destinations if d.lead == lead]
        skip, shape, nbytes, offset = 0, stored.shape, stored.nbytes, stored.offset
        if lead is not None:
            skip, shape, nbytes = 1, shape[1:], nbytes // shape[0]
            offset += lead * nbytes
        if nbytes == 0:
            continue
        targets = [params[d.param][d.region] for d in of_lead]
        if any(len(d.source) > skip or d.transposed or d.repeated for d in of_lead):
            fills = tuple(_Fill(target=t, destination=d, skip=skip) for t, d in zip(targets, of_lead, strict=True))
            yield FilePiece(
                file=stored.file, offset=offset, nbytes=nbytes, dtype=dtype, shape=shape, fills=fills, last=True
            )
            continue
        rows = shape[0] if shape else 1
        row_bytes = nbytes // rows
        step = max(1, CHUNK_BYTES // row_bytes)
        for start in range(0, rows, step):
            end = min(rows, start + step)
            yield FilePiece(
                file=stored.file,
                offset=offset + start * row_bytes,
                nbytes=(end - start) * row_bytes,
                dtype=dtype,
                shape=(end - start, row_bytes // dtype.itemsize),
                fills=tuple(_Fill(target=target.view(rows, -1)[start:end]) for target in targets),
                last=end == rows,
            )


ReadInto = Callable[[memoryview, int], None]  # fills this memory with the piece's bytes from this one on


class Transfer(Protocol):
    """The way of one thread's pieces from files to parameters."""

    def start(self) -> None:
        """Prepare the calling thread, from which all other calls come."""
        ...

    def scratch(self, nbytes: int) -> Tensor:
        """Return uninitialized bytes on the parameters' device, for this transfer alone."""
        ...

    def fetch(self, target: Tensor, read_into: ReadInto) -> None:
        """Fill the bytes `target`, before the work of later calls of `run`."""
        ...

    def run(self, work: Callable[[], object]) -> None:
        """Do work on the parameters, in the order of the calls."""
        ...

    def finish(self) -> None:
        """Wait until all work is done."""
        ...


class HostTransfer:
    """`Transfer` to parameters in host memory, which are read in place."""

    def start(self) -> None:
        pass

    def scratch(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def fetch(self, target: Tensor, read_into: ReadInto) -> None:
        read_into(target.numpy().data, 0)

    def run(self, work: Callable[[], object]) -> None:
        work()

    def finish(self) -> None:
        pass


class UploadEvent(Protocol):
    """A point in the work of an `UploadStream`."""

    def synchronize(self) -> None:
        """Wait until all work before it is done."""
        ...


class UploadStream(Protocol):
    """A stream of work on a GPU, for which the host does not wait."""

    def start(self) -> None:
        """Prepare the calling thread, from which all other calls come; only `pinned` may be called before."""
        ...

    def pinned(self, nbytes: int) -> Tensor:
        """Return page-locked bytes of host memory."""
        ...

    def scratch(self, nbytes: int) -> Tensor:
        """Return bytes of GPU memory, which may be dropped as soon as the work that uses them is enqueued."""
        ...

    def run(self, work: Callable[[], object]) -> None:
        """Enqueue the GPU work of `work`."""
        ...

    def record(self) -> UploadEvent:
        """Return the point behind the work enqueued so far."""
        ...


class CudaUploadStream:
    """`UploadStream` on a CUDA stream of its own, created by the thread that created the parameters.

    Its work begins after the current work of that thread's stream. The caching allocator gives scratch memory out again only to
    work after its last use, as it belongs to this stream.

    A thread's current device is GPU 0 at first, and leaving `torch.cuda.stream` restores it: `set_stream` of the previous stream
    calls `c10::cuda::set_device` (torch 2.11 to 2.13), which creates a context there (`cudaSetDevice`, from CUDA 12 on). Without
    `start` every rank of a node would therefore take some hundred MB of GPU 0.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))

    def start(self) -> None:
        torch.cuda.set_device(self._stream.device)

    def pinned(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def scratch(self, nbytes: int) -> Tensor:
        with torch.cuda.stream(self._stream):
            return torch.empty(nbytes, dtype=torch.uint8, device=self._stream.device)

    def run(self, work: Callable[[], object]) -> None:
        with torch.cuda.stream(self._stream):
            work()

    def record(self) -> torch.cuda.Event:
        event = torch.cuda.Event(blocking=True)  # waiting threads sleep
        event.record(self._stream)
        return event


class PinnedTransfer:
    """`Transfer` to parameters on a GPU through two pinned buffers, which are allocated once.

    A `non_blocking` copy from pinned memory returns before the GPU has read it (`cudaMemcpyAsync`): a buffer is filled again only
    after the event of its last copy.
    """

    def __init__(self, stream: UploadStream, chunk_bytes: int) -> None:
        self._stream = stream
        self._buffers = [stream.pinned(chunk_bytes) for _ in range(2)]
        self._copied: list[UploadEvent | None] = [None, None]
        self._next = 0

    def start(self) -> None:
        self._stream.start()

    def scratch(self, nbytes: int) -> Tensor:
        return self._stream.scratch(nbytes)

    def fetch(self, target: Tensor, read_into: ReadInto) -> None:
        chunk = len(self._buffers[0])
        for start in range(0, len(target), chunk):
            i, self._next = self._next, 1 - self._next
            copied = self._copied[i]
            if copied is not None:
                copied.synchronize()
            part = target[start : start + chunk]
            filled = self._buffers[i][: len(part)]
            read_into(filled.numpy().data, start)
            self._stream.run(partial(part.copy_, filled, non_blocking=True))
            self._copied[i] = self._stream.record()

    def run(self, work: Callable[[], object]) -> None:
        self._stream.run(work)

    def finish(self) -> None:
        self._stream.record().synchronize()


def transfers(device: torch.device, number: int) -> list[Transfer]:
    """Return `number` transfers to parameters on a device."""
    if device.type == "cuda":
        return [PinnedTransfer(CudaUploadStream(device), CHUNK_BYTES) for _ in range(number)]
    return [HostTransfer() for _ in range(number)]


def read(pieces: Sequence[FilePiece], transfers: Sequence[Transfer], done: Callable[[FilePiece], None]) -> None:
    """Read all pieces, with a thread per transfer; `done` is called with each piece, by one thread at a time.

    Raises:
        ValueError: a file became shorter. The other threads stop after their current pieces.
    """
    remaining, lock, files = deque(pieces), threading.Lock(), _Files()

    def take() -> FilePiece | None:
        with lock:
            return remaining.popleft() if remaining else None

    def stop() -> None:
        with lock:
            remaining.clear()

    def work(transfer: Transfer) -> None:
        transfer.start()
        try:
            while (piece := take()) is not None:
                _read_piece(piece, transfer, files)
                with lock:
                    done(piece)
        finally:
            stop()  # the other threads, if this one has failed
            transfer.finish()  # the buffers must outlive their copies

    try:
        with ThreadPoolExecutor(len(transfers), thread_name_prefix="read-weights") as pool:
            try:
                for finished in as_completed([pool.submit(work, transfer) for transfer in transfers]):
                    finished.result()
            finally:
                stop()  # on KeyboardInterrupt too, before the pool waits for its threads
    finally:
        files.close()


def _read_piece(piece: FilePiece, transfer: Transfer, files: _Files) -> None:
    direct = piece.direct
    raw = transfer.scratch(piece.nbytes) if direct is None else direct
    transfer.fetch(raw, lambda memory, start: files.read_into(memory, piece.file, piece.offset + start))
    fills = piece.fills if direct is None else piece.fills[1:]

    def copy() -> None:
        values = raw.view(piece.dtype).view(piece.shape)
        for fill in fills:
            fill.copy_from(values)

    if fills:
        transfer.run(copy)


class _Files:
    """Files, which are opened when they are first read."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._descriptors: dict[Path, int] = {}

    def read_into(self, memory: memoryview, path: Path, offset: int) -> None:
        with self._lock:
            if path not in self._descriptors:
                self._descriptors[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            file = self._descriptors[path]
        while memory:
            count = os.preadv(file, [memory], offset)
            if not count:
                raise ValueError(f"{path} became shorter while it was read")
            memory, offset = memory[count:], offset + count

    def close(self) -> None:
        for file in self._descriptors.values():
            os.close(file)
