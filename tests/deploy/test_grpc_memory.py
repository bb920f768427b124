"""A front's cyclic garbage: none but gRPC's comes of calls, and the oldest is collected where that holds up nobody."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import sys
import weakref

import grpc
import psutil
import pytest
from helpers import tokenizer_files
from helpers.fake_controller import INFO, ThreadController

from expertwire.deploy.grpc import memory
from expertwire.deploy.grpc.calls import SERVICE
from expertwire.deploy.grpc.memory import Memory
from expertwire.deploy.grpc.server import Server
from expertwire.deploy.proto import expertwire_v1_pb2 as pb
from expertwire.engine.frontend.frontend import Frontend
from expertwire.engine.frontend.text_workers import TextWorkers
from expertwire.engine.frontend.tokenizer import Tokenizer

CALLS = 8
# What a call holds, or is held by.
OF_CALLS = {"RPCState", "_ServicerContext", "_MessageReceiver", "AbortError"}


class Cycle:
    """An object that only a collection frees."""

    def __init__(self):
        self.itself = self


@pytest.fixture
def make_memory():
    """`Memory`, whose settings of this process are undone."""
    thresholds = gc.get_threshold()
    yield Memory
    gc.set_threshold(*thresholds)
    gc.unfreeze()


def old_cycle():
    """Something that refers to a cycle that has become old."""
    alive = weakref.ref(Cycle())
    gc.collect(0)
    gc.collect(1)
    assert alive() is None
    cycle = Cycle()
    alive = weakref.ref(cycle)
    gc.collect(0)
    gc.collect(1)
    return alive


def test_the_oldest_is_collected_without_calls_only(make_memory):
    front, alive, held = make_memory(), old_cycle(), [[i] for i in range(memory._FEW)]
    front.tend(1)
    assert alive() is not None
    front.tend(0)
    assert alive() is None
    del held


def test_the_oldest_is_never_collected_by_itself(make_memory):
    make_memory()
    before = [each["collections"] for each in gc.get_stats()]
    held = [[i] for i in range(1_000_000)]
    after = [each["collections"] for each in gc.get_stats()]
    assert after[0] > before[0] and after[1] > before[1] and after[2] == before[2]
    del held


def test_calls_that_hold_little_do_not_keep_garbage(make_memory):
    front, alive = make_memory(), old_cycle()
    front.tend(1)
    assert alive() is None


def test_a_front_that_always_has_calls_grows_within_a_bound(make_memory, monkeypatch):
    monkeypatch.setattr(memory, "_MOST", 4 * memory._FEW)
    front, alive, held = make_memory(), old_cycle(), [[i] for i in range(memory._FEW)]
    front.tend(1)
    assert alive() is not None
    held += [[i] for i in range(2 * memory._FEW)]
    gc.collect(0)
    front.tend(1)
    assert alive() is None


@pytest.mark.skipif(sys.platform != "linux", reason="malloc_trim is glibc's")
def test_free_memory_is_returned_where_calls_hold_little(make_memory):
    front, process = make_memory(), psutil.Process()
    held, free = [[i] for i in range(memory._FEW)], [b"a" * 600 + bytes(1) for _ in range(300_000)]
    kept = b"b" * 601 + bytes(1)  # behind them, so that what is free before it stays
    del free
    front.tend(1)
    before = process.memory_info().rss
    assert before > front._resident + (100 << 20)
    del held
    front.tend(1)
    assert process.memory_info().rss < before - (100 << 20)
    del kept


@pytest.mark.skipif(sys.platform != "linux", reason="malloc_trim is glibc's")
def test_memory_that_is_freed_after_a_return_is_returned_too(make_memory, monkeypatch):
    monkeypatch.setattr(memory, "_TRIM_S", 0.0)
    front, process = make_memory(), psutil.Process()
    held = [b"a" * 600 + bytes(1) for _ in range(300_000)]
    kept = b"b" * 601 + bytes(1)  # behind them, so that what is free before it stays
    front.tend(1)
    del held
    before = process.memory_info().rss
    front.tend(1)
    assert process.memory_info().rss < before - (100 << 20)
    del kept


def generate(**params):
    sampling = pb.SamplingParams(**{"max_tokens": 20, **params})
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5]), sampling_params=sampling)


def vote(**params):
    request = generate(**params)
    request.strategy.majority_vote.MergeFrom(pb.MajorityVote(n=3, answer=pb.Answer(boxed=pb.BoxedAnswer())))
    return request


REQUESTS = {
    "tokens": ("Generate", generate()),
    "outputs with stop strings": ("Generate", generate(n=2, stop=["a", "aa", "the", " "])),
    "a strategy": ("Generate", vote()),
    "one that is invalid": ("GenerateUnary", generate(temperature=-1.0)),
    "bytes of no request": ("Generate", None),
    "one whose client leaves": ("Generate", generate(max_tokens=5000, ignore_eos=True)),
    "a strategy whose client leaves": ("Generate", vote(max_tokens=500, ignore_eos=True)),
}


async def make_call(channel, method, data, leaves):
    call = channel.stream_stream(f"/{SERVICE.full_name}/{method}")()
    await call.write(data)
    await call.done_writing()
    if leaves:
        await asyncio.sleep(0.05)
        call.cancel()
    with contextlib.suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
        while await call.read() is not grpc.aio.EOF:
            pass


@pytest.mark.parametrize("name", REQUESTS)
def test_calls_leave_no_cyclic_garbage_of_ours(tmp_path, name):
    method, message = REQUESTS[name]
    data = b"\xff" if message is None else message.SerializeToString()
    tokenizer_files.write(tmp_path, "byte_level")
    controller = ThreadController(dataclasses.replace(INFO, max_model_len=8192))

    async def run():
        frontend, stop = Frontend(controller.frontend_channel, Tokenizer.open(tmp_path)), asyncio.Event()
        server = Server("127.0.0.1", 0)
        with contextlib.closing(TextWorkers(frontend, None)) as texts:
            task = asyncio.ensure_future(server.serve(frontend, stop=stop, drain_timeout_s=1.0, texts=texts))
            async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
                for number in range(CALLS):
                    await make_call(channel, method, data, "leaves" in name)
                    if number == 0:  # which also warms up
                        await asyncio.sleep(0.2)
                        gc.collect()
                        gc.disable()
                await asyncio.sleep(0.2)
                gc.set_debug(gc.DEBUG_SAVEALL)
                gc.collect()
                gc.set_debug(0)
            stop.set()
            await task

    try:
        asyncio.run(asyncio.wait_for(run(), 60))
        found = [type(each) for each in gc.garbage]
        ours = [kind for kind in found if kind.__module__.startswith("expertwire") or kind.__name__ in OF_CALLS]
        assert ours == []
    finally:
        gc.set_debug(0)
        gc.enable()
        gc.garbage.clear()
        controller.close()
