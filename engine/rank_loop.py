"""A rank's loop: plans come in, results go out. Imports no torch.

The controller plans ahead, so the next plan is mostly here before a step is done. Where a device computes by itself, that step's
work is given to it then, so that it goes on without waiting for the host. Where the host computes, it is prepared before the last
result goes out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple, Protocol

from expertwire.comm.control.channel import ControlLink
from expertwire.scheduler.plan import StepPlan, StepResult

_POLL_S = 0.2e-3


def _at_once() -> bool:
    return True


class Launched(NamedTuple):
    """A step on its way.

    Attributes:
        finish: computes what is left, or waits for the device; called once, in the order of the launches.
        done: whether the device has nothing left to do for it.
    """

    finish: Callable[[], StepResult]
    done: Callable[[], bool] = _at_once


class Steps(Protocol):
    """What computes plans: a runner, or a simulation of one.

    Attributes:
        depth: how many steps may be launched and not finished: 1, or 2 if a device keeps a queue of its work.
    """

    depth: int

    def launch(self, plan: StepPlan) -> Launched:
        """Prepare this rank's part of the plan; if its device computes by itself, give it its work."""
        ...


def serve(link: ControlLink, steps: Steps) -> None:
    """Compute plans until the controller is gone.

    Raises:
        ChannelClosed: it is.
    """
    flying: deque[Launched] = deque()
    result: StepResult | None = None
    while True:
        plan = None
        if len(flying) < steps.depth:
            busy = result is not None or (flying and flying[0].done())
            plan = _take(link, 0.0 if busy else _POLL_S if flying else None)
        if plan is not None:
            flying.append(steps.launch(plan))
        if result is not None:
            link.send(result.to_arrays())
            result = None
        if flying and (len(flying) == steps.depth or (plan is None and flying[0].done())):
            result = flying.popleft().finish()


def _take(link: ControlLink, timeout_s: float | None) -> StepPlan | None:
    arrays = link.recv(timeout_s)
    return None if arrays is None else StepPlan.from_arrays(arrays)
