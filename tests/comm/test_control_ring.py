"""The ring gives every reader every message, whole and in order, and takes none for which there is no room."""

import errno
import os
from collections import deque

import pytest
from helpers.control_ranks import nothing_left_in_shared_memory
from hypothesis import given, settings
from hypothesis import strategies as st

from expertwire.comm.control.ring import Ring, RingReader, RingWriter

CAPACITY = 512


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 3),
    st.lists(st.tuples(st.sampled_from("wwwr"), st.integers(0, 2), st.integers(0, CAPACITY)), max_size=150),
)
def test_any_interleaving_agrees_with_a_queue_per_reader(num_readers, actions):
    ring = Ring.create(num_readers, CAPACITY)
    writer = RingWriter(ring)
    readers = [RingReader(ring, reader) for reader in range(num_readers)]
    queues = [deque() for _ in readers]
    sequence = 0
    for action, reader, size in actions:
        reader %= num_readers
        if action == "w":
            message = bytes([sequence % 256]) * size
            if writer.try_write(sequence, message):
                for queue in queues:
                    queue.append((sequence, message))
            else:  # refused only for want of room
                used = max(sum(16 + (len(held) + 15) // 16 * 16 for _, held in queue) for queue in queues)
                assert used + 16 + size > CAPACITY - 15
            sequence += 1
        elif queues[reader]:
            expected, message = queues[reader].popleft()
            assert not readers[reader].holds(expected + 1)
            assert readers[reader].holds(expected)
            assert readers[reader].read() == message
        else:
            assert not readers[reader].holds(sequence)
    ring.close()


def test_the_writer_wakes_each_sleeper_once():
    ring = Ring.create(3, CAPACITY)
    writer, readers = RingWriter(ring), [RingReader(ring, reader) for reader in range(3)]
    readers[0].set_asleep(True)
    readers[2].set_asleep(True)
    assert writer.wake() == [0, 2]
    assert writer.wake() == []
    readers[1].set_asleep(True)
    readers[1].set_asleep(False)
    assert writer.wake() == []
    ring.close()


def test_an_attached_ring_is_the_same_memory_and_outlives_its_name():
    ring = Ring.create(1, CAPACITY)
    path = ring.path
    other = Ring.attach(str(path), 1)
    ring.unlink()
    assert not path.exists()
    RingWriter(ring).try_write(5, b"hello")
    reader = RingReader(other, 0)
    assert reader.holds(5)
    assert reader.read() == b"hello"
    ring.close()
    other.close()


def test_too_little_shared_memory_is_an_error_at_creation_and_leaves_nothing(monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with nothing_left_in_shared_memory(), pytest.raises(OSError, match=r"cannot get .* bytes in /dev/shm"):
        Ring.create(1, CAPACITY)
