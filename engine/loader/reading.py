"""Reading the bytes of a checkpoint into a rank's parameters, by several threads: bound by the disk, or by the bus.

A tensor is cut into pieces of consecutive bytes, which threads take in the order of the files. On a CPU a piece is read into the
parameter itself where it lies there as it is stored. To a GPU it travels through two pinned buffers of each thread: one is filled
from the file while the other is copied, on a stream of the thread's own.

Bytes are read with plain reads instead of a mapping of the file: a mapping's pages count as the process's memory, and a file that
shrinks under it kills the process.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from expertwire.engine.loader.checkpoint import StoredTensor
from expertwire.engine.loader.weight_map import Destination

STORED_DTYPES = {
    "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu, "I32": torch.int32, "U8": torch.uint8, "I8": torch.uint8,
}  # fmt: skip
CHUNK_BYTES = 16 << 20  # of a piece at most, and of a pinned buffer
MAX_READERS = 8


@dataclass(frozen=True, kw_only=True)
class _Fill:
    """A region of a parameter, and which part of a piece fills it: all of it if `destination` is None."""

    target: Tensor
    destination: Destination | None = None
    skip: int = 0  # leading indices of the destination's source that the piece is already

    def put(self, source: Tensor) -> None:
        """Convert and copy the part of `source` that goes here."""
        d, target = self.destination, self.target
        if d is not None:
            source = source[d.source[self.skip :]]
            source = source.transpose(-1, -2) if d.transposed else source
        if source.dtype == torch.float8_e8m0fnu and target.dtype == torch.uint8:
            source = source.view(torch.uint8)
        repeated = d is not None and d.repeated
        target.copy_(source.reshape(-1, *[1] * (target.dim() - 1)) if repeated else source.reshape(target.shape))


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Consecutive bytes of a file, and the regions of parameters that they fill. `last`: no other piece of its tensor follows."""

    file: Path
    offset: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    fills: tuple[_Fill, ...]
    last: bool

    @property
    def direct(self) -> Tensor | None:
        """The bytes of the first region, if the piece lies there as it is stored."""
        first = self.fills[0]
        kept = self.dtype == first.target.dtype or (self.dtype, first.target.dtype) == (
            torch.float8_e8m0fnu,
            torch.uint8,
        )
        if first.destination is not None or not kept or not first.target.is_contiguous():
            return None
        return first.target.view(-1).view(torch.uint8)


def pieces(stored: StoredTensor, destinations: Sequence[Destination], params: Mapping[str, Tensor]) -> Iterator[Piece]:
    """Yield what must be read of a tensor, in the order of the file: all of it, or only some indices of its first dimension.

    What goes to parameters as it lies is cut between rows, every `CHUNK_BYTES` if these are shorter; a part of it, or what is
    transposed or repeated, comes in one piece.
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
            fills = [_Fill(target=t, destination=d, skip=skip) for t, d in zip(targets, of_lead, strict=True)]
            yield Piece(
                file=stored.file,
                offset=offset,
                nbytes=nbytes,
                dtype=dtype,
                shape=shape,
                fills=tuple(fills),
                last=True,
            )
            continue
        rows = shape[0] if shape else 1
        row_bytes = nbytes // rows
        step = max(1, CHUNK_BYTES // row_bytes)
        for start in range(0, rows, step):
            count = min(step, rows - start)
            parts = [target.view(rows, -1)[start : start + count] for target in targets]
            yield Piece(
                file=stored.file,
                offset=offset + start * row_bytes,
                nbytes=count * row_bytes,
                dtype=dtype,
                shape=(count, row_bytes // dtype.itemsize),
                fills=tuple(_Fill(target=part) for part in parts),
                last=start + count == rows,
            )


ReadAt = Callable[[memoryview, int], None]  # fill this memory from the piece's byte of this number on


class Transfer(Protocol):
    """One thread's way from files to parameters."""

    def start(self) -> None:
        """Prepare the calling thread, from which all other calls come."""
        ...

    def scratch(self, nbytes: int) -> Tensor:
        """Return uninitialised bytes where the parameters are, to be used by this transfer alone."""
        ...

    def fetch(self, target: Tensor, read_at: ReadAt) -> None:
        """Fill the bytes `target`; what `run` is given afterwards finds them."""
        ...

    def run(self, work: Callable[[], None]) -> None:
        """Do work on the parameters, in the order of the calls."""
        ...

    def finish(self) -> None:
        """Wait until everything is done."""
        ...


