"""The controller's connections to frontends: newcomers, ends, beats, and one bad frontend among good ones."""

from __future__ import annotations

import socket
import time
from types import SimpleNamespace

import numpy as np
import pytest

from expertwire.comm.control.channel import ChannelClosed, SocketChannel
from expertwire.engine import controller
from expertwire.engine.frontend_hub import FrontendHub, send_connection
from expertwire.engine.messages import Abort, Beat, Failure, Hello, Welcome, decode, encode


@pytest.fixture
def to_controller():
    ours, theirs = socket.socketpair()
    with ours:
        yield SimpleNamespace(socket=ours, hub=FrontendHub(theirs))


def connect(to_controller):
    channel = SocketChannel(send_connection(to_controller.socket))
    to_controller.hub.poll(1.0)
    return channel


def events(hub, count):
    found, deadline = [], time.monotonic() + 10
    while len(found) < count:
        assert time.monotonic() < deadline, found
        found += hub.poll(1.0)[0]
    return found


def test_messages_come_with_the_number_of_their_frontend(to_controller):
    hub, channels = to_controller.hub, [connect(to_controller) for _ in range(3)]
    for number, channel in enumerate(channels):
        channel.send(encode(Abort(ids=np.array([number]))))
    assert sorted((number, message.ids[0]) for number, message in events(hub, 3)) == [(0, 0), (1, 1), (2, 2)]
    channels[1].close()
    assert events(hub, 1) == [(1, None)]
    hub.broadcast(Failure(rank=1, message="gone"))
    assert [decode(channels[i].recv(5)).message for i in (0, 2)] == ["gone", "gone"]
    hub.close()


def test_many_messages_are_handled_in_parts_and_none_is_lost(to_controller):
    hub, channel = to_controller.hub, connect(to_controller)
    for i in range(200):
        channel.send(encode(Abort(ids=np.array([i]))))
    first, _ = hub.poll(1.0)
    assert 0 < len(first) < 200
    assert [message.ids[0] for _, message in first + events(hub, 200 - len(first))] == list(range(200))
    hub.close()


def test_a_frontend_that_ends_while_something_is_sent_to_it_is_reported_once_and_wakes_nobody_again(to_controller):
    hub, channel = to_controller.hub, connect(to_controller)
    hub.send(0, Failure(rank=0, message="x" * (1 << 22)))  # more than the kernel takes: the hub waits to write
    channel.close()
    assert events(hub, 1) == [(0, None)]
    start = time.monotonic()
    assert hub.poll(0.3) == ([], False)
    assert time.monotonic() - start > 0.25, "nothing is left to handle"
    hub.close()


def test_beats_go_to_those_who_asked_and_tell_of_a_problem_at_once(to_controller):
    hub, asked, other = to_controller.hub, connect(to_controller), connect(to_controller)
    hub.send(0, Welcome(model_info={}, beats=True))
    hub.send(1, Welcome(model_info={}))
    hub.beat("")
    hub.beat("")
    hub.beat("rank 1 is silent")
    received = [decode(asked.recv(5)) for _ in range(3)]
    assert received[1:] == [Beat(problem=""), Beat(problem="rank 1 is silent")]
    assert asked.recv(0) is None
    assert isinstance(decode(other.recv(5)), Welcome)
    assert other.recv(0) is None
    hub.close()


@pytest.mark.parametrize("bad", [Abort(ids=np.array([-1])), Beat(problem="")], ids=["sequence id", "kind"])
def test_a_bad_message_costs_its_sender_only(to_controller, bad):
    hub, good, other = to_controller.hub, connect(to_controller), connect(to_controller)
    scheduler = SimpleNamespace(idle=True, unfinished=list, abort=lambda key: None)
    ranks = SimpleNamespace(silent=lambda limit_s: [], poll_lost=lambda: None)
    info = SimpleNamespace(to_dict=dict)
    state = controller.ControllerState(scheduler=scheduler, hub=ranks, info=info, frontends=hub)
    other.send(encode(bad))
    good.send(encode(Hello()))
    for _ in range(3):
        controller._poll(state, busy=True)
    assert isinstance(decode(good.recv(5)), Welcome)
    with pytest.raises(ChannelClosed):
        other.recv(5)
    hub.close()
