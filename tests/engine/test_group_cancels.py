"""Groups that end at any moment: cancelled in every state, and at random; nothing is left of them, and every token is counted."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from dataclasses import dataclass

import pytest

from expertwire.bench.test_time.storm import OPTIONS, Report, check_leftovers, storm
from expertwire.deploy.runtime import open_frontend
from expertwire.engine.config.engine_config import EngineConfig
from expertwire.engine.frontend.api import RequestOptions
from expertwire.engine.frontend.groups import Groups
from expertwire.scheduler.sampling_params import SamplingParams
from expertwire.strategies import FirstKFinish, Needs, Selection, Status, WholeText
from expertwire.strategies.base import Finish, Fork, Resume, Start, Verify

LONG = SamplingParams(max_tokens=10_000, ignore_eos=True, seed=1)


@contextlib.contextmanager
def open_groups(**options):
    config = EngineConfig(**{**OPTIONS, "max_model_len": 2048, "kv_cache_memory_bytes": 20_000_000, **options})
    with open_frontend(config) as frontend, contextlib.closing(Groups(frontend)) as groups:
        yield groups


@pytest.fixture(scope="module")
def groups():
    with open_groups(mock_step_time_s=0.005, max_num_seqs=8, max_num_batched_tokens=16) as groups:
        yield groups


def start(groups, strategy, prompt=(1, 2, 3), params=LONG, streams=True):
    tokens = groups.frontend.encode(list(prompt), params)
    return groups.start(tokens, params, RequestOptions(), strategy, streams=streams)


def wait(groups, condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it does not come about"
        groups.poll(0.05)


def stats_of(groups):
    groups.poll(0)
    return groups.frontend.stats()


@dataclass(frozen=True)
class Script:
    """Starts branches, and once does something else about branch 0 when it has this status; the others go on."""

    needs: Needs
    status: Status | None = None
    then: tuple = ()

    def decide(self, group):
        if not group.branches:
            return [Start(3)]
        is_due = group.branches[0].status is self.status and len(group.branches) == 3
        go_on = [Resume(branch.index) for branch in group.with_status(Status.PAUSED) if branch.index]
        return [*go_on, *(self.then if is_due and not group.branches[0].scoring else ())]

    def select(self, group):
        return Selection(branches=(0,))


def cancel_waiting(groups, hold):
    others = [start(groups, FirstKFinish(4, 1)) for _ in range(2)]
    wait(groups, lambda: all(branch.token_ids for run in others for branch in run.branches))
    run = start(groups, FirstKFinish(3, 1))
    wait(groups, lambda: stats_of(groups)["num_waiting"] == 3)
    run.abort()
    assert stats_of(groups)["num_waiting"] == 0
    assert stats_of(groups)["num_running"] == 8
    for other in others:
        other.abort()
    return run


def cancel_in_prompt(groups, hold):
    run = start(groups, FirstKFinish(3, 1), prompt=[index % 90 for index in range(2000)], params=SamplingParams(seed=1))
    wait(groups, lambda: stats_of(groups)["num_running"] > 0)
    assert not any(branch.token_ids for branch in run.branches), "the prompt should have taken longer"
    run.abort()
    return run


def cancel_decoding(groups, hold):
    run = start(groups, FirstKFinish(4, 1))
    wait(groups, lambda: all(branch.token_ids for branch in run.branches))
    run.abort()
    return run


def cancel_paused(groups, hold):
    run = start(groups, Script(Needs(step_text="1")))
    wait(groups, lambda: run.branches[0].status is Status.PAUSED)
    run.abort()
    return run


def cancel_verifying(groups, hold):
    def slow(candidates):
        hold.wait(30)
        return [0.0] * len(candidates)

    run = start(groups, Script(Needs(step_text="1", verifier=slow), Status.PAUSED, (Verify(0),)))
    wait(groups, lambda: run.branches[0].num_asked == 1)
    run.abort()
    return run


def cancel_forked(groups, hold):
    run = start(groups, Script(Needs(step_text="1"), Status.PAUSED, (Fork(0, 2),)))
    wait(groups, lambda: len(run.branches) == 5 and any(len(b.token_ids) > b.num_shared for b in run.branches[3:]))
    run.abort()
    return run


CANCELS = [cancel_waiting, cancel_in_prompt, cancel_decoding, cancel_paused, cancel_verifying, cancel_forked]


@pytest.mark.parametrize("cancel", CANCELS, ids=lambda cancel: cancel.__name__)
def test_a_group_is_cancelled_in_any_state(groups, cancel):
    hold = threading.Event()
    before = stats_of(groups)
    run = cancel(groups, hold)
    hold.set()
    assert (run.done, run.selection, run.error) == (True, None, None)
    assert all(branch.is_over for branch in run.branches)
    report = Report()
    check_leftovers(groups.frontend, report)
    assert report.problems == []
    pruned, pruned_before = (stats["groups"].get("branches_pruned", 0) for stats in (report.stats, before))
    assert pruned - pruned_before >= len(run.branches)


def test_output_that_nobody_has_taken_when_a_group_ends_is_counted():
    """The result of one request ends the group, and another request has ended in the same step."""

    @dataclass(frozen=True)
    class TwoRequests:
        needs = Needs()

        def decide(self, group):
            return [] if group.branches else [Start(1), Start(1)]

        def select(self, group):
            return Selection(branches=(0,))

    class EndsAtFirst(TwoRequests):
        def decide(self, group):
            if group.branches and group.branches[0].status is Status.FINISHED:
                return [Finish()]
            return super().decide(group)

    with open_groups() as groups:
        run = start(groups, EndsAtFirst(), params=SamplingParams(max_tokens=7, ignore_eos=True, seed=1))
        while not run.done:
            time.sleep(0.3)  # both end before anything is received
            groups.poll(0.05)
        report = Report()
        check_leftovers(groups.frontend, report)
    assert report.problems == []
    assert [branch.status for branch in run.branches] == [Status.FINISHED] * 2
    assert run.token_counts().kept == 14


def test_a_group_that_waits_for_ends_is_not_called_every_step(groups, monkeypatch):
    taken, take = [], groups.frontend.take
    monkeypatch.setattr(groups.frontend, "take", lambda request: taken.append(request.id) or take(request))
    # More than a window of tokens with so many log-probabilities: the engine waits until some are taken.
    params = SamplingParams(max_tokens=500, ignore_eos=True, seed=1, logprobs=20)
    run = start(groups, FirstKFinish(2, 2, WholeText()), params=params, streams=False)
    wait(groups, lambda: run.done)
    assert [len(branch.token_ids) for branch in run.branches] == [500, 500]
    assert (run.num_tokens, len(run.branches[0].positions)) == (1000, 500)
    assert len(taken) <= 20


def test_a_decision_sees_all_tokens_of_branches_that_have_no_news(groups):
    seen = []

    class Seeing(Script):
        def decide(self, group):
            seen.extend(len(branch.token_ids) for branch in group.with_status(Status.RUNNING))
            return super().decide(group)

    run = start(groups, Seeing(Needs(step_text="1"), Status.PAUSED, (Finish(),)), streams=False)
    wait(groups, lambda: run.done)
    assert seen
    assert all(seen)


@pytest.mark.parametrize(("falling_from", "max_tokens"), [(1, 10_000), (2, 20)])
@pytest.mark.parametrize("streams", [True, False])
def test_a_group_decides_when_the_confidence_of_a_branch_falls(groups, falling_from, max_tokens, streams):
    """The first whole window counts as one, of the branches from `falling_from` on."""
    seen = []

    class Watching(Script):
        def decide(self, group):
            if not group.branches:
                return [Start(2)]
            seen.append((len(group.branches[1].logprobs) >= 4, bool(group.with_status(Status.FINISHED))))
            return [Finish()]

    params = dataclasses.replace(LONG, max_tokens=max_tokens)
    strategy = Watching(Needs(logprobs=True, falling_window=4, falling_from=falling_from))
    run = start(groups, strategy, params=params, streams=streams)
    wait(groups, lambda: run.done)
    assert seen == [(True, falling_from == 2)]


@pytest.mark.slow
@pytest.mark.parametrize("ep_size", [1, 2])
def test_nothing_is_left_of_a_storm(ep_size):
    with open_frontend(EngineConfig(**OPTIONS, ep_size=ep_size)) as frontend:
        report = storm(frontend, 15.0, seed=ep_size)
    assert report.problems == []
    assert {"forked", "decoding", "paused"} <= set(report.cancelled)
    assert report.stats["preemptions"]
    assert set(report.ended) == {"result", "cancelled", "error: INTERNAL"}


def test_nothing_is_left_of_a_short_storm():
    with open_frontend(EngineConfig(**OPTIONS)) as frontend:
        report = storm(frontend, 1.5, seed=7)
    assert report.problems == []
    assert report.cancelled
    assert report.ended["result"]
