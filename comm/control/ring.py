"""A ring of messages in shared memory: one writer, some readers, and every reader sees every message.

    | writer: head | reader 0: tail, asleep | reader 1: ... |          data          |
      64 bytes       64 bytes                 64 bytes        capacity, a multiple of 16

`head` and `tail` count bytes since the beginning (u64, they never wrap in practice). A frame is u64 sequence number |
u64 length | message, padded to 16 bytes; it may wrap around the end, its header never does. Nobody ever waits here: a
message for which there is no room is the caller's to send another way (`comm.control.node`), with the sequence number that
keeps the order.

The file lives in /dev/shm from its creation until every reader has mapped it, and has no name from then on.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets
import sys
import tempfile
import threading
from pathlib import Path

_LINE = 64
_WORD = 8
_FRAME_HEAD = 16
_SHARED_FOLDER = Path("/dev/shm")


class Ring:
    """A mapped ring; `RingWriter` and `RingReader` are its two ends. Only the creator knows its `path`."""

    def __init__(self, mapping: mmap.mmap, num_readers: int, path: Path | None) -> None:
        self.num_readers = num_readers
        self.path = path
        data_at = _LINE * (1 + num_readers)
        self.capacity = len(mapping) - data_at
        self._mapping = mapping
        self._all = memoryview(mapping)
        self.words = self._all.cast("Q")
        self.data = self._all[data_at:]
        self._data_word = data_at // _WORD
        self._lock = threading.Lock()

    @classmethod
    def create(cls, num_readers: int, capacity: int) -> Ring:
        """A new ring with room for `capacity` bytes of frames (a multiple of 16).

        Raises:
            OSError: the shared-memory file system is full.
        """
        assert capacity % _FRAME_HEAD == 0, f"capacity {capacity} is not a multiple of {_FRAME_HEAD}"
        folder = _SHARED_FOLDER if _SHARED_FOLDER.is_dir() else Path(tempfile.gettempdir())
        path = folder / f"expertwire-{secrets.token_hex(8)}"
        size = _LINE * (1 + num_readers) + capacity
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            # Allocated now: a full file system is an error here and not a SIGBUS at the first write.
            os.posix_fallocate(file, 0, size) if sys.platform == "linux" else os.ftruncate(file, size)
            return cls(mmap.mmap(file, size), num_readers, path)
        except OSError as error:
            path.unlink()
            raise OSError(error.errno, f"cannot get {size} bytes in {folder}: {error.strerror}") from error
        finally:
            os.close(file)

    @classmethod
    def attach(cls, path: str, num_readers: int) -> Ring:
        """Map a ring that another process on this machine has created."""
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            return cls(mmap.mmap(file, 0), num_readers, None)
        finally:
            os.close(file)

    def unlink(self) -> None:
        """Take away the file's name; the mappings stay."""
        if self.path:
            self.path.unlink(missing_ok=True)
            self.path = None

    def close(self) -> None:
        """Unmap. Idempotent."""
        self.unlink()
        for view in (self.data, self.words, self._all):
            view.release()
        with contextlib.suppress(BufferError):
            self._mapping.close()

    def fence(self) -> None:
        """A full memory barrier, so that the other side sees what was written before ahead of what is written after.

        The standard library has none by name; acquiring and releasing a lock are atomic operations, and two rounds order
        everything before against everything after, also on processors that order less than x86.
        """
        self._lock.acquire()
        self._lock.release()
        self._lock.acquire()
        self._lock.release()

    def frame_word(self, position: int) -> int:
        """Index into `words` of the frame at `position`."""
        return self._data_word + position % self.capacity // _WORD


def _frame_bytes(length: int) -> int:
    return _FRAME_HEAD + (length + _FRAME_HEAD - 1) // _FRAME_HEAD * _FRAME_HEAD


def _tail_word(reader: int) -> int:
    return (1 + reader) * (_LINE // _WORD)


def _asleep_word(reader: int) -> int:
    return _tail_word(reader) + 1


class RingWriter:
    """The one writer of a ring."""

    def __init__(self, ring: Ring) -> None:
        self._ring = ring
        self._head = 0
        self._room_until = ring.capacity  # head may go up to here without looking at the readers again

    def try_write(self, sequence: int, message: bytes | bytearray | memoryview) -> bool:
        """Append a message if every reader has left room for it; whether it was appended."""
        ring, length, head = self._ring, len(message), self._head
        after = head + _frame_bytes(length)
        if after > self._room_until:
            tails = [ring.words[_tail_word(reader)] for reader in range(ring.num_readers)]
            ring.fence()
            self._room_until = min(tails) + ring.capacity
            if after > self._room_until:
                return False
        word = ring.frame_word(head)
        ring.words[word] = sequence
        ring.words[word + 1] = length
        start = (head + _FRAME_HEAD) % ring.capacity
        first = min(length, ring.capacity - start)
        ring.data[start : start + first] = message[:first]
        if first < length:
            ring.data[: length - first] = message[first:]
        ring.fence()
        ring.words[0] = self._head = after
        ring.fence()
        return True

    def wake(self) -> list[int]:
        """The readers that sleep and must be woken by other means; they count as awake from now on."""
        words = self._ring.words
        sleepers = [reader for reader in range(self._ring.num_readers) if words[_asleep_word(reader)]]
        for reader in sleepers:
            words[_asleep_word(reader)] = 0
        return sleepers


class RingReader:
    """One of the readers of a ring."""

    def __init__(self, ring: Ring, reader: int) -> None:
        assert 0 <= reader < ring.num_readers, f"reader {reader} of {ring.num_readers}"
        self._ring = ring
        self._tail_word = _tail_word(reader)
        self._asleep_word = _asleep_word(reader)
        self._tail = 0

    def holds(self, sequence: int) -> bool:
        """Whether the next message is here and has this sequence number."""
        words = self._ring.words
        if words[0] == self._tail:
            return False
        self._ring.fence()
        return words[self._ring.frame_word(self._tail)] == sequence

    def read(self) -> bytearray:
        """Take the next message (which must be there) out of the ring."""
        ring = self._ring
        length = ring.words[ring.frame_word(self._tail) + 1]
        start = (self._tail + _FRAME_HEAD) % ring.capacity
        message = bytearray(ring.data[start : start + length])
        if len(message) < length:
            message += ring.data[: length - len(message)]
        ring.fence()
        self._tail += _frame_bytes(length)
        ring.words[self._tail_word] = self._tail
        return message

    def set_asleep(self, asleep: bool) -> None:
        """Tell the writer whether to wake this reader. After `True`, look once more before sleeping."""
        self._ring.words[self._asleep_word] = asleep
        if asleep:
            self._ring.fence()
