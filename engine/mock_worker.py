"""A rank without a model, `load_format` "mock": it answers plans at once, with pseudo-random tokens.

Scheduler, controller and fronts are the real ones, so that they and their clients can be measured alone. No weights are read, no
cache is allocated, and torch is not imported. A token is a function of (seed, branch, position) alone: neither the prompt nor the
other sampling parameters count, but for `min_tokens`, before which no end is drawn. The sampled token is the most probable one,
and the token in place k of the most probable ones has the probability 2**-k.

S sequences, A admitted requests, O sampled rows, Z slots, K experts a token.
"""

from __future__ import annotations

import contextlib
import math
import time
from functools import partial

import numpy as np

from expertwire.comm.control.channel import ChannelClosed, ControlLink
from expertwire.engine.config.engine_config import EngineConfig
from expertwire.engine.models.model_config import ModelConfig
from expertwire.engine.models.registry import read_model_config
from expertwire.engine.rank_loop import Launched, serve
from expertwire.scheduler.plan import RankPlan, StepPlan, StepResult, pack_lists, positions_in_lists, to_offsets
from expertwire.scheduler.sampling_params import SAMPLING_DTYPE

MOCK_WORKER = "expertwire.engine.mock_worker:worker_main"
DEVICE = "mock"  # in place of "cpu" or "cuda"
_CACHE_BYTES = 2**60  # as many as are wanted, as they are not allocated
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def worker_main(config: EngineConfig, rank: int, num_ranks: int, address: str, token: str, node: str, gpu: int) -> None:
    """Run rank `rank` until the controller closes the connection; the entry point of launchers, as `worker.worker_main`."""
    link = ControlLink(address, token, rank=rank, node=node, hello={})
    with contextlib.closing(link), contextlib.suppress(ChannelClosed):
        try:
            _join(link, config, node)
            serve(link, MockSteps(config, rank))
        except Exception as error:
            link.fail(repr(error))
            raise


def _join(link: ControlLink, config: EngineConfig, node: str) -> None:
    """Exchange the messages that `worker` describes."""
    place_2 = np.zeros(2 if config.num_redundant_experts else 0, np.int64)
    nothing = np.zeros(0, np.uint8)
    answers: tuple[dict[str, np.ndarray], ...] = (
        {"node": np.frombuffer(node.encode(), np.uint8), "store": nothing},
        {"device": np.frombuffer(DEVICE.encode(), np.uint8), "all_to_all": nothing, "place": place_2},
        {"cache_bytes": np.array([_CACHE_BYTES])},
        {},
    )
    for answer in answers:
        link.recv()
        link.send(answer)


