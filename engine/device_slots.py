"""A rank's table of slots where a GPU computes: tokens and block tables lie on the device, so that sampled tokens never leave it
before the next step needs them. The host keeps what it knows without asking: counts, and sampling parameters.

S slots, L tokens of a slot, C caches, W blocks of a slot's table, T tokens of the step, B scheduled slots, O sampled tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from expertwire.engine.slot_states import Scheduled, SlotStates
from expertwire.scheduler.plan import CacheSpec, RankPlan

_NONE = np.zeros(0, np.int32)


class DeviceSlots(SlotStates):
    """The table.

    Args:
        num_slots: S.
        max_model_len: L, of one request.
        block_size: tokens in a block.
        specs: of the caches.
        device: of the tables.
    """

    def __init__(
        self, *, num_slots: int, max_model_len: int, block_size: int, specs: Sequence[CacheSpec], device: str
    ) -> None:
        super().__init__(num_slots, block_size, specs, device)
        self.tokens_SL = torch.zeros((num_slots, max_model_len + 1), dtype=torch.int32, device=device)
        assert self.tokens_SL.numel() < 2**31, f"{num_slots} slots of {max_model_len} tokens: places must fit 32 bits"
        shape_CSW = len(specs), num_slots, -(-max_model_len // block_size)
        self.blocks_CSW = torch.zeros(shape_CSW, dtype=torch.int32, device=device)
        assert self.blocks_CSW.numel() < 2**31, f"block tables {shape_CSW}: places must fit 32 bits"

    def known_tokens(self, slot: int) -> Tensor:
        return self.tokens_SL[slot, : self.num_tokens[slot]].long()

    def apply(self, plan: RankPlan) -> None:
        """Release, admit, set blocks, in this order."""
        self.admit(plan)
        starts, tokens = [_NONE], [_NONE]
        for slot, of_prompt in zip(plan.admit_slot_A.tolist(), plan.admit_tokens, strict=True):
            starts.append(self.places(np.array(slot), np.arange(len(of_prompt))))
            tokens.append(of_prompt)
        at_block = self._entries(plan.block_cache_B, plan.block_slot_B, plan.block_index_B)
        at_slid = self._entries(*self.slide(plan))
        at, ids, slid, where, values = self.to_device(
            at_block, plan.block_id_B, at_slid, np.concatenate(starts), np.concatenate(tokens)
        )
        # A released slot keeps its blocks, which nothing reads before they are set anew.
        self.blocks_CSW.view(-1).index_copy_(0, at.long(), ids)
        if len(at_slid):
            self.blocks_CSW.view(-1).index_fill_(0, slid.long(), 0)
        self.tokens_SL.view(-1).index_copy_(0, where.long(), values)

    def append(self, step: Scheduled, at_O: Tensor, token_O: Tensor) -> None:
        """Write down sampled tokens, on the device. `at_O`: where, as `places` has it."""
        self.num_tokens[step.slot_O] += 1
        self.tokens_SL.view(-1).index_copy_(0, at_O.long(), token_O.int())

    def places(self, slot_X: np.ndarray, position_X: np.ndarray) -> np.ndarray:
        """Where tokens lie in the table seen as one row: i64."""
        return slot_X.astype(np.int64) * self.tokens_SL.shape[1] + position_X

    def _entries(self, cache_X: np.ndarray, slot_X: np.ndarray, index_X: np.ndarray) -> np.ndarray:
        """Where entries lie in the block tables seen as one row: i64."""
        _, num_slots, width = self.blocks_CSW.shape
        return (cache_X.astype(np.int64) * num_slots + slot_X) * width + index_X

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