class HostTransfer:
    """`Transfer` to parameters in the host's memory: they are read in place."""

    def start(self) -> None:
        pass

    def scratch(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def fetch(self, target: Tensor, read_at: ReadAt) -> None:
        read_at(memoryview(target.numpy()), 0)

    def run(self, work: Callable[[], None]) -> None:
        work()

    def finish(self) -> None:
        pass


class Event(Protocol):
    """A point in a stream's work."""

    def synchronize(self) -> None:
        """Wait until everything before it is done."""
        ...


class Uploads(Protocol):
    """A stream of work on a GPU that the host does not wait for."""

    def start(self) -> None:
        """Prepare the calling thread, from which what follows comes; only `pinned` may be called before."""
        ...

    def pinned(self, nbytes: int) -> Tensor:
        """Return bytes of the host's memory that the GPU reads while the host goes on."""
        ...

    def scratch(self, nbytes: int) -> Tensor:
        """Return bytes of the GPU's memory; they may be dropped when the work that uses them has been enqueued."""
        ...

    def run(self, work: Callable[[], None]) -> None:
        """Enqueue what `work` does on the GPU, behind what was enqueued before."""
        ...

    def mark(self) -> Event:
        """Return the point behind what has been enqueued so far."""
        ...


class CudaUploads:
    """`Uploads` on a CUDA stream of its own.

    Made by the thread that made the parameters: the stream's work begins behind what that thread's stream has been given. Scratch
    memory belongs to this stream in the caching allocator, which gives it out again only to work behind its last use.

    A thread begins with GPU 0 as its current device, and leaving `torch.cuda.stream` sets that again: `set_stream` of the stream
    before calls `c10::cuda::set_device` (torch 2.11 to 2.13), which opens a context there (`cudaSetDevice`, from CUDA 12 on). So
    without `start` every rank of a node would take some hundred MB of GPU 0.
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

    def run(self, work: Callable[[], None]) -> None:
        with torch.cuda.stream(self._stream):
            work()

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(blocking=True)  # waiting threads sleep
        event.record(self._stream)
        return event


class PinnedTransfer:
    """`Transfer` to parameters on a GPU, through two pinned buffers that are allocated once.

    A copy from pinned memory with `non_blocking` returns before the GPU has read it (`cudaMemcpyAsync`): a buffer is filled again
    only when the event behind its last copy is done.
    """

    def __init__(self, uploads: Uploads, chunk_bytes: int) -> None:
        self._uploads = uploads
        self._buffers = [uploads.pinned(chunk_bytes) for _ in range(2)]
        self._copied: list[Event | None] = [None, None]
        self._turn = 0

    def start(self) -> None:
        self._uploads.start()

    def scratch(self, nbytes: int) -> Tensor:
        return self._uploads.scratch(nbytes)

    def fetch(self, target: Tensor, read_at: ReadAt) -> None:
        chunk = len(self._buffers[0])
        for start in range(0, len(target), chunk):
            turn, self._turn = self._turn, 1 - self._turn
            copied = self._copied[turn]
            if copied is not None:
                copied.synchronize()
            part = target[start : start + chunk]
            filled = self._buffers[turn][: len(part)]
            read_at(memoryview(filled.numpy()), start)
            self._upload(part, filled)
            self._copied[turn] = self._uploads.mark()

    def _upload(self, part: Tensor, filled: Tensor) -> None:
        self._uploads.run(lambda: part.copy_(filled, non_blocking=True))

    def run(self, work: Callable[[], None]) -> None:
        self._uploads.run(work)

    def finish(self) -> None:
        self._uploads.mark().synchronize()


def transfers(device: torch.device, number: int) -> list[Transfer]:
    """Return so many ways to parameters on a device."""
    if device.type == "cuda":
        return [PinnedTransfer(CudaUploads(device), CHUNK_BYTES) for _ in range(number)]
    return [HostTransfer() for _ in range(number)]


def read(every: Sequence[Piece], ways: Sequence[Transfer], done: Callable[[Piece], None]) -> None:
    """Read all pieces, a thread for each way; `done` is called with each piece, by one thread at a time.

    Raises:
        ValueError: a file is shorter than it was. The other threads stop after their pieces.
    """
    source = _Source(every)
    with ExitStack() as stack:
        stack.callback(source.close)
        pool = stack.enter_context(ThreadPoolExecutor(len(ways), thread_name_prefix="read-weights"))
        stack.callback(source.stop)  # before the pool waits for its threads, whatever has happened here
        for finished in as_completed([pool.submit(_read_pieces, way, source, done) for way in ways]):
            finished.result()


def _read_pieces(way: Transfer, source: _Source, done: Callable[[Piece], None]) -> None:
    way.start()
    try:
        while (piece := source.take()) is not None:
            _read_piece(way, piece, source)
            with source.lock:
                done(piece)
    except BaseException:
        source.stop()
        raise
    finally:
        way.finish()  # the buffers must outlive their copies


def _read_piece(way: Transfer, piece: Piece, source: _Source) -> None:
    direct = piece.direct
    raw = way.scratch(piece.nbytes) if direct is None else direct
    way.fetch(raw, lambda memory, start: source.read(piece, start, memory))
    rest = piece.fills if direct is None else piece.fills[1:]
    if rest:
        way.run(lambda: _put_all(raw, piece, rest))


def _put_all(raw: Tensor, piece: Piece, fills: Sequence[_Fill]) -> None:
    values = raw.view(piece.dtype).view(piece.shape)
    for fill in fills:
        fill.put(values)


class _Source:
    """The pieces that are left, and the files, which are opened when one of their pieces is read."""

    def __init__(self, every: Sequence[Piece]) -> None:
        self.lock = threading.Lock()
        self._left = iter(every)
        self._stopped = False
        self._files: dict[Path, int] = {}

    def take(self) -> Piece | None:
        with self.lock:
            return None if self._stopped else next(self._left, None)

    def stop(self) -> None:
        self._stopped = True

    def read(self, piece: Piece, start: int, memory: memoryview) -> None:
        with self.lock:
            if piece.file not in self._files:
                self._files[piece.file] = os.open(piece.file, os.O_RDONLY | os.O_CLOEXEC)
            file = self._files[piece.file]
        offset = piece.offset + start
        while memory:
            count = os.preadv(file, [memory], offset)
            if not count:
                raise ValueError(f"{piece.file} became shorter while it was read")
            memory, offset = memory[count:], offset + count

    def close(self) -> None:
        for file in self._files.values():
            os.close(file)
