"""One rank's step: apply the plan, run the model, sample, answer.

S scheduled slots, O sampled tokens, V vocabulary.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from expertwire.engine.kv_cache.caches import NamedCache, copy_blocks
from expertwire.engine.models.decoder import Decoder
from expertwire.engine.rank_loop import Launched
from expertwire.engine.runner import logprobs
from expertwire.engine.runner.batch import ForwardBatch, in_parts, of_prompt
from expertwire.engine.runner.routed_experts import NOTHING, RoutedCounts
from expertwire.engine.runner.slot_states import Scheduled
from expertwire.engine.runner.slots import Slots
from expertwire.kernels.ops import sampling
from expertwire.moe.eplb.mover import ExpertMover
from expertwire.scheduler.plan import ExpertMoves, StepPlan, StepResult


class Runner:
    """Runs plans on one rank.

    Args:
        num_parts: in which a step is computed, so that one computes while the others' tokens travel.
        mover: carries out what plans say of experts; None if they never move.
    """

    depth = 1  # the host computes

    def __init__(
        self,
        *,
        model: Decoder,
        caches: list[NamedCache],
        slots: Slots,
        rank: int,
        num_parts: int = 1,
        mover: ExpertMover | None = None,
    ) -> None:
        self._model, self._caches, self._slots, self._rank, self._mover = model, caches, slots, rank, mover
        self._num_parts = num_parts

    @torch.inference_mode()
    def warm_up(self, num_ranks: int, max_num_batched_tokens: int) -> None:
        """Compute one token, then two, into the null block, on all ranks together: what is compiled or allocated on first use
        is so before anyone waits for it."""
        slots = self._slots
        for num in range(1, min(2, max_num_batched_tokens) + 1):
            null_CW = np.zeros((len(self._caches), num), np.int32)
            batch = of_prompt([0] * num, 0, null_CW, slots.block_size, [num] * num_ranks, slots.device)
            self._model.logits(self._model.forward([batch] * self._num_parts, self._caches)).argmax(dim=-1)
        self._model.take_expert_load()

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Launched:
        """Apply the plan and build the batch; see `rank_loop.Steps`. All ranks of the group call it with the same plan."""
        mine = plan.rank(self._rank)
        self._slots.apply(mine)
        copy_blocks(self._caches, mine, self._slots.upload)
        load = self._model.take_expert_load() if plan.report_load else np.zeros(0, np.int64)
        answer = {"step": plan.step, "rank": self._rank, "expert_load": load}
        if not plan.num_tokens_P.any():
            return Launched(partial(self._idle, plan.moves, answer))
        parts = self._slots.schedule(mine, self._num_parts)
        tokens_P = in_parts(plan.num_tokens_P.tolist(), self._num_parts)
        routed = [RoutedCounts.of(self._slots, part, self._model.config) for part in parts]
        batches = [
            self._slots.batch(part, num_tokens_P, None if counts is None else counts.add)
            for part, num_tokens_P, counts in zip(parts, tokens_P, routed, strict=True)
        ]
        asked = [counts for counts in routed if counts is not None]
        return Launched(partial(self._finish, plan.moves, answer, batches, Scheduled.joined(parts), asked))

    def _idle(self, moves: ExpertMoves | None, answer: dict[str, Any]) -> StepResult:
        nothing: dict[str, Any] = logprobs.no_tokens() | logprobs.no_prompt_rows()
        return StepResult(**answer, move_us=self._move(moves), forward_us=0, **nothing)

    def _move(self, moves: ExpertMoves | None) -> int:
        """How long it took, in µs."""
        if moves is None:
            return 0
        assert self._mover is not None, f"layer {moves.layer} shall move, but nothing is prepared for that"
        return self._mover.move(moves)

    @torch.inference_mode()
    def _finish(
        self,
        moves: ExpertMoves | None,
        answer: dict[str, Any],
        batches: list[ForwardBatch],
        step: Scheduled,
        asked: list[RoutedCounts],
    ) -> StepResult:
        answer |= {"move_us": self._move(moves)}
        started = time.perf_counter()
        hidden_TD = self._model.forward(batches, self._caches)
        prompt_rows: dict[str, Any] = self._prompt_logprobs(hidden_TD, step)
        outputs: dict[str, Any] = logprobs.no_tokens()
        if len(step.slot_O):
            rows_O = torch.from_numpy(step.last_row_B[step.sampled_B])
            outputs = self._sample(hidden_TD[rows_O], step.slot_O.astype(np.int32))
        elapsed_us = int((time.perf_counter() - started) * 1e6)
        routed = np.concatenate([NOTHING, *(counts.entries(counts.tokens_LOE.numpy(force=True)) for counts in asked)])
        return StepResult(**answer, forward_us=elapsed_us, **outputs, **prompt_rows, routed=routed)

    def _sample(self, x_OD: Tensor, slots_O: np.ndarray) -> dict[str, np.ndarray]:
        state = self._slots.sampling[slots_O]
        logits_OV = self._model.logits(x_OD)
        raw_OV = logits_OV.clone() if (state["logprobs"] >= 0).any() else logits_OV
        self._slots.adjust(logits_OV, slots_O)
        token_O = self._draw(logits_OV, slots_O, state)
        self._slots.append(slots_O, token_O)
        return {"slot_O": slots_O, "token_O": token_O, **_logprobs(raw_OV, token_O, state["logprobs"])}

    def _draw(self, logits_OV: Tensor, slots_O: np.ndarray, state: np.ndarray) -> np.ndarray:
        if not state["temperature"].any():
            return logits_OV.argmax(dim=-1).cpu().numpy().astype(np.int32)
        uniform_O = sampling.uniform(state["seed"], state["branch"], self._slots.num_tokens[slots_O])
        columns = [state[name].astype(dtype) for name, dtype in sampling.PARAMETERS.items()]
        on_device = (torch.from_numpy(column).to(logits_OV.device) for column in (*columns, uniform_O))
        token_O = sampling.reference(logits_OV, *on_device)
        return token_O.cpu().numpy().astype(np.int32)

    def _prompt_logprobs(self, hidden_TD: Tensor, step: Scheduled) -> dict[str, np.ndarray]:
        """Rows for every prompt token computed in this step whose successor is a prompt token too."""
        rows = logprobs.prompt_rows(self._slots.sampling, step)
        if rows is None:
            return logprobs.no_prompt_rows()
        row_X, slot_X, position_X = rows
        logits_XV = self._model.logits(hidden_TD[torch.from_numpy(row_X)])
        num_top_X = self._slots.sampling["prompt_logprobs"][slot_X]
        found = _logprobs(logits_XV, self._slots.tokens[slot_X, position_X], num_top_X)
        return logprobs.prompt_fields(slot_X, position_X, found)


def _logprobs(logits_OV: Tensor, token_O: np.ndarray, num_top_O: np.ndarray) -> dict[str, np.ndarray]:
    """The log-probability fields of a result; rows with num_top -1 have not asked."""
    found = logprobs.of(logits_OV, torch.from_numpy(token_O).to(logits_OV.device), num_top_O)
    return logprobs.fields([tensor.cpu().numpy() for tensor in found], num_top_O, logits_OV.shape[1])
