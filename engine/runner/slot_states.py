"""What the host keeps of a rank's slots, wherever their tokens lie: counts, sampling parameters, and what changes logits.

S slots, C caches, T tokens of a step, B scheduled slots, O sampled tokens, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from expertwire.engine.runner.batch import in_parts
from expertwire.kernels.ops import sampling
from expertwire.scheduler.config import CacheSpec
from expertwire.scheduler.plan import RankPlan
from expertwire.scheduler.sampling_params import SAMPLING_DTYPE

_NONE = np.zeros(0, np.int32)


@dataclass(frozen=True, kw_only=True)
class Scheduled:
    """What a step, or a part of it, computes, in the order of its rows: sequences with one query first, as attention wants them.

    Attributes:
        slot_B: of each sequence; `slot_T`, `position_T` of each token.
        cu_seqlens_q: [B + 1]; `length_B`: with this step's tokens.
        sampled_B: bool, whether the sequence samples; `slot_O`: the slots of those.
    """

    slot_B: np.ndarray
    slot_T: np.ndarray
    position_T: np.ndarray
    cu_seqlens_q: np.ndarray
    length_B: np.ndarray
    sampled_B: np.ndarray
    slot_O: np.ndarray

    @classmethod
    def of(cls, slot_B: np.ndarray, start_B: np.ndarray, num_B: np.ndarray, sampled_B: np.ndarray) -> Scheduled:
        """Of sequences in any order: their first positions, how many tokens they compute, and whether they sample."""
        order_B = np.argsort(num_B != 1, kind="stable")
        slot_B, start_B, num_B, sampled_B = (values[order_B] for values in (slot_B, start_B, num_B, sampled_B))
        cu_seqlens_q = np.concatenate(([0], np.cumsum(num_B)))
        return cls(
            slot_B=slot_B,
            slot_T=np.repeat(slot_B, num_B),
            position_T=np.arange(cu_seqlens_q[-1]) - np.repeat(cu_seqlens_q[:-1] - start_B, num_B),
            cu_seqlens_q=cu_seqlens_q,
            length_B=start_B + num_B,
            sampled_B=sampled_B,
            slot_O=slot_B[sampled_B],
        )

    @classmethod
    def joined(cls, parts: Sequence[Scheduled]) -> Scheduled:
        """Of parts, one after another; a sequence that is in two of them stays two."""
        if len(parts) == 1:
            return parts[0]
        ends = np.cumsum([part.cu_seqlens_q[-1] for part in parts])
        cu_seqlens_q = [
            part.cu_seqlens_q[1:] + end - part.cu_seqlens_q[-1] for part, end in zip(parts, ends, strict=True)
        ]
        names = "slot_B", "slot_T", "position_T", "length_B", "sampled_B", "slot_O"
        values = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
        return cls(cu_seqlens_q=np.concatenate(([0], *cu_seqlens_q)), **values)

    @property
    def num_decodes(self) -> int:
        return int((np.diff(self.cu_seqlens_q) == 1).sum())

    @property
    def last_row_B(self) -> np.ndarray:
        """The row of each sequence's last token."""
        return self.cu_seqlens_q[1:] - 1


