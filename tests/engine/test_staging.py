"""Copies to and from a device through buffers that are allocated once."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.fake_device import FakePinnedMemory
from helpers.fake_streams import FakeEvent, FakeStreams, StreamOrderError

from expertwire.engine.kv_cache import caches
from expertwire.engine.runner.staging import Downloads, PinnedMemory, PlainMemory, Uploads, upload_nowhere
from expertwire.kernels.ops import copy_blocks
from expertwire.scheduler.config import CacheSpec


def test_arrays_keep_their_shapes_and_dtypes():
    arrays = [np.arange(5, dtype=np.int32), np.zeros(0, np.int64), np.array([[0.5, 1.5]], np.float32), np.arange(3)]
    tensors = Uploads("cpu", PlainMemory())(*arrays)
    for array, tensor in zip(arrays, tensors, strict=True):
        np.testing.assert_array_equal(tensor.numpy(), array)
        assert tensor.numpy().dtype == array.dtype
        assert tensor.data_ptr() % 16 == 0


def test_what_was_uploaded_stays_when_its_buffer_is_used_again():
    upload = Uploads("cpu", PlainMemory(), num_buffers=2)
    found = [upload(np.full(3, i))[0] for i in range(6)]
    assert [tensor.tolist() for tensor in found] == [[i] * 3 for i in range(6)]


def test_nothing_is_allocated_while_steps_run():
    memory = FakePinnedMemory()
    upload, download = Uploads("cpu", memory, num_buffers=3), Downloads(memory, 2)
    memory.frozen = True
    for i in range(20):
        upload(np.arange(1000), np.zeros(i, np.float32))
        download([torch.arange(i), torch.rand(4)])()
    with pytest.raises(AssertionError, match="while steps run"):
        upload(np.zeros(1 << 20))


def test_a_buffer_waits_for_its_copy():
    """And for no other: the host runs ahead of the device by as many copies as there are buffers."""
    memory = FakePinnedMemory()
    upload = Uploads("cpu", memory, num_buffers=3)
    for i in range(1, 10):
        memory.asked = i  # the copy of this upload
        upload(np.arange(4))
        assert memory.made == max(0, i - 3)


def test_results_come_home_together():
    download = Downloads(PlainMemory(), 2)
    tensors = [
        torch.arange(3),
        torch.tensor([[0.5], [2.0]]),
        torch.zeros(0, 4),
        torch.arange(5, dtype=torch.int32)[::2],
    ]
    read = download(tensors)
    download(tensors)()
    download([torch.full((9,), 7)])()
    for array, tensor in zip(read(), tensors, strict=True):
        np.testing.assert_array_equal(array, tensor.numpy())
        assert array.dtype == tensor.numpy().dtype


def test_results_that_nobody_reads_are_an_error():
    download = Downloads(PlainMemory(), 1)
    download([torch.arange(3)])
    with pytest.raises(AssertionError, match="not finished"):
        download([torch.arange(3)])


@pytest.fixture
def streams(monkeypatch):
    with FakeStreams().install(monkeypatch) as streams:
        yield streams


def test_a_buffer_is_filled_again_when_its_copy_has_been_made(streams, monkeypatch):
    """On the device's clock; without the wait it would be filled too early."""
    upload = Uploads("cpu", PinnedMemory(), num_buffers=2)
    for i in range(5):
        upload(np.full(3, i))
    monkeypatch.setattr(FakeEvent, "synchronize", lambda event: None)
    with pytest.raises(StreamOrderError, match="the host reads or writes pinned memory that main may still use"):
        upload(np.arange(3))


def test_an_upload_waits_for_the_copies_of_other_streams(streams):
    upload = Uploads("cpu", PinnedMemory(), num_buffers=1)
    with torch.cuda.stream(torch.cuda.Stream()):
        upload(np.arange(3))
    upload(np.arange(3))


def test_results_are_read_when_they_are_home(streams):
    """The caller has waited for all that it asked for before, not for what it asked for since."""
    download = Downloads(PinnedMemory(), 2)
    first = download([torch.ones(3)])
    ended = torch.cuda.Event()
    ended.record()
    second = download([torch.ones(3)])
    with pytest.raises(StreamOrderError, match="the host reads or writes pinned memory"):
        first()
    ended.synchronize()
    first()
    with pytest.raises(StreamOrderError, match="the host reads or writes pinned memory"):
        second()


def test_the_copies_of_all_caches_go_up_together():
    """A step has as many uploads under way as there are buffers: one more would wait for the step before."""
    specs = [CacheSpec(name=name, kind="full", bytes_per_token=4, writers=(0,), readers=(0,)) for name in "abc"]
    found = [caches.make(spec, 6, 1, {0: [((1,), torch.float32)]}, "cpu") for spec in specs]
    for cache in found:
        cache.layers[0][0].copy_(torch.arange(6.0)[:, None, None])
    copies = {"copy_cache_M": [2, 0, 2], "copy_from_M": [1, 2, 3], "copy_to_M": [4, 5, 0]}
    plan = SimpleNamespace(**{name: np.array(value, np.int32) for name, value in copies.items()})
    uploaded = []

    def upload(*arrays):
        uploaded.append(arrays)
        return upload_nowhere(*arrays)

    copies = [copy_blocks.prepare(cache.tensors()) for cache in found]
    caches.copy_blocks(copies, plan, upload)
    assert len(uploaded) == 1
    assert [cache.layers[0][0].flatten().tolist() for cache in found] == [
        [0, 1, 2, 3, 4, 2],
        [0, 1, 2, 3, 4, 5],
        [3, 1, 2, 3, 1, 5],
    ]
    caches.copy_blocks(copies, SimpleNamespace(copy_cache_M=np.zeros(0, np.int32)), upload)
    assert len(uploaded) == 1
