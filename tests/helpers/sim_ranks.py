"""Simulated ranks: they apply plans as a worker does, check all that a worker relies on, and sample tokens by hashing.

A simulated cache holds, for each token, a hash of the request's kind (long or not) and all tokens up to it; ranks read it back
through the block tables before they sample, so a wrong block table, a block overwritten by another request, a prefix taken for
another or a skipped token fails at once. `expected_output` is the same without any scheduler.
"""

from __future__ import annotations

import functools
from collections import defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import accumulate

import numpy as np

from expertwire.scheduler.config import CacheSpec, SchedulerConfig
from expertwire.scheduler.outputs import FinishReason, StepOutputs
from expertwire.scheduler.plan import RankPlan, StepPlan, StepResult
from expertwire.scheduler.request import Request
from expertwire.scheduler.sampling_params import SamplingParams
from expertwire.scheduler.scheduler import Scheduler

CACHES = tuple(
    CacheSpec(name=name, kind="full", bytes_per_token=4, writers=(0,), readers=(0,)) for name in ("first", "second")
)


WINDOWED = (
    CACHES[0],
    CacheSpec(name="window", kind="window", bytes_per_token=4, writers=(0,), readers=(0,), window=6),
)
STATE = CacheSpec(name="state", kind="state", bytes_per_token=4, writers=(0,), readers=(0,), snapshot_every=8)
CHUNK = CacheSpec(name="chunk", kind="chunk", bytes_per_token=4, writers=(0,), readers=(0,), chunk_size=4)
WITH_STATE = (CACHES[0], STATE)
WITH_CHUNKS = (CACHES[0], CHUNK, replace(STATE, chunk_size=4))


def make_config(**changes) -> SchedulerConfig:
    """Small, with end-of-sequence ids 0 and 1 of a vocabulary of 50."""
    sizes = {
        "num_ranks": 2,
        "max_num_seqs": 3,
        "max_num_batched_tokens": 8,
        "max_model_len": 32,
        "block_size": 4,
        "num_blocks": 17,
        "max_queued_requests": 100,
        "eos_token_ids": (0, 1),
        "vocab_size": 50,
    }
    return SchedulerConfig(**{**sizes, **changes})


def make_request(key: int, length: int = 5, *, branch: int = 0, shared: int = 0, text: int = 0, **values) -> Request:
    """The seed is the key, and the prompt is drawn from it, but for the first `shared` tokens, which are those of `text`.

    Other `values` are fields of `Request` or of `SamplingParams`.
    """
    own = np.random.default_rng(key).integers(2, 50, length)
    common = np.random.default_rng([text, 1]).integers(2, 50, 1000)
    prompt = np.concatenate((common[: min(shared, length)], own[min(shared, length) :])).astype(np.int32)
    names = "priority", "tenant", "salt", "deadline", "credit", "pause_ids"
    fields = {name: values.pop(name) for name in names if name in values}
    return Request(key=key, prompt=prompt, params=SamplingParams(**values), branch=branch, seed=key, **fields)


def prefix_hash(state: int, token: int) -> int:
    """The hash of a prefix and one more token."""
    return (state * 1_000_003 + token + 1) % (2**61 - 1)


def fake_token(tokens: list[int], seed: int, branch: int, vocab_size: int, bans: set[int]) -> int:
    """The token that follows `tokens`: a hash, moved on past the banned ids."""
    state = functools.reduce(prefix_hash, tokens, seed * 31 + branch)
    token = state % vocab_size
    while token in bans:
        token = (token + 1) % vocab_size
    return token


def expected_output(
    request: Request, config: SchedulerConfig, begun: tuple[int, ...] = ()
) -> tuple[list[int], FinishReason]:
    """Return the answer that a request must get, by the definition of its parameters; a fork has `begun`."""
    params, output = request.params, list(begun)
    tokens = request.prompt.tolist() + output
    stops = set(params.stop_token_ids) | (set() if params.ignore_eos else set(config.eos_token_ids))
    while True:
        bans = stops if len(output) < params.min_tokens else set()
        token = fake_token(tokens, request.seed, request.branch, config.vocab_size, bans)
        tokens.append(token)
        output.append(token)
        if token in stops:
            return output, FinishReason.STOP
        if len(output) == params.max_tokens or len(tokens) == config.max_model_len:
            return output, FinishReason.LENGTH


