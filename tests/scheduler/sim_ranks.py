"""Simulated ranks: they apply plans as a worker does, check all that a worker relies on, and sample tokens by hashing.

What they hash is read back from simulated caches through the block tables, so a wrong block table, a block given to two
requests or a skipped token changes the outputs or fails at once. `expected_output` is the same without any scheduler.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from expertwire.scheduler.config import SchedulerConfig
from expertwire.scheduler.plan import CacheSpec, FinishReason, RankPlan, StepPlan, StepResult
from expertwire.scheduler.request import Request
from expertwire.scheduler.sampling_params import SamplingParams
from expertwire.scheduler.scheduler import Scheduler, StepOutputs

CACHES = tuple(
    CacheSpec(name=name, kind="full", bytes_per_token=4, writers=(0,), readers=(0,)) for name in ("first", "second")
)


def make_config(**changes) -> SchedulerConfig:
    """Small, with end-of-sequence ids 0 and 1 of a vocabulary of 50."""
    sizes = {
        "num_ranks": 2,
        "max_running": 3,
        "max_num_tokens": 8,
        "max_model_len": 32,
        "block_size": 4,
        "num_blocks": 17,
        "max_waiting": 100,
        "eos_token_ids": (0, 1),
        "vocab_size": 50,
    }
    return SchedulerConfig(**{**sizes, **changes})


def make_request(key: int, length: int = 5, *, branch: int = 0, **params) -> Request:
    """The seed is the key, and the prompt is drawn from it."""
    prompt = np.random.default_rng(key).integers(2, 50, length).astype(np.int32)
    return Request(key=key, prompt=prompt, params=SamplingParams(**params), branch=branch, seed=key)


def fake_token(tokens: list[int], seed: int, branch: int, vocab_size: int, bans: set[int]) -> int:
    """The token that follows `tokens`: a hash, moved on past the banned ids."""
    state = seed * 31 + branch
    for token in tokens:
        state = (state * 1_000_003 + token + 1) % (2**61 - 1)
    token = state % vocab_size
    while token in bans:
        token = (token + 1) % vocab_size
    return token


def expected_output(request: Request, config: SchedulerConfig) -> tuple[list[int], FinishReason]:
    """What a request must answer, by the definition of its parameters."""
    params, tokens, output = request.params, request.prompt.tolist(), []
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
    num_computed: int = 0
    blocks: list[list[int]] = field(default_factory=lambda: [[] for _ in CACHES])


class SimRank:
    """One rank: a slot table and a cache of one integer a token for each of `CACHES`."""

    def __init__(self, rank: int, config: SchedulerConfig) -> None:
        self.rank = rank
        self.config = config
        self.slots: dict[int, Slot] = {}
        self.owners: list[dict[int, int]] = [{} for _ in CACHES]
        self.caches = np.full((len(CACHES), config.num_blocks, config.block_size), -1, np.int64)

    def run(self, plan: StepPlan) -> StepResult:
        """Apply this rank's slice and answer."""
        mine = plan.rank(self.rank)
        assert plan.num_tokens_P[self.rank] == mine.sched_num_S.sum() <= self.config.max_num_tokens
        self._update_slots(mine)
        self._check_no_decode_is_left_out(mine)
        outputs, prompts = [], []
        assert len(set(mine.sched_slot_S.tolist())) == len(mine.sched_slot_S), "a slot is scheduled twice"
        for index, start, num, sample in zip(
            mine.sched_slot_S.tolist(), mine.sched_start_S, mine.sched_num_S, mine.sched_sample_S, strict=True
        ):
            prompts += self._compute(index, int(start), int(num))
            if sample:
                outputs.append(self._sample(index))
            assert sample == (self.slots[index].num_computed == len(self.slots[index].tokens) - sample)
        return self._result(plan.step, outputs, prompts)

    def _update_slots(self, mine: RankPlan) -> None:
        for index in mine.release_slot.tolist():
            slot = self.slots.pop(index)
            for owners, blocks in zip(self.owners, slot.blocks, strict=True):
                for block in blocks:
                    assert owners.pop(block) == index
        for i, index in enumerate(mine.admit_slot_A.tolist()):
            assert index not in self.slots, f"slot {index} is in use"
            assert 0 <= index < self.config.max_running
            self.slots[index] = Slot(
                sampling=mine.admit_sampling_A[i].copy(),
                tokens=mine.admit_tokens[i].tolist(),
                bans=set(mine.admit_bans[i].tolist()),
                bias=dict(zip(mine.admit_bias_ids[i].tolist(), mine.admit_bias_values[i].tolist(), strict=True)),
            )
        for index, cache, position, block in zip(
            mine.block_slot_B.tolist(), mine.block_cache_B, mine.block_index_B, mine.block_id_B.tolist(), strict=True
        ):
            assert 0 < block < self.config.num_blocks, f"block {block}: the null block, or there is none such"
            assert block not in self.owners[cache], f"block {block} belongs to slot {self.owners[cache][block]}"
            assert position == len(self.slots[index].blocks[cache]), "block tables grow at their end"
            self.owners[cache][block] = index
            self.slots[index].blocks[cache].append(block)

    def _check_no_decode_is_left_out(self, mine: RankPlan) -> None:
        scheduled = set(mine.sched_slot_S.tolist())
        for index, slot in self.slots.items():
            if len(slot.tokens) - slot.num_computed == 1:
                assert index in scheduled, f"slot {index} waits for one token only"

    def _compute(self, index: int, start: int, num: int) -> list[tuple]:
        """Write tokens [start, start + num) into the caches; the rows of prompt log-probabilities, if asked for."""
        slot = self.slots[index]
        assert start == slot.num_computed
        assert num > 0
        assert start + num <= len(slot.tokens)
        for position in range(start, start + num):
            for cache, blocks in zip(self.caches, slot.blocks, strict=True):
                cache[blocks[position // self.config.block_size], position % self.config.block_size] = slot.tokens[
                    position
                ]
        slot.num_computed += num
        for blocks in slot.blocks:
            assert len(blocks) == -(-slot.num_computed // self.config.block_size), "more blocks than the tokens need"
        count = int(slot.sampling["prompt_logprobs"])
        predicted = range(start + 1, min(start + num + 1, int(slot.sampling["prompt_len"])))
        return [(index, p, slot.tokens[p], count) for p in predicted] if count >= 0 else []

    def _sample(self, index: int) -> tuple:
        slot = self.slots[index]
        for cache, blocks in zip(self.caches, slot.blocks, strict=True):
            assert cache[blocks].reshape(-1)[: slot.num_computed].tolist() == slot.tokens, (
                "the cache holds other tokens"
            )
        sampling = slot.sampling
        outputs_so_far = len(slot.tokens) - int(sampling["prompt_len"])
        bans = slot.bans if outputs_so_far < sampling["min_tokens"] else set()
        seed, branch = int(sampling["seed"]), int(sampling["branch"])
        token = fake_token(slot.tokens, seed, branch, self.config.vocab_size, bans)
        slot.tokens.append(token)
        return index, token, int(sampling["logprobs"])

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
            prompt_logprob=np.array([-token for _, _, token, _ in prompts], np.float32),
            prompt_token_rank=np.ones(len(prompts), np.int32),
            prompt_top_offsets=np.cumsum([0, *prompt_counts]).astype(np.int32),
            prompt_top_ids=np.array(prompt_top_ids, np.int32),
            prompt_top_logprobs=-np.array(prompt_top_ids, np.float32),
            expert_load=np.zeros(0, np.int64),
        )


class SimCluster:
    """A scheduler and its ranks; collects what every request is answered."""

    def __init__(self, config: SchedulerConfig, policy=None) -> None:
        self.config = config
        self.scheduler = Scheduler(config, CACHES, policy)
        self.ranks = [SimRank(rank, config) for rank in range(config.num_ranks)]
        self.plans: list[StepPlan] = []
        self.in_flight: StepPlan | None = None
        self.tokens: dict[int, list[int]] = {}
        self.finish: dict[int, FinishReason] = {}
        self.now = 0.0

    def submit(self, *requests: Request) -> None:
        for request in requests:
            rejection = self.scheduler.submit(request, self.now)
            assert rejection is None, rejection
            self.tokens[request.key] = []

    def plan(self) -> StepPlan | None:
        self.in_flight = self.scheduler.plan(self.now)
        if self.in_flight is not None:
            self.plans.append(StepPlan.from_arrays(self.in_flight.to_arrays()))
        return self.in_flight

    def commit(self) -> StepOutputs:
        # Ranks see what came over a channel, and answer in any order.
        results = [rank.run(self.plans[-1]) for rank in self.ranks]
        outputs = self.scheduler.commit(self.in_flight, results[::-1], self.now)
        self.in_flight = None
        for key, token, finish in zip(
            outputs.key_O.tolist(), outputs.token_O.tolist(), outputs.finish_O.tolist(), strict=True
        ):
            assert key not in self.finish, f"request {key} has ended already"
            self.tokens[key].append(token)
            if finish:
                self.finish[key] = FinishReason(finish)
        self.now += 0.01
        return outputs

    def step(self) -> StepOutputs | None:
        plan = self.plan()
        self.scheduler.check_integrity()
        outputs = None if plan is None else self.commit()
        self.scheduler.check_integrity()
        return outputs

    def drain(self, max_steps: int = 10_000) -> None:
        """Step until nothing is left, and see that nothing is."""
        for _ in range(max_steps):
            if self.step() is None:
                break
        assert self.scheduler.idle, f"not idle after {max_steps} steps: {self.scheduler.stats()}"
        stats = self.scheduler.stats()
        for name in ("blocks_used", "blocks_reserved"):
            assert stats[name] == {spec.name: [0] * self.config.num_ranks for spec in CACHES}
        assert all(not rank.slots for rank in self.ranks)

    def admitted(self, plan: StepPlan) -> list[int]:
        """Keys admitted by a plan (`make_request` makes the seed the key)."""
        return plan.admit_sampling_A["seed"].tolist()
