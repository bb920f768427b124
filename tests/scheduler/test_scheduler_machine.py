"""Random schedules: submit, fork, grant, pause, resume, abort, plan, commit in any order; slots, blocks and budgets always short.

Prompts share prefixes, pools are often so small that requests are preempted, and every other run plans ahead.
"""

import dataclasses

import numpy as np
import pytest
from helpers.examples import examples
from helpers.policies import POLICIES
from helpers.sim_ranks import CACHES, CHUNK, STATE, WINDOWED, SimCluster, expected_output, make_config, make_request
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from expertwire.scheduler.quotas import TenantQuota

# Token ids at which requests pause.
PAUSES = st.sampled_from([(), (), tuple(range(0, 50, 7)), tuple(range(50))]).map(lambda ids: np.array(ids, np.int32))


class Machine(RuleBasedStateMachine):
    num_operations = 0  # of all machines of a class together

    @initialize(
        num_ranks=st.sampled_from([1, 1, 2, 3]),
        max_num_seqs=st.sampled_from([4, 3, 2, 1]),
        max_num_batched_tokens=st.sampled_from([12, 8, 5, 3, 2, 1]),
        chunked_prefill_size=st.sampled_from([None, None, 1, 3]),
        block_size=st.integers(1, 5),
        spares=st.lists(st.sampled_from([0, 0, 0, 1, 2, 5, 10]), min_size=3, max_size=3),
        specs=st.sampled_from(
            [CACHES[:1], CACHES, WINDOWED, WINDOWED[1:], (*WINDOWED, STATE), (CACHES[0], CHUNK, STATE)]
        ),
        blocks_per_chunk=st.integers(1, 2),
        chunks_per_snapshot=st.sampled_from([1, 2, 3, 5]),
        overlap=st.booleans(),
        enable_prefix_caching=st.sampled_from([True, True, False]),
        policy=st.sampled_from(sorted(POLICIES)),
        max_running=st.sampled_from([None, None, 1, 2]),
        kv_share=st.sampled_from([None, None, 0.1, 0.5]),
        original=st.sampled_from([None, None, 4, 9, 15]),
    )
    def start(
        self,
        num_ranks,
        max_num_seqs,
        max_num_batched_tokens,
        chunked_prefill_size,
        block_size,
        spares,
        specs,
        blocks_per_chunk,
        chunks_per_snapshot,
        overlap,
        enable_prefix_caching,
        policy,
        max_running,
        kv_share,
        original,
    ):
        max_model_len = 24
        chunk = block_size * blocks_per_chunk
        changes = {
            STATE: {"snapshot_every": chunk * chunks_per_snapshot, "chunk_size": chunk},
            CHUNK: {"chunk_size": chunk},
        }
        specs = tuple(dataclasses.replace(s, **changes.get(s, {})) for s in specs)
        self.config = make_config(
            num_ranks=num_ranks,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            chunked_prefill_size=chunked_prefill_size,
            max_model_len=max_model_len,
            block_size=block_size,
            num_blocks=tuple(
                1 + spec.most_blocks(block_size, max_model_len, max_num_batched_tokens) + spare
                for spec, spare in zip(specs, spares, strict=False)
            ),
            max_queued_requests=6,
            enable_prefix_caching=enable_prefix_caching,
            original_max_position_embeddings=original,
            tenant_quotas={"b": TenantQuota(weight=3.0, max_running=max_running, kv_share=kv_share)},
        )
        self.cluster = SimCluster(self.config, POLICIES[policy](), specs=specs, overlap=overlap)
        self.requests = {}
        self.begun = {}  # what a fork had when it began
        self.aborted = {}

    @rule(
        count=st.integers(1, 4),
        length=st.integers(1, 23),
        shared=st.sampled_from([0, 3, 8, 15, 30]),
        text=st.integers(0, 1),
        max_tokens=st.sampled_from([None, 20, 12, 5, 1]),
        min_share=st.sampled_from([0, 0, 0.5, 1]),
        stops=st.lists(st.integers(0, 49), max_size=3),
        ignore_eos=st.sampled_from([True, True, False]),
        priority=st.integers(-2, 2),
        tenant=st.sampled_from("ab"),
        credit=st.sampled_from([None, None, 0, 1, 4]),
        pauses=PAUSES,
        is_group=st.booleans(),
    )
    def submit(
        self,
        count,
        length,
        shared,
        text,
        max_tokens,
        min_share,
        stops,
        ignore_eos,
        priority,
        tenant,
        credit,
        pauses,
        is_group,
    ):
        """Submit requests with a common prefix, or a group of branches."""
        group, scheduler = [], self.cluster.scheduler
        for i in range(count):
            request = make_request(
                len(self.requests) + i * is_group,
                length,
                shared=shared,
                text=text,
                priority=priority,
                tenant=tenant,
                max_tokens=max_tokens,
                min_tokens=int((max_tokens or 0) * min_share),
                stop_token_ids=stops,
                ignore_eos=ignore_eos,
                credit=credit,
                pause_ids=pauses,
            )
            if is_group:
                request.prompt = request.tokens = group[0].prompt if group else request.prompt
                group.append(request)
                continue
            if scheduler.num_waiting >= self.config.max_queued_requests:
                assert scheduler.submit(request, self.cluster.now).code == "RESOURCE_EXHAUSTED"
                return
            self.cluster.submit(request)
            self.requests[request.key] = request
        if group and scheduler.num_waiting + len(group) > self.config.max_queued_requests:
            assert scheduler.submit_group(group, self.cluster.now).code == "RESOURCE_EXHAUSTED"
        elif group:
            self.cluster.submit_group(*group)
            self.requests |= {request.key: request for request in group}

    @precondition(lambda self: self.cluster.scheduler.unfinished())
    @rule(
        data=st.data(),
        count=st.integers(1, 3),
        branch=st.integers(1, 3),
        max_tokens=st.integers(1, 12),
        credit=st.sampled_from([None, 0, 2]),
        cut=st.sampled_from([0, 0, 1, 4]),
        forced=st.lists(st.integers(2, 49), max_size=3),
        from_prompt=st.booleans(),
        pauses=PAUSES,
    )
    def fork(self, data, count, branch, max_tokens, credit, cut, forced, from_prompt, pauses):
        """Branches that continue another request, after its last token, an earlier one or the prompt, with forced tokens."""
        parent = self.requests[data.draw(st.sampled_from(sorted(self.cluster.scheduler.unfinished())))]
        begun = [] if from_prompt else [*self.cluster.tokens[parent.key][: -cut or None], *forced]
        so_far = len(begun)
        if len(parent.prompt) + so_far >= self.config.max_model_len:
            return
        if self.cluster.scheduler.num_waiting + count > self.config.max_queued_requests:
            return
        children = []
        for i in range(count):
            key = len(self.requests) + i
            child = make_request(key, 1, branch=branch, max_tokens=so_far + max_tokens, ignore_eos=max_tokens % 2 == 0)
            child.prompt = parent.prompt
            child.tenant, child.credit, child.pause_ids = parent.tenant, credit, pauses
            child.output = np.array(begun, np.int32)
            child.tokens = np.concatenate((child.prompt, child.output))
            children.append(child)
        self.cluster.submit_group(*children, parent=parent.key)
        for child in children:
            self.requests[child.key] = child
            self.begun[child.key] = tuple(begun)

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), seldom=st.sampled_from([False, False, False, True]))
    def abort(self, data, seldom):
        if not seldom:
            return
        unfinished = self.cluster.scheduler.unfinished()
        key = data.draw(st.sampled_from(sorted(unfinished or self.requests)))
        self.cluster.abort(key)
        if key not in self.cluster.finish and key not in self.cluster.failed:
            self.aborted.setdefault(key, len(self.cluster.tokens[key]))

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), num_tokens=st.sampled_from([1, 3, 8]))
    def grant(self, data, num_tokens):
        self.cluster.grant(data.draw(st.sampled_from(sorted(self.requests))), num_tokens)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def resume(self, data):
        self.cluster.resume(data.draw(st.sampled_from(sorted(self.cluster.paused or self.requests))))

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), tokens=st.integers(0, 5), seldom=st.sampled_from([False, False, False, True]))
    def break_logits(self, data, tokens, seldom):
        """From so many tokens on."""
        key = data.draw(st.sampled_from(sorted(unfinished := self.cluster.scheduler.unfinished()) or [0]))
        if seldom and unfinished:
            self.cluster.break_at(key, len(self.requests[key].prompt) + len(self.cluster.tokens[key]) + tokens)

    @precondition(lambda self: not self.cluster.scheduler.idle)
    @rule(count=st.integers(1, 9))
    def steps(self, count):
        for _ in range(count):
            self.cluster.step()

    @precondition(lambda self: self.cluster.in_flight)
    @rule()
    def commit(self):
        self.cluster.commit()

    @invariant()
    def everyone_is_somewhere(self):
        if not hasattr(self, "cluster"):
            return
        scheduler = self.cluster.scheduler
        unfinished = (
            self.requests.keys() - self.cluster.finish.keys() - self.cluster.failed.keys() - self.aborted.keys()
        )
        assert sorted(scheduler.unfinished()) == sorted(unfinished)

    def teardown(self):
        if not hasattr(self, "cluster"):
            return
        for key in self.cluster.credit:
            self.cluster.grant(key, self.config.max_model_len)
        # Alone on one rank, a request takes at most this many steps, and there is always one that gets on.
        most = 10 + 2 * sum(4 + request.limit for request in self.requests.values())
        for _ in range(2 * most):
            if self.cluster.scheduler.idle:
                if not self.cluster.paused:
                    break
                self.cluster.resume(min(self.cluster.paused))
            self.cluster.step()
        self.cluster.drain(max_steps=most)
        for key, request in self.requests.items():
            tokens, reason = expected_output(request, self.config, self.begun.get(key, ()))
            if key in self.aborted:
                assert self.cluster.tokens[key] == tokens[: self.aborted[key]], (
                    "output after the abort, or other tokens"
                )
                assert key not in self.cluster.finish
            elif key in self.cluster.failed:
                position = len(request.prompt) + len(self.cluster.tokens[key])
                assert self.cluster.failed[key][0] == position == self.cluster.ranks[0].broken[key]
                assert self.cluster.tokens[key] == tokens[: len(self.cluster.tokens[key])]
            else:
                assert (self.cluster.tokens[key], self.cluster.finish[key]) == (tokens, reason)
        type(self).num_operations += self.cluster.num_operations


# Without explanations, for which hypothesis traces every line.
PHASES = [Phase.reuse, Phase.generate, Phase.shrink]
Machine.TestCase.settings = examples(40, stateful_step_count=40, phases=PHASES)
TestRandomSchedules = Machine.TestCase


@pytest.mark.slow
def test_more_random_schedules():
    class More(Machine):
        pass

    run_state_machine_as_test(More, settings=examples(200, stateful_step_count=40, phases=PHASES))


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_hundred_thousand_operations():
    class Many(Machine):
        pass

    run_state_machine_as_test(
        Many, settings=settings(max_examples=800, stateful_step_count=60, derandomize=False, phases=PHASES)
    )
    print(f"{Many.num_operations} operations")
    assert Many.num_operations >= 100_000
