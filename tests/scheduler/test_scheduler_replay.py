"""The same calls give the same plans and outputs, byte by byte."""

import random
from collections import deque

import numpy as np
import pytest
from helpers.policies import POLICIES
from helpers.sim_ranks import CACHES, WINDOWED, SimRank, make_config, make_request

from expertwire.scheduler.scheduler import Scheduler


class Calls:
    """Makes calls to a scheduler and records them with their results."""

    def __init__(self, make_scheduler):
        self.make_scheduler = make_scheduler
        self.scheduler = make_scheduler()
        self.log = []

    def __call__(self, name, *args):
        value = getattr(self, "_" + name)(self.scheduler, *args)
        self.log.append((name, args, as_bytes(value)))
        return value

    def replay(self):
        """Repeat all calls with another scheduler, and return the results."""
        scheduler, plans = self.make_scheduler(), deque()
        for name, args, _ in self.log:
            if name == "commit":
                value = scheduler.commit(plans.popleft(), args[1], args[2])
            else:
                value = getattr(self, "_" + name)(scheduler, *args)
            if name == "plan" and value is not None:
                plans.append(value)
            yield as_bytes(value)

    def _submit(self, scheduler, key, values, now):
        return scheduler.submit(make_twin(key, values), now)

    def _group(self, scheduler, keys, values, parent, now):
        return scheduler.submit_group([make_twin(key, values) for key in keys], now, parent)

    def _resume(self, scheduler, key):
        return scheduler.resume(key)

    def _abort(self, scheduler, key):
        scheduler.abort(key)

    def _grant(self, scheduler, key, num_tokens):
        scheduler.grant(key, num_tokens)

    def _plan(self, scheduler, now):
        return scheduler.plan(now)

    def _commit(self, scheduler, plan, results, now):
        return scheduler.commit(plan, results, now)


def make_twin(key, values):
    """Return a request with `values` and its own key, as of a group or of a fork from the prompt."""
    request = make_request(**values)
    if values["max_tokens"] % 3 == 0:
        request.pause_ids = np.arange(0, 50, 5, dtype=np.int32)
    request.key = request.seed = key
    return request


def as_bytes(value):
    """Return the bytes of a value, of arrays with their dtypes."""
    if hasattr(value, "step"):
        return [
            (name, str(getattr(a, "dtype", "")), getattr(a, "tobytes", lambda a=a: a)())
            for name, a in vars(value).items()
        ]
    return value


def play(calls, ranks, rng, max_in_flight):
    """Play a random session of plans, commits, submissions, grants, aborts, resumptions, groups and forks."""
    values_of, in_flight, now = {}, deque(), 0.0
    for key in range(800):
        now += rng.random() / 10
        kind = rng.choice(
            [
                "submit",
                "submit",
                "grant",
                "resume",
                "resume",
                "abort",
                "group",
                "fork",
                "plan",
                "plan",
                "plan",
                "plan",
                "commit",
            ]
        )
        unfinished = calls.scheduler.unfinished()
        if kind == "submit":
            values = {
                "key": key,
                "length": rng.randint(1, 23),
                "shared": rng.choice([0, 9, 20]),
                "text": rng.randint(0, 1),
            }
            values |= {"max_tokens": rng.randint(1, 12), "priority": rng.randint(-1, 1), "tenant": rng.choice("ab")}
            values |= {"deadline": rng.choice([None, now + 1.0]), "logprobs": rng.choice([None, 1])}
            values |= {"credit": rng.choice([None, None, 3])}
            values_of[key] = values
            calls("submit", key, values, now)
        elif kind == "abort" and unfinished:
            calls("abort", rng.choice(unfinished))
        elif kind == "grant" and unfinished:
            calls("grant", rng.choice(unfinished), rng.randint(1, 4))
        elif kind == "resume" and unfinished:
            calls("resume", rng.choice(unfinished))
        elif kind in ("group", "fork") and unfinished:
            parent = rng.choice(unfinished)
            keys = range(1000 * key, 1000 * key + rng.randint(1, 4))
            values_of |= dict.fromkeys(keys, values_of[parent])
            calls("group", [*keys], values_of[parent], parent if kind == "fork" else None, now)
        elif kind == "plan" and len(in_flight) < max_in_flight and (plan := calls("plan", now)) is not None:
            in_flight.append(plan)
        elif in_flight:
            plan = in_flight.popleft()
            calls("commit", plan, [rank.run(plan) for rank in ranks], now)


@pytest.mark.parametrize("max_in_flight", [1, 2])
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_the_same_calls_give_the_same_bytes(policy, max_in_flight):
    specs = WINDOWED if max_in_flight == 1 else CACHES
    config = make_config(max_num_seqs=4, num_blocks=9, max_queued_requests=8, chunked_prefill_size=6)
    calls = Calls(lambda: Scheduler(config, specs, policy()))
    ranks = [SimRank(rank, config, specs) for rank in range(config.num_ranks)]
    for rank in ranks:
        rank.no_decode_waits = False
    play(calls, ranks, random.Random(max_in_flight), max_in_flight)
    stats = calls.scheduler.stats()
    assert min(stats["preemptions"], stats["cached_tokens"]) > 0, stats
    for number, (value, (name, _, expected)) in enumerate(zip(calls.replay(), calls.log, strict=True)):
        assert value == expected, f"call {number}, {name}"
