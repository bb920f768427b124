"""A rank that stops raises the same error on every other rank, in time; a rank that is slow raises none."""

import functools
import itertools
import os
import signal
import time

import pytest
from helpers.exchanges import Exchange, build, take_part
from helpers.ranks import Ranks

from expertwire.comm.all_to_all.base import RankStalled

CULPRIT, STEP = 1, 2
LAYERS = (3, 5, 8)
# Before which phase the culprit stops, and what the others miss: exchange, phase, layer.
MISSED = {
    "dispatch_send": (STEP + 1, "dispatch", 8),
    "dispatch_recv": (STEP + 1, "combine", 8),
    "combine_send": (STEP + 1, "combine", 8),
    "combine_recv": (STEP + 2, "dispatch", 3),
}
HOW = ("freeze", "kill", "slow")
IN_EVERY_RUN = {("freeze", "combine_recv"), ("kill", "dispatch_send"), ("slow", "combine_send")}


@pytest.fixture(scope="module")
def ranks():
    with Ranks(3) as ranks:
        yield ranks


def survive(all_to_all, case, group, steps, before_phase=lambda: None):
    """Return the error that ends the exchanges, as (rank, exchange, phase, layer), and the time of the last phase."""
    started = [0.0]

    def pause():
        before_phase()
        started[0] = time.monotonic()

    try:
        for step in range(steps):
            take_part(all_to_all, case, group.rank, group.size, step, pause)
    except RankStalled as error:
        return (error.rank, error.exchange, error.phase, error.layer), time.monotonic() - started[0]
    return None, 0.0


def misbehave(group, how, phase, timeout_s):
    """Run a rank; the one that stops is a child of its process, so that the process can report its end."""
    case = Exchange(num_experts=6, top_k=2, form="bf16")
    all_to_all = build("nvlink over shared memory", case.spec(group, timeout_s, layers=LAYERS))
    take = functools.partial(survive, all_to_all, case, group, STEP + 3)
    if group.rank != CULPRIT:
        error, seconds = take()
        again, soon = survive(all_to_all, case, group, 1) if error else (None, 0.0)
        group.barrier()
        return error, seconds, again, soon
    if not (child := os.fork()):
        calls = itertools.count()
        error, _ = take(lambda: next(calls) == 4 * STEP + list(MISSED).index(phase) and stop(how))
        os._exit(1 if error and error[0] == CULPRIT else 0)
    os.waitpid(child, os.WUNTRACED) if how == "freeze" else None
    group.barrier()
    os.kill(child, signal.SIGCONT) if how == "freeze" else None
    return os.waitpid(child, 0)[1]


def stop(how):
    if how == "slow":
        time.sleep(1)
    else:
        os.kill(os.getpid(), {"freeze": signal.SIGSTOP, "kill": signal.SIGKILL}[how])


@pytest.mark.parametrize(
    ("how", "phase"),
    [
        pytest.param(how, phase, marks=[] if (how, phase) in IN_EVERY_RUN else [pytest.mark.full])
        for how in HOW
        for phase in MISSED
    ],
)
def test_a_rank_stops(ranks, how, phase):
    timeout_s = 20.0 if how == "slow" else 2.0
    answers = ranks.run(misbehave, how, phase, timeout_s)
    culprit = answers.pop(CULPRIT)
    if how == "slow":
        assert answers == [(None, 0.0, None, 0.0)] * 2
        assert culprit == 0
        return
    for error, seconds, again, soon in answers:
        print(f"{how} before {phase}: {error} after {seconds:.2f} s, then after {soon:.3f} s")
        assert error == (CULPRIT, *MISSED[phase])
        assert again == error, "later exchanges say the same"
    # Frozen, it hears of it when it goes on; killed, never.
    assert culprit == (signal.SIGKILL if how == "kill" else 1 << 8)
