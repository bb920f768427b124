"""The sequences and tokens of a step on the host, cut into micro-batches, and their numbers packed for the device.

S sequences, T tokens, O sampled rows, P ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from expertwire.scheduler.plan import RankPlan


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """The sequences of a step, or of a part of it, in the order of its rows: decodes (one query each) first.

    Attributes:
        slot_S: slot of each sequence; `slot_T`, `position_T`: slot and position of each token.
        cu_seqlens_q: [S + 1], first row of each sequence and the end of the last.
        seq_len_S: tokens of each sequence, with this step's.
        is_sampled_S: bool, whether the sequence samples; `slot_O`: the slots of those. See also `sampled`.
        num_decodes: sequences with one query.
    """

    slot_S: np.ndarray
    slot_T: np.ndarray
    position_T: np.ndarray
    cu_seqlens_q: np.ndarray
    seq_len_S: np.ndarray
    is_sampled_S: np.ndarray
    slot_O: np.ndarray
    num_decodes: int

    @classmethod
    def of(cls, slot_S: np.ndarray, start_S: np.ndarray, num_S: np.ndarray, is_sampled_S: np.ndarray) -> MicroBatch:
        """Return the micro-batch of sequences in any order.

        Args:
            start_S: position of each one's first token; `num_S`: how many tokens it computes.
        """
        is_prefill_S = num_S != 1
        num_decodes = len(num_S) - int(is_prefill_S.sum())
        if 0 < num_decodes < len(num_S):
            order_S = np.argsort(is_prefill_S, kind="stable")
            each_S = slot_S, start_S, num_S, is_sampled_S
            slot_S, start_S, num_S, is_sampled_S = (values[order_S] for values in each_S)
        cu_seqlens_q = np.concatenate(([0], np.cumsum(num_S)))
        return cls(
            slot_S=slot_S,
            slot_T=np.repeat(slot_S, num_S),
            position_T=np.arange(cu_seqlens_q[-1]) - np.repeat(cu_seqlens_q[:-1] - start_S, num_S),
            cu_seqlens_q=cu_seqlens_q,
            seq_len_S=start_S + num_S,
            is_sampled_S=is_sampled_S,
            slot_O=slot_S[is_sampled_S],
            num_decodes=num_decodes,
        )

    @classmethod
    def joined(cls, micro_batches: Sequence[MicroBatch]) -> MicroBatch:
        """Return micro-batches as one, their rows one after another; a sequence that is in two of them stays two."""
        if len(micro_batches) == 1:
            return micro_batches[0]
        ends = np.cumsum([each.cu_seqlens_q[-1] for each in micro_batches])
        cu_seqlens_q = [
            each.cu_seqlens_q[1:] + end - each.cu_seqlens_q[-1] for each, end in zip(micro_batches, ends, strict=True)
        ]
        names = "slot_S", "slot_T", "position_T", "seq_len_S", "is_sampled_S", "slot_O"
        values = {name: np.concatenate([getattr(each, name) for each in micro_batches]) for name in names}
        num_decodes = sum(each.num_decodes for each in micro_batches)
        return cls(cu_seqlens_q=np.concatenate(([0], *cu_seqlens_q)), num_decodes=num_decodes, **values)

    @property
    def num_tokens(self) -> int:
        return len(self.slot_T)

    def sampled(self, plan: RankPlan) -> tuple[np.ndarray, np.ndarray]:
        """Return the slots that sample and the rows from whose hidden states they do: [O].

        A slot that computes no token samples from the row of another one, which samples, too.
        """
        row_O = self.last_row_S[self.is_sampled_S]
        follows_S = plan.sched_num_S == 0
        if not follows_S.any():
            return self.slot_O, row_O
        order_O = self.slot_O.argsort()
        at = order_O[self.slot_O.searchsorted(plan.sched_source_S[follows_S], sorter=order_O)]
        return np.append(self.slot_O, plan.sched_slot_S[follows_S]), np.append(row_O, row_O[at])

    @property
    def last_row_S(self) -> np.ndarray:
        """The row of each sequence's last token."""
        return self.cu_seqlens_q[1:] - 1

    def pack(self, size: int, is_long: np.ndarray) -> np.ndarray:
        """Return the numbers for `PackedInputs` with room for `size` tokens; those behind the last belong to no slot.

        Args:
            is_long: of each slot, whether its request is long.
        """
        count, room, words = self.num_tokens, _aligned(size), no_tokens(size)
        words[:count] = self.slot_T
        words[room : room + count] = self.position_T
        words[2 * room : 2 * room + count] = is_long[self.slot_T]
        words[3 * room : 3 * room + len(self.seq_len_S)] = self.seq_len_S
        words[4 * room : 4 * room + len(self.slot_S)] = self.slot_S
        words[5 * room : 5 * room + size + 1] = count
        words[5 * room : 5 * room + len(self.cu_seqlens_q)] = self.cu_seqlens_q
        words[-8], words[-4] = count, self.num_decodes
        return words


