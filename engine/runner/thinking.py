"""Control of reasoning in the slots of a rank: what `kernels.ops.thinking` keeps of them, on the device.

The state of a slot follows from its tokens: the host tells it when a request is admitted, and also when a preempted one comes
back; from then on the device keeps it, so that the next step may be launched before the host has seen a token.

O sampled rows, A admitted requests, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from expertwire.engine.config.thinking import ThinkingIds
from expertwire.kernels.ops import thinking
from expertwire.kernels.ops.thinking import NO_BUDGET, STATE_SIZE, ThinkingTokens, state_of
from expertwire.scheduler.plan import RankPlan


class Thinking:
    """The slots' reasoning.

    Args:
        ids: the model's tokens of reasoning.
        eos_token_ids: tokens that end an output.
        max_num_seqs: number of slots.
        vocab_size: tokens that the model may sample.
        device: of the states.
    """

    def __init__(
        self, ids: ThinkingIds, eos_token_ids: Sequence[int], *, max_num_seqs: int, vocab_size: int, device: str
    ) -> None:
        assert ids.fits(vocab_size), f"{ids.start} and {ids.end} do not fit a vocabulary of {vocab_size}"
        self._ids, self._sentence_ends = ids, frozenset(ids.sentence_ends)
        self._tokens = ThinkingTokens(
            start=torch.tensor(ids.start, device=device),
            end=ids.end,
            wait=-1 if ids.wait is None else ids.wait,
            ends_V=_mask((ids.end, *eos_token_ids), vocab_size).to(device),
            ends_sentence_V=_mask(ids.sentence_ends, vocab_size).to(device),
        )
        self._states = torch.zeros((max_num_seqs, STATE_SIZE), dtype=torch.int32, device=device)
        self._is_controlled = np.zeros(max_num_seqs, bool)

    def admit(self, plan: RankPlan) -> list[np.ndarray]:
        """Take note of admitted requests; return the arrays to upload for `write`: slots i64 and their states i32."""
        records = plan.admit_sampling_A
        self._is_controlled[plan.admit_slot_A] = (records["thinking_budget"] >= 0) | (
            records["min_thinking_tokens"] > 0
        )
        slots, states = [], []
        is_own = plan.admit_source_A == plan.admit_slot_A  # `follow` gives the others their leaders'
        for i in np.flatnonzero(self._is_controlled[plan.admit_slot_A] & is_own).tolist():
            tokens, prompt_len = plan.admit_tokens[i], int(records["prompt_len"][i])
            output, is_open = tokens[prompt_len:].tolist(), self._ids.opens(tokens[:prompt_len])
            states.append(state_of(output, self._ids.start, self._ids.end, self._sentence_ends, is_open=is_open))
            slots.append(plan.admit_slot_A[i])
        return [np.array(slots, np.int64), np.array(states, np.int32).reshape(-1, STATE_SIZE)]

    def write(self, slots: Tensor, states: Tensor) -> None:
        """Set states on the device; the arrays of `admit`, uploaded."""
        if slots.numel():
            self._states.index_copy_(0, slots, states)

    def follow(self, followers: Tensor, leaders: Tensor) -> None:
        """Set the states of slots on the device to those of other slots; i64."""
        self._states.index_copy_(0, followers, self._states.index_select(0, leaders))

    def limits(self, slot_O: np.ndarray, sampling: np.ndarray) -> list[np.ndarray]:
        """Return the arrays to upload for `keep_closed` and `control`, of all rows: slots, budgets, budgets with grace, minima.

        Nothing if none is controlled. `sampling`: the slots' sampling parameters.
        """
        if not self._is_controlled[slot_O].any():
            return []
        state = sampling[slot_O]
        budget_O = np.where(state["thinking_budget"] < 0, NO_BUDGET, state["thinking_budget"])
        most_O = np.minimum(budget_O.astype(np.int64) + state["thinking_grace"], NO_BUDGET)
        columns = budget_O, most_O, state["min_thinking_tokens"]
        return [slot_O.astype(np.int64), *(column.astype(np.int32) for column in columns)]

    def keep_closed(self, logits_OV: Tensor, limits: Sequence[Tensor]) -> None:
        """Ban tokens, in place; `limits` uploaded."""
        if limits:
            slot_O, budget_O, *_ = limits
            thinking.keep_closed(logits_OV, self._states.index_select(0, slot_O), budget_O, self._tokens)

    def control(self, token_O: Tensor, limits: Sequence[Tensor]) -> Tensor:
        """Return the tokens that take the place of the drawn ones, i64, and keep the states behind them."""
        if not limits:
            return token_O
        slot_O, budget_O, most_O, minimum_O = limits
        state_O3 = self._states.index_select(0, slot_O)
        token_O, state_O3 = thinking.reference(token_O, state_O3, budget_O, most_O, minimum_O, self._tokens)
        self._states.index_copy_(0, slot_O, state_O3)
        return token_O


def _mask(ids: Sequence[int], vocab_size: int) -> Tensor:
    """Return a bool [V] that is true for these ids; those beyond the vocabulary are never sampled."""
    mask = torch.zeros(vocab_size, dtype=torch.bool)
    mask[torch.tensor([token for token in ids if token < vocab_size], dtype=torch.int64)] = True
    return mask
