"""Captures and replays of a rank's steps, and steps launched ahead, over strict fakes of what CUDA allows then. Kernels are
launched and not run."""

import contextlib
import os
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)

import torch
from helpers.fake_cuda import FakeCuda, OnCpu
from helpers.fake_graphs import FakeCapture
from helpers.fake_launches import FakeLaunches
from helpers.fake_streams import FakeEvent, FakeStreams, StreamOrderError
from helpers.launched_runner import NUM_BLOCKS, SIZES, build

from expertwire.engine.models.decoder import Decoder
from expertwire.engine.runner import cuda_graphs
from expertwire.engine.runner.cuda_graphs import Captured
from expertwire.scheduler.config import SchedulerConfig
from expertwire.scheduler.request import Request
from expertwire.scheduler.sampling_params import SamplingParams
from expertwire.scheduler.scheduler import Scheduler

MAX_TOKENS, MAX_RUNNING, DEVICE = 32, 2, "cuda:0"


def schedule(config):
    limits = {
        "max_num_seqs": MAX_RUNNING,
        "max_num_batched_tokens": MAX_TOKENS,
        "num_blocks": NUM_BLOCKS,
        "max_queued_requests": 9,
    }
    scheduler = Scheduler(
        SchedulerConfig(num_ranks=1, eos_token_ids=(), vocab_size=config.vocab_size, **limits, **SIZES),
        config.cache_specs(),
    )
    for key in range(2):
        params = SamplingParams(max_tokens=4, temperature=0.5 * key, logprobs=1)
        request = Request(key=key, prompt=np.arange(40, dtype=np.int32), params=params, seed=0)
        assert scheduler.submit(request, 0.0) is None
    return scheduler


def serve(config, runner, ahead=0):
    """Launch so many steps before the first one is finished."""
    scheduler, under_way = schedule(config), []
    while not scheduler.idle:
        plan = scheduler.plan(0.0)
        if plan is not None:
            under_way.append((plan, runner.launch(plan)))
        if plan is None or len(under_way) > ahead:
            first, launched = under_way.pop(0)
            scheduler.commit(first, [launched.finish()], 0.0)


def in_every_step(monkeypatch, violation):
    """Do it in every forward pass."""
    forward = Decoder.forward

    def with_violation(self, batches, caches):
        violation(batches[0])
        return forward(self, batches, caches)

    monkeypatch.setattr(Decoder, "forward", with_violation)


VIOLATIONS = {
    "pinned memory": (lambda batch: torch.empty(8, pin_memory=True), "empty allocates pinned memory"),
    "a number": (lambda batch: batch.token_ids_T[0].item(), "item waits"),
}


@pytest.mark.parametrize(("violation", "message"), VIOLATIONS.values(), ids=VIOLATIONS)
def test_what_a_capture_refuses_is_named(monkeypatch, violation, message):
    in_every_step(monkeypatch, violation)
    with OnCpu(), FakeLaunches() as gpu:
        _, runner = build(1, MAX_TOKENS, FakeCapture(gpu))
        with pytest.raises(AssertionError, match=message):
            runner.warm_up(max_num_batched_tokens=MAX_TOKENS, max_num_seqs=MAX_RUNNING)


def test_inputs_that_a_graph_does_not_keep_are_found(monkeypatch):
    """Check that inputs are written where the captured kernels read."""
    with FakeLaunches() as gpu:
        config, runner = build(1, MAX_TOKENS, FakeCapture(gpu))
        runner.warm_up(max_num_batched_tokens=MAX_TOKENS, max_num_seqs=MAX_RUNNING)
        serve(config, runner)
        for graph in runner._graphs:
            graph.inputs[:] = [replace(kept, words=kept.words.clone()) for kept in graph.inputs]
        with pytest.raises(AssertionError, match=r"a replay of .* uses memory that was freed: torch.int32"):
            serve(config, runner)