class SlotStates(ABC):
    """The part of a table of slots that is the same on every device; a table says where the tokens are (`known_tokens`)."""

    def __init__(self, num_slots: int, block_size: int, specs: Sequence[CacheSpec], device: str) -> None:
        self.block_size, self.device = block_size, device
        self.num_tokens = np.zeros(num_slots, np.int64)
        self.sampling = np.zeros(num_slots, SAMPLING_DTYPE)
        self._bans = [_NONE] * num_slots
        self._bias: list[tuple[np.ndarray, np.ndarray]] = [(_NONE, _NONE)] * num_slots
        self._adjusted = np.zeros(num_slots, bool)  # whether anything changes the slot's logits
        self._windows = [(cache, spec.window) for cache, spec in enumerate(specs) if spec.window is not None]
        self._num_slid_CS = np.zeros((len(specs), num_slots), np.int64)  # blocks of a slot that slid out of its window

    @abstractmethod
    def known_tokens(self, slot: int) -> Tensor:
        """i64, the prompt's and the sampled tokens, on the table's device."""

    def admit(self, plan: RankPlan) -> None:
        """Release and admit."""
        self.num_tokens[plan.release_slot] = 0
        for i, slot in enumerate(plan.admit_slot_A.tolist()):
            self.num_tokens[slot] = len(plan.admit_tokens[i])
            self.sampling[slot] = plan.admit_sampling_A[i]
            self.set_lists(slot, plan.admit_bans[i], plan.admit_bias_ids[i], plan.admit_bias_values[i])
        self.mark_adjusted(plan.admit_slot_A)
        self._num_slid_CS[:, plan.admit_slot_A] = 0

    def set_lists(self, slot: int, bans: np.ndarray, bias_ids: np.ndarray, bias_values: np.ndarray) -> None:
        """A slot's bans and biases; copies, as a plan's memory is reused."""
        self._bans[slot], self._bias[slot] = bans.copy(), (bias_ids.copy(), bias_values.copy())

    def mark_adjusted(self, slot_X: np.ndarray) -> None:
        """Find out which of these slots want their logits changed."""
        listed = [len(self._bans[slot]) + len(self._bias[slot][0]) > 0 for slot in slot_X.tolist()]
        self._adjusted[slot_X] = penalized(self.sampling[slot_X]) | np.array(listed, bool)

    def slide(self, plan: RankPlan) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Which entries of the block tables slide out of their windows when the plan is carried out, once each: caches, slots and
        indices, i64. The scheduler gives their blocks to others and says nothing of it."""
        parts = [np.zeros((3, 0), np.int64)]
        slot_S, start_S = plan.sched_slot_S, plan.sched_start_S.astype(np.int64)
        for cache, window in self._windows:
            slid_S, before_S = np.maximum(start_S - window + 1, 0) // self.block_size, self._num_slid_CS[cache, slot_S]
            num_S = slid_S - before_S
            index = np.arange(num_S.sum()) - np.repeat(np.cumsum(num_S) - num_S - before_S, num_S)
            parts.append(np.stack((np.full_like(index, cache), np.repeat(slot_S, num_S), index)))
            self._num_slid_CS[cache, slot_S] = slid_S
        cache_X, slot_X, index_X = np.concatenate(parts, axis=1)
        return cache_X, slot_X, index_X

    def schedule(self, plan: RankPlan, num_parts: int = 1) -> list[Scheduled]:
        """What the plan computes, its tokens cut into parts as `batch.in_parts` says. A sequence that is cut is in both parts, as
        if they were two chunks of its prompt."""
        slot_S, start_S, num_S = (
            values.astype(np.int64) for values in (plan.sched_slot_S, plan.sched_start_S, plan.sched_num_S)
        )
        assert (start_S + num_S <= self.num_tokens[slot_S]).all(), "a plan computes tokens that are not known"
        sampled_S = plan.sched_sample_S != 0
        if num_parts == 1:
            return [Scheduled.of(slot_S, start_S, num_S, sampled_S)]
        before_S, parts, end = np.cumsum(num_S) - num_S, [], 0
        for [num] in in_parts([int(num_S.sum())], num_parts):
            begin, end = end, end + num
            first_S, last_S = ((place - before_S).clip(0, num_S) for place in (begin, end))
            here = np.flatnonzero(last_S > first_S)
            sampled = (sampled_S & (last_S == num_S))[here]
            parts.append(Scheduled.of(slot_S[here], (start_S + first_S)[here], (last_S - first_S)[here], sampled))
        return parts

    def adjust(self, logits_OV: Tensor, slot_O: np.ndarray) -> None:
        """Penalties, bias and bans, in place, row by row."""
        for row in np.flatnonzero(self._adjusted[slot_O]).tolist():
            slot, logits_V = int(slot_O[row]), logits_OV[row]
            record = self.sampling[slot]
            prompt_len, known = int(record["prompt_len"]), int(self.num_tokens[slot])
            if penalized(record):
                tokens = self.known_tokens(slot)
                sampling.penalize(
                    logits_V,
                    tokens[:prompt_len],
                    tokens[prompt_len:],
                    repetition=float(record["repetition_penalty"]),
                    presence=float(record["presence_penalty"]),
                    frequency=float(record["frequency_penalty"]),
                )
            ids, values = self._bias[slot]
            if len(ids):
                logits_V.index_add_(0, self.upload(ids).long(), self.upload(values))
            bans = self._bans[slot]
            if len(bans) and known - prompt_len < record["min_tokens"]:
                logits_V.index_fill_(0, self.upload(bans).long(), -torch.inf)

    def upload(self, values: np.ndarray) -> Tensor:
        """A copy on the table's device, for which nothing that the device computes is waited."""
        return torch.from_numpy(values.copy())


def penalized(sampling_S: np.ndarray) -> np.ndarray:
    """Return which records have a penalty."""
    return (
        (sampling_S["repetition_penalty"] != 1)
        | (sampling_S["presence_penalty"] != 0)
        | (sampling_S["frequency_penalty"] != 0)
    )
