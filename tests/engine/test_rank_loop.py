"""A rank's loop answers every plan in order, launches what is here before it answers, and never waits with an answer in hand."""

from collections import deque

import numpy as np
import pytest

from expertwire.comm.control.channel import ChannelClosed
from expertwire.engine.rank_loop import Launched, serve
from expertwire.scheduler.plan import StepPlan, StepResult


def message(kind, step):
    arrays = {name: np.zeros(0, dtype) for name, dtype in kind.dtypes.items()}
    return kind(**dict.fromkeys(kind.scalars, 0) | {"step": step}, **arrays)


class Script:
    """The controller and the device: what happens is written down in `events`.

    Args:
        num_plans: after these the controller is gone.
        ahead: plans that the controller sends before it needs the answer to the first of them.
        depth: of the runner; with 2, a step is done when it has been asked about three times.
    """

    def __init__(self, num_plans, *, ahead, depth=1):
        self.events, self.plans = [], deque(range(num_plans))
        self.credit, self.depth, self.in_hand, self.flying = ahead, depth, 0, 0

    def recv(self, timeout_s):
        if timeout_s != 0.0:
            assert not self.in_hand, "waits for a plan with a result in hand"
        if timeout_s is None:
            assert not self.flying, "waits for ever with a step to finish"
            if not self.plans:
                raise ChannelClosed
            assert self.credit, "waits for ever"
        if not (self.credit and self.plans):
            return None
        self.credit -= 1
        step = self.plans.popleft()
        self.events.append(f"take {step}")
        return message(StepPlan, step).to_arrays()

    def send(self, arrays):
        step = StepResult.from_arrays(arrays).step
        self.events.append(f"send {step}")
        self.credit += 1
        self.in_hand -= 1

    def launch(self, plan):
        self.events.append(f"launch {plan.step}")
        self.flying += 1
        asked = iter([False, False] if self.depth == 2 else [])

        def finish():
            self.events.append(f"finish {plan.step}")
            self.in_hand += 1
            self.flying -= 1
            return message(StepResult, plan.step)

        return Launched(finish, lambda: next(asked, True))

    def run(self):
        with pytest.raises(ChannelClosed):
            serve(self, self)
        return self.events


def test_without_planning_ahead_each_plan_is_answered_before_the_next():
    assert Script(2, ahead=1).run() == [
        *("take 0", "launch 0", "finish 0", "send 0"),
        *("take 1", "launch 1", "finish 1", "send 1"),
    ]


def test_the_next_plan_is_launched_before_the_answer_goes_out():
    assert Script(3, ahead=2).run() == [
        *("take 0", "launch 0", "finish 0"),
        *("take 1", "launch 1", "send 0", "finish 1"),
        *("take 2", "launch 2", "send 1", "finish 2", "send 2"),
    ]


def test_a_device_gets_the_next_step_while_it_computes():
    assert Script(3, ahead=2, depth=2).run() == [
        *("take 0", "launch 0", "take 1", "launch 1", "finish 0", "send 0"),
        *("take 2", "launch 2", "finish 1", "send 1", "finish 2", "send 2"),
    ]


def test_a_step_is_finished_when_it_is_done_though_no_other_follows():
    assert Script(1, ahead=2, depth=2).run() == ["take 0", "launch 0", "finish 0", "send 0"]


def test_a_plan_that_is_none_ends_the_loop_with_a_reason():
    script = Script(1, ahead=1)
    script.recv = lambda timeout_s: {"num_blocks": np.array([3])}
    with pytest.raises(ValueError, match="expected a StepPlan"):
        serve(script, script)