class MockSteps:
    """The steps of a rank that computes nothing; `rank_loop.Steps`.

    Args:
        config: options; a step with tokens takes at least `mock_step_time_s`.
        rank: the rank.
    """

    depth = 1

    def __init__(self, config: EngineConfig, rank: int) -> None:
        self._model: ModelConfig = read_model_config(
            config.model, config.dtype, config.kv_cache_dtype, config.snapshot_every
        )
        self._rank, self._step_time_s = rank, config.mock_step_time_s
        self._sampling_Z = np.zeros(config.max_num_seqs, SAMPLING_DTYPE)
        self._bans: dict[int, frozenset[int]] = {}  # by slot
        self._prompts: dict[int, np.ndarray] = {}  # of the slots that ask for log-probabilities of the prompt
        self._num_unreported = 0  # tokens computed since the last report of expert loads

    def launch(self, plan: StepPlan) -> Launched:
        """See `rank_loop.Steps`."""
        return Launched(partial(self._step, plan))

    def _step(self, plan: StepPlan) -> StepResult:
        started = time.perf_counter()
        rank_plan = plan.rank(self._rank)
        self._admit(rank_plan)
        load = self._take_expert_load() if plan.report_load else np.zeros(0, np.int64)
        self._num_unreported += int(rank_plan.sched_num_S.sum())
        sampled_S = rank_plan.sched_sample_S != 0
        slot_O = rank_plan.sched_slot_S[sampled_S]
        position_O = (rank_plan.sched_start_S + rank_plan.sched_num_S)[sampled_S]
        token_O = self._sample(slot_O, position_O)
        count_O = self._sampling_Z["logprobs"][slot_O]
        prompt_slot, prompt_position, predicted = self._prompt_rows(rank_plan)
        tops = self._most_probable(token_O, count_O)
        prompt_tops = self._most_probable(predicted, self._sampling_Z["prompt_logprobs"][prompt_slot])
        if plan.num_tokens_P.any() and (rest_s := started + self._step_time_s - time.perf_counter()) > 0:
            time.sleep(rest_s)
        return StepResult(
            step=plan.step,
            rank=self._rank,
            forward_us=int((time.perf_counter() - started) * 1e6),
            expert_load=load,
            slot_O=slot_O,
            token_O=token_O,
            logprob_O=np.where(count_O >= 0, -math.log(2), np.nan).astype(np.float32),
            token_rank_O=(count_O >= 0).astype(np.int32),
            top_offsets_O1=tops[0],
            top_ids=tops[1],
            top_logprobs=tops[2],
            prompt_slot=prompt_slot,
            prompt_position=prompt_position,
            prompt_logprob=np.full(len(prompt_slot), -math.log(2), np.float32),
            prompt_token_rank=np.ones(len(prompt_slot), np.int32),
            prompt_top_offsets=prompt_tops[0],
            prompt_top_ids=prompt_tops[1],
            prompt_top_logprobs=prompt_tops[2],
            routed=self._routed(rank_plan),
        )

    def _admit(self, plan: RankPlan) -> None:
        self._sampling_Z[plan.admit_slot_A] = plan.admit_sampling_A
        for slot, record, tokens, bans in zip(
            plan.admit_slot_A.tolist(), plan.admit_sampling_A, plan.admit_tokens, plan.admit_bans, strict=True
        ):
            self._bans.pop(slot, None)
            self._prompts.pop(slot, None)
            if len(bans):
                self._bans[slot] = frozenset(bans.tolist())
            if record["prompt_logprobs"] >= 0:
                self._prompts[slot] = tokens[: record["prompt_len"]].copy()

    def _sample(self, slot_O: np.ndarray, position_O: np.ndarray) -> np.ndarray:
        """Return the tokens, i32 [O]; one that is banned gives way to the next id that is not."""
        state_O, vocab = self._sampling_Z[slot_O], self._model.vocab_size
        token_O = (draw(state_O["seed"], state_O["branch"], position_O) % np.uint64(vocab)).astype(np.int32)
        if self._bans:
            begins_O = position_O - state_O["prompt_len"] < state_O["min_tokens"]
            for row in np.flatnonzero(begins_O).tolist():
                bans, token = self._bans.get(int(slot_O[row]), frozenset()), int(token_O[row])
                while token in bans:
                    token = (token + 1) % vocab
                token_O[row] = token
        return token_O

    def _prompt_rows(self, plan: RankPlan) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return slot, position and token of each prompt token that this step predicts for a slot that asks, i32."""
        slots, positions, tokens = [], [], []
        if self._prompts:
            scheduled = zip(
                plan.sched_slot_S.tolist(), plan.sched_start_S.tolist(), plan.sched_num_S.tolist(), strict=True
            )
            for slot, start, num in scheduled:
                if (prompt := self._prompts.get(slot)) is not None:
                    tokens.append(prompt[start + 1 : start + num + 1])
                    positions.append(np.arange(start + 1, start + 1 + len(tokens[-1])))
                    slots.append(np.full(len(tokens[-1]), slot))
        return pack_lists(slots, np.int32)[0], pack_lists(positions, np.int32)[0], pack_lists(tokens, np.int32)[0]

    def _most_probable(self, token_O: np.ndarray, count_O: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the offsets of the most probable tokens, the tokens and their log-probabilities."""
        count_O = np.maximum(count_O, 0)
        place = positions_in_lists(count_O)
        ids = (token_O.repeat(count_O) + place) % self._model.vocab_size
        return to_offsets(count_O), ids.astype(np.int32), (-math.log(2) * (place + 1)).astype(np.float32)

    def _routed(self, plan: RankPlan) -> np.ndarray:
        """Return `StepResult.routed`: the token at position p goes to the experts p, p + 1, ... of every sparse layer."""
        experts, parts = self._model.num_experts, []
        from_S = self._sampling_Z["experts_from"][plan.sched_slot_S]
        for row in np.flatnonzero(from_S >= 0).tolist():
            start, end = int(plan.sched_start_S[row]), int(plan.sched_start_S[row] + plan.sched_num_S[row])
            positions = np.arange(max(start, int(from_S[row])), end)
            chosen_K = np.arange(self._model.top_k)
            tokens = np.bincount(((positions[:, None] + chosen_K) % experts).reshape(-1), minlength=experts)
            found = np.flatnonzero(tokens)
            for layer in np.flatnonzero(self._model.sparse_layers).tolist():
                columns = np.full(len(found), plan.sched_slot_S[row]), layer * experts + found, tokens[found]
                parts.append(np.stack(columns, axis=1).reshape(-1))
        return pack_lists(parts, np.int32)[0]

    def _take_expert_load(self) -> np.ndarray:
        """Return the tokens of each expert since the last report, i64 [layers * experts]: as even as can be."""
        model, rows = self._model, self._num_unreported * self._model.top_k
        self._num_unreported = 0
        load = np.zeros((model.num_layers, model.num_experts), np.int64)
        if model.num_experts:
            load[list(model.sparse_layers)] = np.diff(np.arange(model.num_experts + 1) * rows // model.num_experts)
        return load.reshape(-1)


def draw(seed: np.ndarray, branch: np.ndarray, position: np.ndarray) -> np.ndarray:
    """Return pseudo-random u64 of the seeds (i64), branches and positions."""
    begun = _mix(seed.astype(np.uint64) + branch.astype(np.uint64) * _GOLDEN)
    return _mix(begun + position.astype(np.uint64) * _GOLDEN)


def _mix(values: np.ndarray) -> np.ndarray:
    """Return the finaliser of SplitMix64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