@dataclass
class Slot:
    sampling: np.void
    tokens: list[int]
    bans: set[int]
    bias: dict[int, float]
    num_computed: int = -1  # not known before the first tokens are scheduled, as a beginning may be cached
    blocks: list[dict[int, int]] = field(default_factory=list)  # of each cache, by place in its block table

    @property
    def states(self) -> list[int]:
        """The hashes of the prefixes of the computed tokens; the empty one is that of the request's kind."""
        return list(accumulate(self.tokens[: self.num_computed], prefix_hash, initial=int(self.sampling["is_long"])))


class SimRank:
    """One rank: a slot table and, for each cache, one integer a token."""

    def __init__(self, rank: int, config: SchedulerConfig, specs: tuple[CacheSpec, ...] = CACHES) -> None:
        self.rank = rank
        self.config = config
        self.specs = specs
        self.slots: dict[int, Slot] = {}
        self.num_blocks = [usable + 1 for usable in config.num_usable_blocks(len(specs))]
        most = max(spec.chunk_size or config.block_size for spec in specs)
        self.caches = np.full((len(specs), max(self.num_blocks), most), -1, np.int64)  # a state is a block's first
        self.num_computed = 0
        self.sampled: defaultdict[int, set[int]] = defaultdict(set)  # positions, by seed
        self.broken: dict[int, int] = {}  # by seed, the position from which on the logits are not finite
        self.no_decode_waits = True  # whether to check that

    def run(self, plan: StepPlan) -> StepResult:
        """Apply this rank's slice and answer."""
        mine = plan.rank(self.rank)
        assert plan.num_tokens_P[self.rank] == mine.sched_num_S.sum() <= self.config.max_num_batched_tokens
        self._update_slots(mine)
        if self.no_decode_waits:
            self._check_no_decode_is_left_out(mine)
        assert len(set(mine.sched_slot_S.tolist())) == len(mine.sched_slot_S), "a slot is scheduled twice"
        scheduled = list(
            zip(mine.sched_slot_S.tolist(), mine.sched_start_S, mine.sched_num_S, mine.sched_sample_S, strict=True)
        )
        # As in a model's layers: what all of them write comes before what any of them reads.
        prompts = [
            row for index, start, num, _ in scheduled if num for row in self._compute(index, int(start), int(num))
        ]
        sources, outputs = dict(zip(mine.sched_slot_S.tolist(), mine.sched_source_S.tolist(), strict=True)), []
        known = {index: list(self.slots[index].tokens) for index in sources}
        for index, start, num, sample in scheduled:
            slot = self.slots[index]
            if num:
                assert sources[index] == index
                self._check_caches(slot, int(start))
            else:  # it samples as its leader does, whose last row this step computes
                leader = self.slots[sources[index]]
                assert slot.num_computed == -1
                assert known[sources[index]] == known[index]
                assert leader.num_computed == len(known[index]) == start
                assert leader.sampling["is_long"] == slot.sampling["is_long"]
                slot.num_computed = int(start)
            assert sample == (slot.num_computed == len(slot.tokens))
            if sample:
                outputs.append(self._sample(index))
        return self._result(plan.step, outputs, prompts)

    def _update_slots(self, mine: RankPlan) -> None:
        for index in mine.release_slot.tolist():
            del self.slots[index]
        sources = mine.admit_source_A.tolist()
        # Leaders first, whose tokens and blocks their followers start with.
        admitted = sorted(enumerate(mine.admit_slot_A.tolist()), key=lambda item: sources[item[0]] != item[1])
        for i, index in admitted:
            source = sources[i]
            assert source == index or not len(mine.admit_tokens[i])
            assert index not in self.slots, f"slot {index} is in use"
            assert 0 <= index < self.config.max_num_seqs
            self.slots[index] = Slot(
                sampling=mine.admit_sampling_A[i].copy(),
                tokens=list(self.slots[source].tokens) if source != index else mine.admit_tokens[i].tolist(),
                bans=set(mine.admit_bans[i].tolist()),
                bias=dict(zip(mine.admit_bias_ids[i].tolist(), mine.admit_bias_values[i].tolist(), strict=True)),
                blocks=[{} for _ in self.specs],
            )
        followers = {index for i, index in admitted if sources[i] != index}
        entries = list(
            zip(
                mine.block_slot_B.tolist(),
                mine.block_cache_B,
                mine.block_index_B.tolist(),
                mine.block_id_B.tolist(),
                strict=True,
            )
        )
        self._set_blocks(entry for entry in entries if entry[0] not in followers)
        for i, index in admitted:
            if index in followers:
                self.slots[index].blocks = [dict(blocks) for blocks in self.slots[sources[i]].blocks]
        self._set_blocks(entry for entry in entries if entry[0] in followers)
        self.caches[mine.copy_cache_M, mine.copy_to_M] = self.caches[mine.copy_cache_M, mine.copy_from_M]

    def _set_blocks(self, entries: Iterable[tuple[int, int, int, int]]) -> None:
        for index, cache, position, block in entries:
            assert 0 < block < self.num_blocks[cache], f"block {block}: the null block, or there is none such"
            self.slots[index].blocks[cache][position] = block

    def _check_no_decode_is_left_out(self, mine: RankPlan) -> None:
        scheduled = set(mine.sched_slot_S.tolist())
        for index, slot in self.slots.items():
            if len(slot.tokens) - slot.num_computed == 1:
                assert index in scheduled, f"slot {index} waits for one token only"

    def _compute(self, index: int, start: int, num: int) -> list[tuple]:
        """Write tokens [start, start + num) into the caches; the rows of prompt log-probabilities, if asked for."""
        slot = self.slots[index]
        assert slot.num_computed in (-1, start), f"slot {index} continues at {start}, has {slot.num_computed}"
        assert num > 0
        assert start + num <= len(slot.tokens)
        original = self.config.original_max_position_embeddings
        assert original is None or start + num <= original or slot.sampling["is_long"], "a short request is too long"
        slot.num_computed = start + num
        empty, *states = slot.states
        for spec, cache, blocks in zip(self.specs, self.caches, slot.blocks, strict=True):
            if spec.kind == "state":
                size = spec.tokens_per_block(self.config.block_size)
                found = cache[blocks[(start - 1) // size], 0] if start else empty
                assert found == (states[start - 1] if start else empty), "the state is another one"
                for position in range(start, start + num):
                    cache[blocks[position // size], 0] = states[position]
            elif spec.kind == "chunk":
                size = spec.chunk_size
                for position in range(start // size * size, start):
                    assert cache[blocks[0], position % size] == states[position], "another chunk's inputs"
                for position in range(start, start + num):
                    cache[blocks[0], position % size] = states[position]
                assert list(blocks) == [0], "one block for all chunks"
                continue
            else:
                size = self.config.block_size
                for position in range(start, start + num):
                    cache[blocks[position // size], position % size] = states[position]
            assert max(blocks) == (start + num - 1) // size, "more blocks than the tokens need"
        self.num_computed += num
        count = int(slot.sampling["prompt_logprobs"])
        predicted = range(start + 1, min(start + num + 1, int(slot.sampling["prompt_len"])))
        return [(index, p, slot.tokens[p], count) for p in predicted] if count >= 0 else []

    def _check_caches(self, slot: Slot, start: int) -> None:
        """Check that the caches hold all that the tokens from `start` on attend to."""
        states = slot.states[1:]
        for spec, cache, blocks in zip(self.specs, self.caches, slot.blocks, strict=True):
            if spec.kind == "state":
                size = spec.tokens_per_block(self.config.block_size)
                assert cache[blocks[(slot.num_computed - 1) // size], 0] == states[-1], "a wrong state"
                continue
            if spec.kind == "chunk":
                continue
            size = self.config.block_size
            first = 0 if spec.window is None else max(start - spec.window + 1, 0)
            found = [int(cache[blocks[p // size], p % size]) for p in range(first, slot.num_computed)]
            assert found == states[first:], f"cache {spec.name!r} holds other tokens"

    def _sample(self, index: int) -> tuple:
        slot = self.slots[index]
        sampling = slot.sampling
        outputs_so_far = len(slot.tokens) - int(sampling["prompt_len"])
        bans = slot.bans if outputs_so_far < sampling["min_tokens"] else set()
        seed, branch = int(sampling["seed"]), int(sampling["branch"])
        token = fake_token(slot.tokens, seed, branch, self.config.vocab_size, bans)
        if self._is_broken(slot, len(slot.tokens)):
            token = -1
        slot.tokens.append(max(token, 0))
        self.sampled[seed].add(len(slot.tokens))
        return index, token, int(sampling["logprobs"])

    def _is_broken(self, slot: Slot, position: int) -> bool:
        return position >= self.broken.get(int(slot.sampling["seed"]), position + 1)

    def _result(self, step: int, outputs: list[tuple], prompts: list[tuple]) -> StepResult:
        top_counts = [max(count, 0) for _, _, count in outputs]
        prompt_counts = [count for *_, count in prompts]
        top_ids = [token + i for _, token, count in outputs for i in range(count)]
        prompt_top_ids = [token + i for _, _, token, count in prompts for i in range(count)]
        return StepResult(
            step=step,
            rank=self.rank,
            forward_us=0,
            slot_O=np.array([index for index, _, _ in outputs], np.int32),
            token_O=np.array([token for _, token, _ in outputs], np.int32),
            logprob_O=np.array([-token if count >= 0 else np.nan for _, token, count in outputs], np.float32),
            token_rank_O=np.array([int(count >= 0) for _, _, count in outputs], np.int32),
            top_offsets_O1=np.cumsum([0, *top_counts]).astype(np.int32),
            top_ids=np.array(top_ids, np.int32),
            top_logprobs=-np.array(top_ids, np.float32),
            prompt_slot=np.array([index for index, *_ in prompts], np.int32),
            prompt_position=np.array([position for _, position, _, _ in prompts], np.int32),
            prompt_logprob=np.array(
                [np.nan if self._is_broken(self.slots[i], at) else -token for i, at, token, _ in prompts], np.float32
            ),
            prompt_token_rank=np.ones(len(prompts), np.int32),
            prompt_top_offsets=np.cumsum([0, *prompt_counts]).astype(np.int32),
            prompt_top_ids=np.array(prompt_top_ids, np.int32),
            prompt_top_logprobs=-np.array(prompt_top_ids, np.float32),
            expert_load=np.zeros(0, np.int64),
        )


class SimCluster:
    """A scheduler and its ranks; collects what every request is answered.

    Args:
        overlap: plan each step before the one before it is committed.
        check: whether to check the scheduler's integrity after every operation.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        policy=None,
        balancing=None,
        *,
        specs: tuple[CacheSpec, ...] = CACHES,
        overlap: bool = False,
        check: bool = True,
    ) -> None:
        self.config = config
        self.scheduler = Scheduler(config, specs, policy, balancing)
        self.ranks = [SimRank(rank, config, specs) for rank in range(config.num_ranks)]
        self.overlap = overlap
        self.plans: list[StepPlan] = []  # as the ranks saw them
        self.in_flight: deque[StepPlan] = deque()
        self.tokens: dict[int, list[int]] = {}
        self.finish: dict[int, FinishReason] = {}
        self.failed: dict[int, tuple[int, int]] = {}  # position and rank
        self.num_cached: dict[int, int] = {}
        self.credit: dict[int, int] = {}  # granted in all, of the requests that have any
        self.paused: set[int] = set()
        self.order: list[int] = []  # keys in the order in which they were admitted, again after a preemption
        self.now = 0.0
        self.num_operations = 0  # calls to the scheduler, without those that check it and plans that have nothing to do
        self._check = self.scheduler.check_integrity if check else lambda: None
        # A decode waits for the states of others, if all begin one at the same time.
        self._states_are_few = any(
            spec.kind == "state" and num <= 2 * config.max_num_seqs
            for spec, num in zip(specs, self.ranks[0].num_blocks, strict=True)
        )

    def submit(self, *requests: Request) -> None:
        for request in requests:
            rejection = self.scheduler.submit(request, self.now)
            assert rejection is None, rejection
            self._accepted(request)
            self.num_operations += 1
            self._check()

    def submit_group(self, *requests: Request, parent: int | None = None) -> None:
        rejection = self.scheduler.submit_group(requests, self.now, parent)
        assert rejection is None, rejection
        for request in requests:
            self._accepted(request)
        self.num_operations += 1
        self._check()

    def fork(self, key: int, *children: Request) -> None:
        """The children's answers begin with what `key` has been answered so far."""
        for child in children:
            child.output = np.array(self.tokens[key], np.int32)
            child.tokens = np.concatenate((child.prompt, child.output))
        rejection = self.scheduler.submit_group(children, self.now, key)
        assert rejection is None, rejection
        for child in children:
            self._accepted(child)
        self.num_operations += 1
        self._check()

    def _accepted(self, request: Request) -> None:
        self.tokens[request.key] = request.output.tolist()
        if request.credit is not None:
            self.credit[request.key] = request.credit

    def grant(self, key: int, num_tokens: int) -> None:
        self.scheduler.grant(key, num_tokens)
        if key in self.credit:
            self.credit[key] += num_tokens
        self.num_operations += 1
        self._check()

    def resume(self, key: int) -> None:
        self.paused.discard(key)
        if (outputs := self.scheduler.resume(key)) is not None:
            self._take(outputs)
        self.num_operations += 1
        self._check()

    def break_at(self, key: int, position: int) -> None:
        """Make the logits of a request not finite from the one on that predicts the token at `position`."""
        for rank in self.ranks:
            rank.broken[key] = position  # `make_request` makes the seed the key

    def abort(self, key: int) -> None:
        self.scheduler.abort(key)
        self.num_operations += 1
        self._check()

    def plan(self) -> StepPlan | None:
        plan = self.scheduler.plan(self.now)
        if plan is not None:
            self.order += self.admitted(plan)
            self.in_flight.append(plan)
            self.plans.append(StepPlan.from_arrays(plan.to_arrays()))
            self.num_operations += 1
        return plan

    def commit(self) -> StepOutputs:
        plan = self.in_flight.popleft()
        # Ranks see what came over a channel, and answer in any order.
        seen = self.plans[plan.step - self.plans[0].step]
        strict = not (self.overlap or self.paused or self.scheduler.stats()["preemptions"] or self._states_are_few)
        for rank in self.ranks:
            rank.no_decode_waits = strict
        results = [rank.run(seen) for rank in self.ranks]
        for key, credit in self.credit.items():
            # `make_request` makes the seed the key. What was in flight when a request gave way is sampled again.
            num_sampled = len(set().union(*(rank.sampled[key] for rank in self.ranks)))
            assert num_sampled <= credit, f"request {key} has sampled {num_sampled} tokens with a credit of {credit}"
        outputs = self.scheduler.commit(plan, results[::-1], self.now)
        self.num_operations += 1
        self._take(outputs)
        self.now += 0.01
        return outputs

    def _take(self, outputs: StepOutputs) -> None:
        for key, token, finish, cached in zip(
            outputs.key_O.tolist(),
            outputs.token_O.tolist(),
            outputs.finish_O.tolist(),
            outputs.num_cached_O.tolist(),
            strict=True,
        ):
            assert key not in {**self.finish, **self.failed}, f"request {key} has ended already"
            assert key not in self.paused, f"request {key} is paused"
            self.tokens[key].append(token)
            assert self.num_cached.setdefault(key, cached) == cached
            if finish == FinishReason.PAUSED:
                self.paused.add(key)
            elif finish:
                self.finish[key] = FinishReason(finish)
        failed = outputs.failed_keys, outputs.failed_positions, outputs.failed_ranks
        for key, position, rank in zip(*(column.tolist() for column in failed), strict=True):
            assert key not in {**self.finish, **self.failed}, f"request {key} has ended already"
            assert key not in outputs.key_O
            self.failed[key] = position, rank

    def step(self) -> StepOutputs | None:
        """Plan a step, and commit it, or the one before it; None if there was nothing to do."""
        plan = self.plan()
        self._check()
        outputs = None
        if plan is None and not self.in_flight:
            self.now += 0.5  # it waits for something else than a step
        if self.in_flight and (plan is None or len(self.in_flight) > self.overlap):
            outputs = self.commit()
            self._check()
        return outputs

    def drain(self, max_steps: int = 10_000) -> None:
        """Step until nothing is left, and see that nothing is."""
        for _ in range(max_steps):
            self.step()
            if self.scheduler.idle:
                break
        assert self.scheduler.idle, f"not idle after {max_steps} steps: {self.scheduler.stats()}"
        stats = self.scheduler.stats()
        assert all(used == [0] * self.config.num_ranks for used in stats["blocks_used"].values()), stats
        assert all(not rank.slots for rank in self.ranks)

    def admitted(self, plan: StepPlan) -> list[int]:
        """Keys admitted by a plan (`make_request` makes the seed the key)."""
        return plan.admit_sampling_A["seed"].tolist()


def check(cluster, request, begun=()):
    """Check that a request has been answered as it should be; `begun`: what a fork was given."""
    assert (cluster.tokens[request.key], cluster.finish[request.key]) == expected_output(request, cluster.config, begun)


def serve(cluster, key, length, **values):
    """Serve one request, which is answered as it should be: its cached tokens."""
    request = make_request(key, length, **{"shared": 1000, "max_tokens": 1, "ignore_eos": True, **values})
    cluster.submit(request)
    cluster.drain()
    check(cluster, request)
    return cluster.num_cached[key]
