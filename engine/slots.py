"""A rank's table of slots: what plans change and batches are built from. Host memory only.

A slot is a running request's place on a rank. Its tokens (prompt and output), its block table and its sampling state stay here
from admission to release, so that a plan need only say what changes.

S scheduled slots, T tokens of the step.
"""

from __future__ import annotations

import numpy as np
import torch

from expertwire.engine.batch import ForwardBatch
from expertwire.kernels import attention
from expertwire.scheduler.plan import SAMPLING_DTYPE, RankPlan

_NONE = np.zeros(0, np.int32)


class Slots:
    """The table.

    Args:
        num_slots: requests that run at once.
        max_model_len: tokens of one request.
        block_size: tokens in a block.
        device: of the batches.
    """

    def __init__(self, *, num_slots: int, max_model_len: int, block_size: int, device: str) -> None:
        self._block_size, self._device = block_size, device
        self.tokens = np.zeros((num_slots, max_model_len + 1), np.int32)
        self.num_tokens = np.zeros(num_slots, np.int64)
        self.blocks = np.zeros((num_slots, -(-max_model_len // block_size)), np.int32)
        self.sampling = np.zeros(num_slots, SAMPLING_DTYPE)
        self.bans = [_NONE] * num_slots
        self.bias: list[tuple[np.ndarray, np.ndarray]] = [(_NONE, _NONE)] * num_slots

    def apply(self, plan: RankPlan) -> None:
        """Release, admit, set blocks, in this order."""
        self.num_tokens[plan.release_slot] = 0
        self.blocks[plan.release_slot] = 0
        for i, slot in enumerate(plan.admit_slot_A.tolist()):
            tokens = plan.admit_tokens[i]
            self.tokens[slot, : len(tokens)] = tokens
            self.num_tokens[slot] = len(tokens)
            self.blocks[slot] = 0
            self.sampling[slot] = plan.admit_sampling_A[i]
            # Copies: the plan's memory is reused.
            self.bans[slot] = plan.admit_bans[i].copy()
            self.bias[slot] = (plan.admit_bias_ids[i].copy(), plan.admit_bias_values[i].copy())
        assert not plan.block_cache_B.any(), f"only cache 0 exists, plan names {np.unique(plan.block_cache_B)}"
        self.blocks[plan.block_slot_B, plan.block_index_B] = plan.block_id_B

    def batch(self, plan: RankPlan, num_tokens_P: list[int]) -> tuple[ForwardBatch, np.ndarray, np.ndarray]:
        """The forward batch; the scheduled slots' order in it (indices into the plan's); each slot's last row."""
        # Single queries first, see `PagedSequences`.
        order = np.argsort(plan.sched_num_S != 1, kind="stable")
        slots, starts, nums = (
            a[order].astype(np.int64) for a in (plan.sched_slot_S, plan.sched_start_S, plan.sched_num_S)
        )
        cu_queries = np.concatenate(([0], np.cumsum(nums)))
        total = int(cu_queries[-1])
        slot_T = np.repeat(slots, nums)
        positions_T = np.arange(total) - np.repeat(cu_queries[:-1] - starts, nums)
        assert (starts + nums <= self.num_tokens[slots]).all(), "a plan computes tokens that are not known"
        block_T, offset_T = positions_T // self._block_size, positions_T % self._block_size
        mapping_T = self.blocks[slot_T, block_T].astype(np.int64) * self._block_size + offset_T
        sequences = attention.describe(cu_queries, starts + nums, self.blocks[slots], self._block_size, self._device)
        token_ids_T = self.tokens[slot_T, positions_T].astype(np.int64)
        ids, positions, mapping = (torch.from_numpy(a).to(self._device) for a in (token_ids_T, positions_T, mapping_T))
        batch = ForwardBatch(
            token_ids_T=ids,
            positions_T=positions,
            slot_mapping_T=mapping,
            sequences=sequences,
            num_tokens_P=num_tokens_P,
        )
        return batch, order, cu_queries[1:] - 1

    def append(self, slots: np.ndarray, tokens: np.ndarray) -> None:
        """Add one sampled token to each slot."""
        self.tokens[slots, self.num_tokens[slots]] = tokens
        self.num_tokens[slots] += 1
