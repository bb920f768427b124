"""The controller's loop between steps."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace

import pytest
from helpers.sim_ranks import CACHES, SimRank, make_config

from expertwire.engine import controller
from expertwire.scheduler.plan import StepPlan
from expertwire.scheduler.scheduler import Scheduler


class Clock:
    """Stands in for the module `time`."""

    now = 0.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(controller, "time", clock)
    return clock


class Hub:
    """Frontends and ranks from which nothing comes; it notes how long it was to wait."""

    def __init__(self):
        self.waits = []

    def poll(self, timeout_s):
        self.waits.append(timeout_s)
        return [], False

    def silent(self, limit_s):
        return []

    def beat(self, problem):
        pass


def test_a_short_pause_is_not_used_for_checks(clock):
    hub, checks = Hub(), []
    scheduler = SimpleNamespace(idle=True, check_integrity=lambda: checks.append(clock.now))
    state = controller.ControllerState(scheduler=scheduler, hub=hub, info=None, frontends=hub)

    def poll(at, *, busy):
        clock.now = at
        controller._poll(state, busy=busy)
        return hub.waits[-1]

    assert poll(10.0, busy=True) == 0
    # `poll` returns early, because it is time for a beat.
    assert poll(10.4, busy=False) == pytest.approx(0.6)
    assert poll(10.9, busy=False) == pytest.approx(0.1)
    assert poll(10.95, busy=True) == 0
    assert poll(11.9, busy=False) == pytest.approx(0.05)
    assert not checks
    assert poll(11.95, busy=False) == 0
    assert checks == [11.95], "once after a second without work"
    assert poll(12.0, busy=False) is None, "there is nothing to do until something comes"
    assert poll(20.0, busy=False) is None
    assert checks == [11.95]


def test_statistics_cost_one_step():
    """Another one would be in flight when they are answered, though nobody has asked for anything more."""
    config, answered = make_config(), []
    ranks = [SimRank(rank, config, CACHES) for rank in range(config.num_ranks)]
    plans: deque[StepPlan] = deque()

    def collect(timeout_s, meanwhile):
        plan = plans.popleft()
        return [rank.run(plan).to_arrays() for rank in ranks]

    state = controller.ControllerState(
        scheduler=Scheduler(config, CACHES),
        hub=SimpleNamespace(publish=lambda arrays: plans.append(StepPlan.from_arrays(arrays)), collect=collect),
        info=SimpleNamespace(num_layers=0),
        frontends=SimpleNamespace(send=lambda number, message: answered.append(number)),
    )
    state.awaiting_stats.append(3)
    in_flight = controller.step(state, None, 1.0)
    state.awaiting_stats.append(4)
    assert controller.step(state, in_flight, 1.0) is None
    assert answered == [3, 4]
