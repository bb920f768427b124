"""One rank's step: apply the plan, run the model, sample, answer.

S scheduled slots, O sampled tokens, V vocabulary.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import Tensor

from expertwire.engine.batch import ForwardBatch
from expertwire.engine.caches import PagedKv
from expertwire.engine.decoder import Decoder
from expertwire.engine.slots import Slots
from expertwire.kernels import attention, sampling
from expertwire.scheduler.plan import RankPlan, StepPlan, StepResult

_I32, _F32 = np.zeros(0, np.int32), np.zeros(0, np.float32)


class Runner:
    """Runs plans on one rank."""

    def __init__(self, *, model: Decoder, caches: list[PagedKv], slots: Slots, rank: int) -> None:
        self._model, self._caches, self._slots, self._rank = model, caches, slots, rank

    @torch.inference_mode()
    def warm_up(self, num_ranks: int, max_num_tokens: int) -> None:
        """Compute one token, then two, into the null block, on all ranks together: what is compiled or allocated on first use
        is so before anyone waits for it."""
        block_size, device = self._caches[0].k.shape[1], self._caches[0].k.device
        for num in range(1, min(2, max_num_tokens) + 1):
            table = np.zeros((1, num), np.int32)
            positions_T = torch.arange(num, device=device)
            batch = ForwardBatch(
                token_ids_T=torch.zeros_like(positions_T),
                positions_T=positions_T,
                slot_mapping_T=positions_T % block_size,
                sequences=attention.describe(np.array([0, num]), np.array([num]), table, block_size, str(device)),
                num_tokens_P=[num] * num_ranks,
            )
            self._model.logits(self._model.forward(batch, self._caches)).argmax(dim=-1)
        self._model.take_expert_load()

    @torch.inference_mode()
    def step(self, plan: StepPlan) -> StepResult:
        """Do this rank's part of the plan. All ranks of the group call it with the same plan."""
        mine = plan.rank(self._rank)
        self._slots.apply(mine)
        self._copy_blocks(mine)
        load = self._model.take_expert_load() if plan.report_load else np.zeros(0, np.int64)
        answer = {"step": plan.step, "rank": self._rank, "expert_load": load}
        if not plan.num_tokens_P.any():
            return StepResult(**answer, forward_us=0, **_sampled_nothing(), **_no_prompt_rows())
        batch, order, last_rows = self._slots.batch(mine, plan.num_tokens_P.tolist())
        started = time.perf_counter()
        hidden_TD = self._model.forward(batch, self._caches)
        prompt_rows = self._prompt_logprobs(hidden_TD, mine, order, last_rows)
        sampled = mine.sched_sample_S[order] != 0
        slots_O = mine.sched_slot_S[order][sampled]
        outputs = (
            self._sample(hidden_TD[torch.from_numpy(last_rows[sampled])], slots_O)
            if len(slots_O)
            else _sampled_nothing()
        )
        elapsed_us = int((time.perf_counter() - started) * 1e6)
        return StepResult(**answer, forward_us=elapsed_us, **outputs, **prompt_rows)

    def _copy_blocks(self, mine: RankPlan) -> None:
        if not len(mine.copy_to_C):
            return
        assert not mine.copy_cache_C.any(), f"only cache 0 exists, plan names {np.unique(mine.copy_cache_C)}"
        source_C, target_C = (torch.from_numpy(ids.astype(np.int64)) for ids in (mine.copy_from_C, mine.copy_to_C))
        for cache in self._caches:
            for blocks in (cache.k, cache.v):
                blocks[target_C] = blocks[source_C]

    def _sample(self, x_OD: Tensor, slots_O: np.ndarray) -> dict[str, np.ndarray]:
        state = self._slots.sampling[slots_O]
        logits_OV = self._model.logits(x_OD)
        raw_OV = logits_OV.clone() if (state["logprobs"] >= 0).any() else logits_OV
        self._adjust(logits_OV, slots_O, state)
        token_O = self._draw(logits_OV, slots_O, state)
        self._slots.append(slots_O, token_O)
        return {"slot_O": slots_O, "token_O": token_O, **_logprobs(raw_OV, token_O, state["logprobs"])}

    def _draw(self, logits_OV: Tensor, slots_O: np.ndarray, state: np.ndarray) -> np.ndarray:
        if not state["temperature"].any():
            return logits_OV.argmax(dim=-1).cpu().numpy().astype(np.int32)
        uniform_O = sampling.uniform(state["seed"], state["branch"], self._slots.num_tokens[slots_O])
        device = logits_OV.device

        def column(name: str, dtype: type) -> Tensor:
            return torch.from_numpy(state[name].astype(dtype)).to(device)

        token_O = sampling.reference(
            logits_OV,
            column("temperature", np.float32),
            column("top_k", np.int64),
            column("top_p", np.float32),
            column("min_p", np.float32),
            torch.from_numpy(uniform_O).to(device),
        )
        return token_O.cpu().numpy().astype(np.int32)

    def _adjust(self, logits_OV: Tensor, slots_O: np.ndarray, state: np.ndarray) -> None:
        """Penalties, bias and bans, in place, for the few rows that ask for them."""
        penalized = (
            (state["repetition_penalty"] != 1) | (state["presence_penalty"] != 0) | (state["frequency_penalty"] != 0)
        )
        for row, slot in enumerate(slots_O.tolist()):
            prompt_len, known = int(state["prompt_len"][row]), int(self._slots.num_tokens[slot])
            if penalized[row]:
                tokens = self._slots.tokens[slot, :known]
                sampling.penalize(
                    logits_OV[row],
                    tokens[:prompt_len],
                    tokens[prompt_len:],
                    repetition=float(state["repetition_penalty"][row]),
                    presence=float(state["presence_penalty"][row]),
                    frequency=float(state["frequency_penalty"][row]),
                )
            ids, values = self._slots.bias[slot]
            if len(ids):
                logits_OV[row, torch.from_numpy(ids.astype(np.int64))] += torch.from_numpy(values).to(logits_OV.device)
            bans = self._slots.bans[slot]
            if len(bans) and known - prompt_len < state["min_tokens"][row]:
                logits_OV[row, torch.from_numpy(bans.astype(np.int64))] = -torch.inf

    def _prompt_logprobs(
        self, hidden_TD: Tensor, mine: RankPlan, order: np.ndarray, last_rows: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Rows for every prompt token computed in this step whose successor is a prompt token too."""
        wanted = self._slots.sampling["prompt_logprobs"][mine.sched_slot_S]
        if not (wanted >= 0).any():
            return _no_prompt_rows()
        rows, slots, positions = [], [], []
        for i, last in zip(order.tolist(), last_rows.tolist(), strict=True):
            if wanted[i] < 0:
                continue
            slot, start, num = int(mine.sched_slot_S[i]), int(mine.sched_start_S[i]), int(mine.sched_num_S[i])
            count = min(num, int(self._slots.sampling["prompt_len"][slot]) - 1 - start)
            if count > 0:
                rows.append(np.arange(last - num + 1, last - num + 1 + count))
                slots.append(np.full(count, slot, np.int32))
                positions.append(np.arange(start + 1, start + 1 + count, dtype=np.int32))
        if not rows:
            return _no_prompt_rows()
        slot_X, position_X = np.concatenate(slots), np.concatenate(positions)
        logits_XV = self._model.logits(hidden_TD[torch.from_numpy(np.concatenate(rows))])
        num_top_X = self._slots.sampling["prompt_logprobs"][slot_X]
        found = _logprobs(logits_XV, self._slots.tokens[slot_X, position_X], num_top_X)
        return {
            "prompt_slot": slot_X,
            "prompt_position": position_X,
            "prompt_logprob": found["logprob_O"],
            "prompt_token_rank": found["token_rank_O"],
            "prompt_top_offsets": found["top_offsets_O1"],
            "prompt_top_ids": found["top_ids"],
            "prompt_top_logprobs": found["top_logprobs"],
        }


def _logprobs(logits_OV: Tensor, token_O: np.ndarray, num_top_O: np.ndarray) -> dict[str, np.ndarray]:
    """The log-probability fields of a result; rows with num_top -1 have not asked."""
    count = len(token_O)
    logprob_O, rank_O = np.full(count, np.nan, np.float32), np.zeros(count, np.int32)
    asked = np.flatnonzero(num_top_O >= 0)
    num_top = np.zeros(count, np.int64)
    top_ids, top_logprobs = _I32, _F32
    if len(asked):
        num_top[asked] = np.minimum(num_top_O[asked], logits_OV.shape[1])
        widest = int(num_top.max())
        tokens = torch.from_numpy(token_O[asked].astype(np.int64)).to(logits_OV.device)
        found = sampling.token_logprobs(logits_OV[torch.from_numpy(asked)], tokens, widest)
        logprob_O[asked], rank_O[asked] = found[0].cpu().numpy(), found[1].cpu().numpy()
        kept = np.arange(widest) < num_top[asked, None]
        top_ids = found[2].cpu().numpy().astype(np.int32)[kept]
        top_logprobs = found[3].cpu().numpy()[kept]
    return {
        "logprob_O": logprob_O,
        "token_rank_O": rank_O,
        "top_offsets_O1": np.concatenate(([0], np.cumsum(num_top))).astype(np.int32),
        "top_ids": top_ids,
        "top_logprobs": top_logprobs,
    }


def _sampled_nothing() -> dict[str, np.ndarray]:
    return {
        "slot_O": _I32,
        "token_O": _I32,
        "logprob_O": _F32,
        "token_rank_O": _I32,
        "top_offsets_O1": np.zeros(1, np.int32),
        "top_ids": _I32,
        "top_logprobs": _F32,
    }


def _no_prompt_rows() -> dict[str, np.ndarray]:
    return {
        "prompt_slot": _I32,
        "prompt_position": _I32,
        "prompt_logprob": _F32,
        "prompt_token_rank": _I32,
        "prompt_top_offsets": np.zeros(1, np.int32),
        "prompt_top_ids": _I32,
        "prompt_top_logprobs": _F32,
    }
