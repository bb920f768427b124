"""Capture and replay of steps over a strict fake, which names what is forbidden during either."""

import pytest

pytest.importorskip("triton")

import torch
from helpers.fake_graphs import FakeCapture

from expertwire.engine.runner.staging import PinnedMemory

X = torch.arange(4.0)
REFUSED = {
    "pinned memory": (lambda: PinnedMemory().allocate(8), "empty allocates pinned memory"),
    "pinning": (lambda: X.pin_memory(), "pin_memory"),
    "item": (lambda: X[0].item(), "item"),
    "cpu": (lambda: X.cpu(), "cpu"),
    "numpy": (lambda: X.numpy(), "numpy"),
    "tolist": (lambda: X.tolist(), "tolist"),
    "a condition": (lambda: 1 if X[0] else 2, "__bool__"),
    "an index": (lambda: [1, 2][X[0].long()], "__index__"),
    "synchronize": (lambda: torch.cuda.synchronize(), "cuda.synchronize"),
    "an event": (lambda: torch.cuda.Event.synchronize(None), "Event.synchronize"),
    "a query": (lambda: torch.cuda.Event.query(None), "Event.query"),
    "host numbers": (lambda: X + torch.tensor([1.0]), "tensor"),
    "a mask": (lambda: X[X > 1], "index by a mask"),
    "nonzero": (lambda: X.nonzero(), "nonzero"),
}


@pytest.mark.parametrize(("call", "name"), REFUSED.values(), ids=REFUSED)
def test_what_cuda_refuses_is_named(call, name):
    with pytest.raises(AssertionError, match=rf"{name}.* during a capture"):
        FakeCapture().alone(call)


def test_a_replay_reads_its_inputs_and_executes_no_python():
    x, factors = torch.zeros(3), [1, 2, 3]
    step = FakeCapture()(lambda: (x + 1) * factors.pop())  # the first one is popped before the capture
    assert factors == [1]
    for value in range(3):
        x.fill_(value)
        step.replay()
        assert step.out.tolist() == [2 * (value + 1)] * 3
    assert factors == [1]


def test_nothing_is_executed_by_a_capture():
    count = torch.zeros(1)
    step = FakeCapture().alone(lambda: count.add_(1).clone())
    assert count.item() == 0
    step.replay()
    step.replay()
    assert (count.item(), step.out.item()) == (2, 2)


def test_a_replay_of_freed_memory_is_an_error():
    x = torch.ones(3)
    step = FakeCapture()(lambda x=x: x[1:] * 2)
    step.replay()
    del x
    with pytest.raises(AssertionError, match=r"a replay of mul uses memory that was freed: torch.float32 \(2,\)"):
        step.replay()


def test_graphs_share_their_memory():
    x, capture = torch.ones(3), FakeCapture()
    first, second = capture(lambda: x + 1), capture(lambda: x + 2)
    first.replay()
    assert first.out.tolist() == [2, 2, 2]
    second.replay()
    assert first.out.tolist() != [2, 2, 2]
