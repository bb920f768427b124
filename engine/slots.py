"""A rank's table of slots: what plans change and batches are built from. Host memory only.

A slot is a running request's place on a rank. Its tokens (prompt and output), its block table and its sampling state stay here
from admission to release, so that a plan need only say what changes.

S scheduled slots, T tokens of the step.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from expertwire.engine.batch import ForwardBatch
from expertwire.engine.slot_states import Scheduled, SlotStates
from expertwire.kernels import attention
from expertwire.scheduler.plan import RankPlan


class Slots(SlotStates):
    """The table.

    Args:
        num_slots: requests that run at once.
        max_model_len: tokens of one request.
        block_size: tokens in a block.
        device: of the batches.
    """

    def __init__(self, *, num_slots: int, max_model_len: int, block_size: int, device: str) -> None:
        super().__init__(num_slots, device)
        self._block_size = block_size
        self.tokens = np.zeros((num_slots, max_model_len + 1), np.int32)
        self.blocks = np.zeros((num_slots, -(-max_model_len // block_size)), np.int32)

    def known_tokens(self, slot: int) -> Tensor:
        return self.upload(self.tokens[slot, : self.num_tokens[slot]]).long()

    def apply(self, plan: RankPlan) -> None:
        """Release, admit, set blocks, in this order."""
        self.admit(plan)
        self.blocks[plan.release_slot] = self.blocks[plan.admit_slot_A] = 0
        for slot, tokens in zip(plan.admit_slot_A.tolist(), plan.admit_tokens, strict=True):
            self.tokens[slot, : len(tokens)] = tokens
        assert not plan.block_cache_B.any(), f"only cache 0 exists, plan names {np.unique(plan.block_cache_B)}"
        self.blocks[plan.block_slot_B, plan.block_index_B] = plan.block_id_B

    def batch(self, step: Scheduled, num_tokens_P: list[int]) -> ForwardBatch:
        """The forward batch of a step."""
        slot_T, position_T, size = step.slot_T, step.position_T, self._block_size
        mapping_T = self.blocks[slot_T, position_T // size].astype(np.int64) * size + position_T % size
        token_ids_T = self.tokens[slot_T, position_T].astype(np.int64)
        ids, positions, mapping = (torch.from_numpy(a).to(self.device) for a in (token_ids_T, position_T, mapping_T))
        return ForwardBatch(
            token_ids_T=ids,
            positions_T=positions,
            slot_mapping_T=mapping,
            sequences=attention.describe(step.cu_queries, step.length_B, self.blocks[step.slot_B], size, self.device),
            num_tokens_P=num_tokens_P,
        )

    def append(self, slots: np.ndarray, tokens: np.ndarray) -> None:
        """Add one sampled token to each slot."""
        self.tokens[slots, self.num_tokens[slots]] = tokens
        self.num_tokens[slots] += 1