@dataclass(frozen=True)
class PackedInputs:
    """A micro-batch's numbers on the device, one i32 tensor, so that one copy brings them there. Each field has room for
    `num_tokens` entries and begins at a multiple of 16 bytes, as kernels are compiled apart for pointers that do not.
    """

    words: Tensor
    num_tokens: int

    @property
    def slot_T(self) -> Tensor:
        return self.words[: self.num_tokens]

    @property
    def position_T(self) -> Tensor:
        return self._field(1, self.num_tokens)

    @property
    def is_long_T(self) -> Tensor:
        return self._field(2, self.num_tokens)

    def seq_lens(self, num_sequences: int) -> Tensor:
        return self._field(3, num_sequences)

    def slot_S(self, num_sequences: int) -> Tensor:
        """Return the slots of the first sequences; 0 where there is none."""
        return self._field(4, num_sequences)

    def cu_seqlens_q(self, num_sequences: int) -> Tensor:
        return self._field(5, num_sequences + 1)

    @property
    def num_valid(self) -> Tensor:
        """[1]: tokens that belong to a slot; those behind them are padding."""
        return self.words[-8:-7]

    @property
    def num_decodes(self) -> Tensor:
        """[1]."""
        return self.words[-4:-3]

    def _field(self, number: int, count: int) -> Tensor:
        start = number * _aligned(self.num_tokens)
        return self.words[start : start + count]


def no_tokens(size: int) -> np.ndarray:
    """Return the numbers of `size` tokens that belong to no slot, as `MicroBatch.pack` has them."""
    words = np.zeros(6 * _aligned(size) + 12, np.int32)
    words[:size] = -1
    return words


def _aligned(count: int) -> int:
    """Return `count` rounded up, so that what lies behind so many i32 begins at a multiple of 16 bytes."""
    return -(-count // 4) * 4


def split_tokens(num_tokens_P: Sequence[int], num_micro_batches: int) -> list[list[int]]:
    """Return every rank's tokens in each micro-batch of a step: as even as can be, and found alike by all ranks."""
    return [[(num + i) // num_micro_batches for num in num_tokens_P] for i in reversed(range(num_micro_batches))]


def micro_batches(plan: RankPlan, num_micro_batches: int = 1) -> list[MicroBatch]:
    """Return what the plan computes, its tokens cut as `split_tokens` says.

    A sequence that is cut is in both micro-batches, as if they were two chunks of its prompt. One that computes no token is in
    none.
    """
    slot_S, start_S, num_S = (
        values.astype(np.int64) for values in (plan.sched_slot_S, plan.sched_start_S, plan.sched_num_S)
    )
    is_sampled_S = plan.sched_sample_S != 0
    if num_micro_batches == 1:
        computes_S = num_S > 0
        if not computes_S.all():
            slot_S, start_S, num_S = slot_S[computes_S], start_S[computes_S], num_S[computes_S]
            is_sampled_S = is_sampled_S[computes_S]
        return [MicroBatch.of(slot_S, start_S, num_S, is_sampled_S)]
    before_S, found, end = np.cumsum(num_S) - num_S, [], 0
    for [num] in split_tokens([int(num_S.sum())], num_micro_batches):
        begin, end = end, end + num
        first_S, last_S = ((bound - before_S).clip(0, num_S) for bound in (begin, end))
        here = np.flatnonzero(last_S > first_S)
        is_sampled = (is_sampled_S & (last_S == num_S))[here]
        found.append(MicroBatch.of(slot_S[here], (start_S + first_S)[here], (last_S - first_S)[here], is_sampled))
    return found
