"""A rank's table of slots where a GPU computes: tokens and block tables lie on the device, so that sampled tokens never leave it
before the next step needs them. The host keeps what it knows without asking: counts, and sampling parameters.

S slots, L tokens of a slot, W blocks of its table, T tokens of the step, B scheduled slots, O sampled tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from expertwire.scheduler.plan import SAMPLING_DTYPE, RankPlan

_NONE = np.zeros(0, np.int32)


@dataclass(frozen=True, kw_only=True)
class Scheduled:
    """What a step computes, on the host, in the order of its rows: sequences with one query first.

    Attributes:
        order_B: which scheduled slot of the plan each sequence is; `slot_B` which slot.
        slot_T, position_T: of each token.
        cu_queries: [B + 1]; `length_B`: with this step's tokens.
        last_row_B: of each sequence.
        row_O, slot_O, position_O: of the sequences that sample: the row of their last token, and the position of what is sampled.
    """

    num_single: int
    order_B: np.ndarray
    slot_B: np.ndarray
    slot_T: np.ndarray
    position_T: np.ndarray
    cu_queries: np.ndarray
    length_B: np.ndarray
    last_row_B: np.ndarray
    row_O: np.ndarray
    slot_O: np.ndarray
    position_O: np.ndarray

    @property
    def all_single(self) -> bool:
        return self.num_single == len(self.slot_B) > 0


class DeviceSlots:
    """The table.

    Args:
        num_slots: S.
        max_model_len: L, of one request.
        block_size: tokens in a block.
        device: of the tables.
    """

    def __init__(self, *, num_slots: int, max_model_len: int, block_size: int, device: str) -> None:
        self.block_size, self.device = block_size, device
        self.tokens_SL = torch.zeros((num_slots, max_model_len + 1), dtype=torch.int32, device=device)
        self.blocks_SW = torch.zeros((num_slots, -(-max_model_len // block_size)), dtype=torch.int32, device=device)
        self.num_tokens = np.zeros(num_slots, np.int64)
        self.sampling = np.zeros(num_slots, SAMPLING_DTYPE)
        self.bans = [_NONE] * num_slots
        self.bias: list[tuple[np.ndarray, np.ndarray]] = [(_NONE, _NONE)] * num_slots

    def apply(self, plan: RankPlan) -> None:
        """Release, admit, set blocks, in this order."""
        assert not plan.block_cache_B.any(), f"only cache 0 exists, plan names {np.unique(plan.block_cache_B)}"
        self.num_tokens[plan.release_slot] = 0
        starts, tokens = [_NONE], [_NONE]
        for i, slot in enumerate(plan.admit_slot_A.tolist()):
            self.num_tokens[slot] = len(plan.admit_tokens[i])
            self.sampling[slot] = plan.admit_sampling_A[i]
            # Copies: the plan's memory is reused.
            self.bans[slot] = plan.admit_bans[i].copy()
            self.bias[slot] = (plan.admit_bias_ids[i].copy(), plan.admit_bias_values[i].copy())
            starts.append(slot * self.tokens_SL.shape[1] + np.arange(len(plan.admit_tokens[i])))
            tokens.append(plan.admit_tokens[i])
        at_block = plan.block_slot_B.astype(np.int64) * self.blocks_SW.shape[1] + plan.block_index_B
        at, ids, where, values = self.to_device(
            at_block, plan.block_id_B, np.concatenate(starts), np.concatenate(tokens)
        )
        # A released slot keeps its blocks, which nothing reads before they are set anew.
        self.blocks_SW.view(-1).index_copy_(0, at.long(), ids)
        self.tokens_SL.view(-1).index_copy_(0, where.long(), values)

    def schedule(self, plan: RankPlan) -> Scheduled:
        """What the plan computes; counts what it samples."""
        order_B = np.argsort(plan.sched_num_S != 1, kind="stable")
        slots, starts, nums = (
            a[order_B].astype(np.int64) for a in (plan.sched_slot_S, plan.sched_start_S, plan.sched_num_S)
        )
        ends, cu_queries = starts + nums, np.concatenate(([0], np.cumsum(nums)))
        assert (ends <= self.num_tokens[slots]).all(), "a plan computes tokens that are not known"
        sampled = plan.sched_sample_S[order_B] != 0
        position_O = self.num_tokens[slots[sampled]]
        self.num_tokens[slots[sampled]] += 1
        return Scheduled(
            num_single=int((nums == 1).sum()),
            order_B=order_B,
            slot_B=slots,
            slot_T=np.repeat(slots, nums),
            position_T=np.arange(cu_queries[-1]) - np.repeat(cu_queries[:-1] - starts, nums),
            cu_queries=cu_queries,
            length_B=ends,
            last_row_B=cu_queries[1:] - 1,
            row_O=cu_queries[1:][sampled] - 1,
            slot_O=slots[sampled],
            position_O=position_O,
        )

    def append(self, slot_O: Tensor, position_O: Tensor, token_O: Tensor) -> None:
        """Write down sampled tokens, on the device."""
        at = slot_O.long() * self.tokens_SL.shape[1] + position_O
        self.tokens_SL.view(-1).index_copy_(0, at, token_O.int())

    def to_device(self, *arrays: np.ndarray) -> Sequence[Tensor]:
        """Integers that fit 32 bits, as i32 tensors: one copy for all, which waits for nothing that the device computes.

        Each begins at a multiple of 16 bytes, as kernels are compiled apart for pointers that do not."""
        starts = np.cumsum([0, *(-(-len(array) // 4) * 4 for array in arrays)])
        packed = np.zeros(starts[-1], np.int32)
        for start, array in zip(starts.tolist(), arrays, strict=False):
            packed[start : start + len(array)] = array
        tensor = torch.from_numpy(packed)
        if self.device != "cpu":
            tensor = tensor.pin_memory().to(self.device, non_blocking=True)
        return [tensor[start : start + len(array)] for start, array in zip(starts.tolist(), arrays, strict=False)]
