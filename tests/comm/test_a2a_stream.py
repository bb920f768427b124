"""An all-to-all on a stream of its own: the order in which two fake streams wait for each other."""

import contextlib

import pytest
import torch

from expertwire.comm.all_to_all.base import Checkable, RankStalled
from expertwire.comm.all_to_all.stream import StreamAllToAll

PHASES = ("dispatch_send", "dispatch_recv", "combine_send", "combine_recv")


class Stream:
    def __init__(self, name, log):
        self.name, self.log = name, log

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")


class Inner:
    graph_safe = True

    def __init__(self, now, log):
        self._now, self._log = now, log

    def __getattr__(self, phase):
        if phase not in PHASES:
            raise AttributeError(phase)

        def call(*args):
            self._log.append(f"{phase} on {self._now[-1].name}")
            return (phase, *args)

        return call


@pytest.fixture
def streams(monkeypatch):
    """Return a log, the stack of current streams, and another stream."""
    log = []
    now = [Stream("main", log)]

    @contextlib.contextmanager
    def on(stream):
        now.append(stream)
        yield
        now.pop()

    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: now[-1])
    return log, now, Stream("side", log)


def test_sends_wait_for_computation_and_computation_for_receives(streams):
    log, now, side = streams
    all_to_all = StreamAllToAll(Inner(now, log), side)
    assert all_to_all.graph_safe
    x, ids, y = torch.zeros(2, 3), torch.zeros(2, 1), torch.ones(2, 3)
    handle = all_to_all.dispatch_send(x, ids, [2])
    assert log == ["side waits for main", "dispatch_send on side"], "the caller goes on at once"
    assert all(any(tensor is kept for kept in handle.kept) for tensor in (x, ids)), (
        "the stream may not have read it yet"
    )
    all_to_all.dispatch_recv(handle)
    assert log[2:] == ["dispatch_recv on side", "main waits for side"]
    returning = all_to_all.combine_send(handle, y)
    assert log[4:] == ["side waits for main", "combine_send on side"]
    assert returning.kept[0] is y
    all_to_all.combine_recv(returning)
    assert log[6:] == ["combine_recv on side", "main waits for side"]


def test_check_reports_a_stall(streams):
    class Stalled(Inner):
        def check(self):
            raise RankStalled(3, 1, "dispatch", 0, 1.0)

    log, now, side = streams
    assert isinstance(StreamAllToAll(Inner(now, log), side), Checkable)
    StreamAllToAll(Inner(now, log), side).check()
    with pytest.raises(RankStalled, match="rank 3"):
        StreamAllToAll(Stalled(now, log), side).check()