@pytest.fixture
def streams(monkeypatch):
    """Return the streams of "cuda:0"."""
    FakeCuda(1).install(monkeypatch)
    with OnCpu(), FakeLaunches() as gpu, FakeStreams(gpu).install(monkeypatch) as streams:
        yield streams


@pytest.mark.parametrize("num_micro_batches", [1, 2], ids=["whole steps", "halves"])
def test_steps_launched_ahead_share_no_memory_too_early(streams, num_micro_batches):
    """Check pinned buffers and memory of two streams, with two steps in flight, in micro-batches on three streams."""
    config, runner = build(1, MAX_TOKENS, None, device=DEVICE, num_micro_batches=num_micro_batches)
    runner.warm_up(max_num_batched_tokens=MAX_TOKENS, max_num_seqs=MAX_RUNNING)
    serve(config, runner, ahead=runner.depth - 1)


@pytest.mark.parametrize("num_ranks", [1, 2], ids="EP {}".format)
def test_a_captured_step_ends_on_the_stream_it_began_on(streams, num_ranks):
    """Check that every stream that takes part is joined (`cudaErrorStreamCaptureUnjoined`), with micro-batches."""
    unjoined = []

    def capture(work):
        work()
        out = work()
        unjoined.append(streams.unjoined())
        return Captured(lambda: None, out)

    _, runner = build(num_ranks, MAX_TOKENS, capture, device=DEVICE, num_micro_batches=2)
    runner.warm_up(max_num_batched_tokens=MAX_TOKENS, max_num_seqs=MAX_RUNNING)
    assert unjoined
    assert not any(unjoined)
    for all_to_all in runner._model.context.all_to_alls:
        all_to_all.dispatch_recv = lambda handle, each=all_to_all: each._inner.dispatch_recv(handle.inner)
        all_to_all.combine_recv = lambda handle, each=all_to_all: each._inner.combine_recv(handle.inner)
    with pytest.raises(StreamOrderError, match=r"memory of .* stream \d may still use"):
        runner.warm_up(max_num_batched_tokens=MAX_TOKENS, max_num_seqs=MAX_RUNNING)


class FakeGraph:
    def replay(self):
        pass


def test_what_is_done_before_a_capture_is_ordered_too(streams, monkeypatch):
    """Check the stream that `cuda_graphs.cuda` uses before a capture."""
    captures, meetings = [], []

    @contextlib.contextmanager
    def graph(graph, pool, capture_error_mode):
        """As `torch.cuda.graph`: it waits for the device and captures on a stream of its own."""
        assert (pool, capture_error_mode) == ("pool", "thread_local")
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            captures.append(graph)
            yield

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph, raising=False)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    capture = cuda_graphs.cuda(lambda: meetings.append(len(captures)))
    _, runner = build(2, MAX_TOKENS, capture, device=DEVICE, num_micro_batches=2)
    runner.warm_up(max_num_batched_tokens=MAX_TOKENS, max_num_seqs=MAX_RUNNING)
    assert len(captures) > 3
    assert meetings == list(range(len(captures))), "all ranks meet before each"


def test_a_result_that_is_read_too_early_is_found(streams, monkeypatch):
    config, runner = build(1, MAX_TOKENS, None, device=DEVICE)
    monkeypatch.setattr(FakeEvent, "synchronize", lambda event: None)
    with pytest.raises(StreamOrderError, match="the host reads or writes pinned memory that main may still use"):
        serve(config, runner)


def test_a_stream_that_waits_for_nothing_is_found(streams):
    """Check a stream that would get memory that the step before still reads."""
    config, runner = build(1, MAX_TOKENS, None, device=DEVICE, num_micro_batches=2)
    for all_to_all in runner._model.context.all_to_alls:
        all_to_all._stream.wait_stream = lambda stream: None
    with pytest.raises(StreamOrderError, match=r"on stream \d may be given memory of \w+ that was freed and main"):
        serve(config, runner, ahead=runner.depth - 1)
