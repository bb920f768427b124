"""A rank's loop: receive plans, compute them, send results. Imports no torch.

The controller plans ahead, so the next plan has usually arrived before a step is done. A GPU is given that plan's work then, so
that it continues without waiting for the host. On a CPU a result is sent before the next step is computed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple, Protocol

from expertwire.comm.control.channel import ControlLink
from expertwire.scheduler.plan import StepPlan, StepResult

_POLL_S = 0.2e-3


def _true() -> bool:
    return True


class Launched(NamedTuple):
    """A step that was launched.

    Attributes:
        finish: waits for the device, or computes the step; called once, in the order of the launches.
        done: returns whether the device has computed the step.
    """

    finish: Callable[[], StepResult]
    done: Callable[[], bool] = _true


class Steps(Protocol):
    """Computes plans: a model runner, or a simulation of one.

    Attributes:
        depth: most steps that are launched and not finished: 2 on a GPU, which queues work, else 1.
    """

    depth: int

    def launch(self, plan: StepPlan) -> Launched:
        """Start this rank's part of the plan; on a GPU, queue its work."""
        ...


def serve(link: ControlLink, steps: Steps) -> None:
    """Compute plans until the controller closes the connection.

    Raises:
        ChannelClosed: the connection was closed.
    """
    launched: deque[Launched] = deque()
    result: StepResult | None = None
    while True:
        plan = None
        if len(launched) < steps.depth:
            busy = result is not None or (launched and launched[0].done())
            plan = _receive(link, 0.0 if busy else _POLL_S if launched else None)
        if plan is not None:
            launched.append(steps.launch(plan))
        if result is not None:
            link.send(result.to_arrays())
            result = None
        if launched and (len(launched) == steps.depth or (plan is None and launched[0].done())):
            result = launched.popleft().finish()


def _receive(link: ControlLink, timeout_s: float | None) -> StepPlan | None:
    arrays = link.recv(timeout_s)
    return None if arrays is None else StepPlan.from_arrays(arrays)
