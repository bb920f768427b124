"""Random schedules: submit, abort, plan and commit in any order, with slots, blocks and budgets that are always short."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from sim_ranks import SimCluster, expected_output, make_config, make_request

from expertwire.scheduler.plan import FinishReason


class Machine(RuleBasedStateMachine):
    @initialize(
        num_ranks=st.integers(1, 3),
        max_running=st.integers(1, 4),
        max_num_tokens=st.integers(1, 12),
        block_size=st.integers(1, 5),
        spare=st.integers(0, 10),
    )
    def start(self, num_ranks, max_running, max_num_tokens, block_size, spare):
        max_model_len = 24
        self.config = make_config(
            num_ranks=num_ranks,
            max_running=max_running,
            max_num_tokens=max_num_tokens,
            max_model_len=max_model_len,
            block_size=block_size,
            num_blocks=1 + -(-max_model_len // block_size) + spare,
            max_waiting=6,
        )
        self.cluster = SimCluster(self.config)
        self.requests = {}
        self.waiting = []
        self.aborted = {}

    @rule(
        length=st.integers(1, 23),
        max_tokens=st.integers(1, 12),
        min_share=st.sampled_from([0, 0, 0.5, 1]),
        stops=st.lists(st.integers(0, 49), max_size=8),
        ignore_eos=st.booleans(),
    )
    def submit(self, length, max_tokens, min_share, stops, ignore_eos):
        params = {"min_tokens": int(max_tokens * min_share), "stop_token_ids": stops, "ignore_eos": ignore_eos}
        request = make_request(len(self.requests), length, max_tokens=max_tokens, **params)
        if len(self.waiting) == self.config.max_waiting:
            assert self.cluster.scheduler.submit(request, 0.0).code == "RESOURCE_EXHAUSTED"
            return
        self.cluster.submit(request)
        self.requests[request.key] = request
        self.waiting.append(request.key)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort(self, data):
        key = data.draw(st.sampled_from(sorted(self.requests)))
        self.cluster.scheduler.abort(key)
        if key in self.waiting:
            self.waiting.remove(key)
        if key not in self.cluster.finish:
            self.aborted.setdefault(key, len(self.cluster.tokens[key]))

    @precondition(lambda self: self.cluster.in_flight is None)
    @rule()
    def plan(self):
        plan = self.cluster.plan()
        if plan is None:
            assert self.cluster.scheduler.idle
            return
        admitted = self.cluster.admitted(plan)
        assert sorted(admitted) == self.waiting[: len(admitted)], "not first come, first served"
        del self.waiting[: len(admitted)]

    @precondition(lambda self: self.cluster.in_flight is not None)
    @rule()
    def commit(self):
        self.cluster.commit()

    @precondition(lambda self: self.cluster.in_flight is None)
    @rule(count=st.integers(1, 5))
    def steps(self, count):
        for _ in range(count):
            self.plan()
            if self.cluster.in_flight is not None:
                self.commit()

    @invariant()
    def intact(self):
        if not hasattr(self, "cluster"):
            return
        scheduler = self.cluster.scheduler
        scheduler.check_integrity()
        assert scheduler.num_waiting == len(self.waiting)
        unfinished = self.requests.keys() - self.cluster.finish.keys() - self.aborted.keys()
        assert scheduler.num_running == len(unfinished) - len(self.waiting)

    def teardown(self):
        if not hasattr(self, "cluster"):
            return
        if self.cluster.in_flight is not None:
            self.commit()
        # Alone on one rank, a request takes at most this many steps; FCFS never waits for more than all before it.
        self.cluster.drain(max_steps=2 + sum(2 + request.limit for request in self.requests.values()))
        for key, request in self.requests.items():
            tokens, reason = expected_output(request, self.config)
            if key in self.aborted:
                assert self.cluster.tokens[key] == tokens[: self.aborted[key]], (
                    "output after the abort, or other tokens"
                )
                assert key not in self.cluster.finish
            else:
                assert (self.cluster.tokens[key], self.cluster.finish[key]) == (tokens, reason)
        assert FinishReason.ABORT not in self.cluster.finish.values()


Machine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestRandomSchedules = Machine.TestCase
