"""Order and memory lifetimes of an all-to-all on its own stream, over a strict fake of streams and the allocator."""

from functools import partial

import pytest
import torch
from helpers.fake_streams import FakeStreams, StreamOrderError

from expertwire.comm.all_to_all.base import AllToAllSpec
from expertwire.comm.all_to_all.nccl import NcclAllToAll
from expertwire.comm.all_to_all.stream import StreamAllToAll, on_stream
from expertwire.kernels import registry
from expertwire.kernels.ops.experts import GroupedMlpWeights
from expertwire.kernels.ops.variants import Routing
from expertwire.moe.eplb.placement import place
from expertwire.moe.layer import prepare
from expertwire.moe.micro_batch import interleave

T, D, F, E, K = 6, 16, 8, 4, 2
PARTS = 2


class Alone:
    """A `Group` of one rank whose collectives run on their own stream and keep their tensors until they are waited
    for, as `ProcessGroupNCCL` does (`stashed_for_allocator_safety_`, ProcessGroupNCCL.cpp of torch 2.13)."""

    rank, size = 0, 1

    def __init__(self, streams):
        self._stream = streams.stream()

    def exchange(self, out, rows, out_counts, counts):
        return self._copied([out], [rows])

    def all_gather(self, out, rows):
        return self._copied([out], [rows])

    def _copied(self, out, given):
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for each, rows in zip(out, given, strict=True):
                each.copy_(rows)
        return Work(self._stream, (out, given))


class Work:
    def __init__(self, stream, kept):
        self._stream, self._kept = stream, kept

    def wait(self):
        torch.cuda.current_stream().wait_stream(self._stream)
        self._kept = ()


class LetsGo(StreamAllToAll):
    """An all-to-all that keeps no reference to its inputs."""

    def _dropped(self, handle):
        object.__setattr__(handle, "kept", ())
        return handle

    def dispatch_send(self, *args):
        return self._dropped(super().dispatch_send(*args))

    def combine_send(self, *args):
        return self._dropped(super().combine_send(*args))


@pytest.fixture
def streams(monkeypatch):
    return FakeStreams().install(monkeypatch)


def spec(group):
    return AllToAllSpec(
        group=group,
        rank_offsets=(0, E),
        max_tokens=T,
        hidden_size=D,
        top_k=K,
        dtype=torch.float32,
        num_micro_batches=PARTS,
    )


def layers(all_to_alls):
    experts = GroupedMlpWeights(torch.randn(E, 2 * F, D), torch.randn(E, D, F))
    weights = torch.randn(E, D), experts, torch.ones(D)
    make = partial(prepare, ops=registry.plain(), routing=Routing(top_k=K, renormalize=True), eps=1e-6)
    return [make(*weights, placement=place(E, 1), rank=0, all_to_alls=all_to_alls) for _ in range(2)]


def decoder(moe_layers, x_TD, part):
    """Run one micro-batch: layers with experts, then one without."""
    normed_TD = x_TD * 2
    for layer in moe_layers:
        x_TD, normed_TD = yield from layer.micro_batch(x_TD, normed_TD, [T], part)
    return (normed_TD * 2).relu() + x_TD


def step(streams, all_to_alls):
    """Run two micro-batches of real layers over the NCCL all-to-all, whose every phase allocates."""
    inputs, moe_layers = torch.randn(PARTS, T, D), layers(all_to_alls)
    with streams, torch.inference_mode():
        for _ in range(2):
            found = interleave([decoder(moe_layers, x_TD.clone(), part) for part, x_TD in enumerate(inputs)])
    assert all(torch.isfinite(y_TD).all() for y_TD in found)


def test_two_batch_overlap_is_ordered(streams):
    step(streams, [on_stream(NcclAllToAll(spec(Alone(streams)))) for _ in range(PARTS)])


def test_micro_batches_have_streams_of_their_own(streams):
    """Otherwise a receive could reuse memory that another micro-batch still reads, as no send is between them."""
    shared = streams.stream()
    with pytest.raises(
        StreamOrderError, match=r"on stream 1 may be given memory of \w+ that was freed and main may still use"
    ):
        step(streams, [StreamAllToAll(NcclAllToAll(spec(Alone(streams))), shared) for _ in range(PARTS)])


@pytest.mark.parametrize("waits", ["side", "main"])
def test_a_stream_that_does_not_wait_is_found(streams, monkeypatch, waits):
    sides = [streams.stream() for _ in range(PARTS)]
    for stream in sides if waits == "side" else [streams.main]:
        monkeypatch.setattr(stream, "wait_stream", lambda other: None)
    with pytest.raises(StreamOrderError, match=r"(reads|writes) memory of|may be given"):
        step(streams, [StreamAllToAll(NcclAllToAll(spec(Alone(streams))), side) for side in sides])


def test_a_stream_that_was_never_waited_for_is_named(streams):
    side = streams.stream()
    with streams, torch.cuda.stream(side):
        torch.zeros(3)
    assert streams.unjoined() == ["stream 1"]
    streams.main.wait_stream(side)
    assert not streams.unjoined()


def test_recorded_streams_keep_memory(streams):
    """`record_stream` as in torch keeps released memory."""
    side = streams.stream()
    with streams:
        x = torch.randn(3)
        side.wait_stream(streams.main)
        with torch.cuda.stream(side):
            y = x + 1
        x.record_stream(side)
        del x
        torch.randn(3)
        assert y.shape == (3,)


def exchange(all_to_all):
    """Run an exchange and release every tensor at once."""
    handle = all_to_all.dispatch_send(torch.randn(T, D), torch.arange(T * K).view(T, K) % E, [T])
    torch.zeros(3)
    arrived = all_to_all.dispatch_recv(handle)
    handle = all_to_all.combine_send(handle, arrived.x_UD[arrived.row_index_R])
    del arrived
    torch.zeros(3)
    torch.zeros(3) + all_to_all.combine_recv(handle).sum()


def test_tensors_being_sent_are_kept(streams):
    with streams:
        exchange(on_stream(NcclAllToAll(spec(Alone(streams)))))
        lets_go = LetsGo(NcclAllToAll(spec(Alone(streams))), streams.stream())
        with pytest.raises(
            StreamOrderError, match=r"zeros on main may be given memory of \w+ that was freed and stream \d may"
        ):
            exchange(lets_go)


class Counting:
    """An all-to-all that reads `num_valid` on the device."""

    graph_safe = True

    def dispatch_send(self, x_TD, physical_TK, num_tokens_P, num_valid):
        return x_TD.sum() * num_valid


def test_the_number_of_valid_tokens_is_kept(streams):
    with streams:
        handle = on_stream(Counting()).dispatch_send(torch.randn(T, D), None, [T], torch.zeros(1) + 3)
        torch.zeros(1)
        del handle
