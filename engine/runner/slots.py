"""A rank's table of slots: what plans change and batches are built from. Host memory only.

A slot is a running request's place on a rank. Its tokens (prompt and output), its block table and its sampling state stay here
from admission to release, so that a plan need only say what changes.

S slots, C caches, W blocks of a slot's table, T tokens of the step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from expertwire.engine.runner.batch import ForwardBatch, slot_mapping
from expertwire.engine.runner.slot_states import Scheduled, SlotStates
from expertwire.kernels.ops.attention import AttentionMetadata
from expertwire.scheduler.config import CacheSpec
from expertwire.scheduler.plan import RankPlan


class Slots(SlotStates):
    """The table.

    Args:
        num_slots: requests that run at once.
        max_model_len: tokens of one request.
        block_size: tokens in a block.
        specs: of the caches.
        device: of the batches.
    """

    def __init__(
        self, *, num_slots: int, max_model_len: int, block_size: int, specs: Sequence[CacheSpec], device: str
    ) -> None:
        super().__init__(num_slots, block_size, specs, device)
        self.tokens = np.zeros((num_slots, max_model_len + 1), np.int32)
        self._blocks_CSW = np.zeros((len(specs), num_slots, -(-max_model_len // block_size)), np.int32)

    def known_tokens(self, slot: int) -> Tensor:
        return self.upload(self.tokens[slot, : self.num_tokens[slot]]).long()

    def apply(self, plan: RankPlan) -> None:
        """Release, admit, set blocks, in this order."""
        self.admit(plan)
        self._blocks_CSW[:, plan.release_slot] = self._blocks_CSW[:, plan.admit_slot_A] = 0
        for slot, tokens in zip(plan.admit_slot_A.tolist(), plan.admit_tokens, strict=True):
            self.tokens[slot, : len(tokens)] = tokens
        self._blocks_CSW[plan.block_cache_B, plan.block_slot_B, plan.block_index_B] = plan.block_id_B
        self._blocks_CSW[self.slide(plan)] = 0

    def batch(
        self, step: Scheduled, num_tokens_P: list[int], routed: Callable[[int, Tensor], None] | None = None
    ) -> ForwardBatch:
        """The forward batch of a step."""
        token_ids_T = self.tokens[step.slot_T, step.position_T].astype(np.int64)
        return ForwardBatch(
            token_ids_T=torch.from_numpy(token_ids_T).to(self.device),
            positions_T=torch.from_numpy(step.position_T).to(self.device),
            attention_metadata=tuple(self._metadata(step, blocks_SW) for blocks_SW in self._blocks_CSW),
            num_tokens_P=num_tokens_P,
            routed=routed,
        )

    def _metadata(self, step: Scheduled, blocks_SW: np.ndarray) -> AttentionMetadata:
        block_T = blocks_SW[step.slot_T, step.position_T // self.block_size]
        num, num_sequences, length_B = step.num_decodes, len(step.slot_B), step.length_B
        return AttentionMetadata(
            num_decodes=torch.tensor([num], dtype=torch.int32),
            max_decodes=num,
            max_prefills=num_sequences - num,
            max_prefill_tokens=len(step.slot_T) - num,
            max_seq_len=int(length_B.max(initial=1)),
            max_prefill_len=int(length_B[num:].max(initial=1)),
            cu_seqlens_q=torch.from_numpy(step.cu_seqlens_q.astype(np.int32)),
            seq_lens=torch.from_numpy(length_B.astype(np.int32)),
            block_table=torch.from_numpy(blocks_SW[step.slot_B]),
            slot_mapping=slot_mapping(block_T, step.position_T, self.block_size, self.device),
        )

    def append(self, slots: np.ndarray, tokens: np.ndarray) -> None:
        """Add one sampled token to each slot."""
        self.tokens[slots, self.num_tokens[slots]] = tokens
        self.num_tokens[slots] += 1
