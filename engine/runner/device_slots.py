"""A rank's table of slots where a GPU computes: tokens and block tables lie on the device, so that sampled tokens never leave it
before the next step needs them. The host keeps what it knows without asking: counts, and sampling parameters.

S slots, L tokens of a slot, C caches, W blocks of a slot's table, T tokens of the step, B scheduled slots, O sampled tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from expertwire.engine.runner.slot_states import Scheduled, SlotStates, penalized
from expertwire.engine.runner.staging import Uploads, memory_of
from expertwire.kernels.gpu import penalties
from expertwire.scheduler.config import CacheSpec
from expertwire.scheduler.plan import RankPlan

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
        self.uploads = Uploads(device, memory_of(device))
        self.tokens_SL = torch.zeros((num_slots, max_model_len + 1), dtype=torch.int32, device=device)
        assert self.tokens_SL.numel() < 2**31, f"{num_slots} slots of {max_model_len} tokens: places must fit 32 bits"
        # Rows of whole 16 bytes, so that all caches' tables of a step are aligned alike: kernels are compiled apart for others.
        shape_CSW = len(specs), num_slots, -(-max_model_len // (4 * block_size)) * 4
        self.blocks_CSW = torch.zeros(shape_CSW, dtype=torch.int32, device=device)
        assert self.blocks_CSW.numel() < 2**31, f"block tables {shape_CSW}: places must fit 32 bits"

    def known_tokens(self, slot: int) -> Tensor:
        return self.tokens_SL[slot, : self.num_tokens[slot]].long()

    def changes(self, plan: RankPlan) -> list[np.ndarray]:
        """Release and admit, and return what is to be uploaded for `write`: places and values of blocks, blocks that slid out of
        their windows, places and values of tokens."""
        self.admit(plan)
        starts, tokens = [_NONE], [_NONE]
        for slot, of_prompt in zip(plan.admit_slot_A.tolist(), plan.admit_tokens, strict=True):
            starts.append(self.places(np.array(slot), np.arange(len(of_prompt))))
            tokens.append(of_prompt)
        at_block = self._entries(plan.block_cache_B, plan.block_slot_B, plan.block_index_B)
        at_slid = self._entries(*self.slide(plan))
        at_token = np.concatenate(starts).astype(np.int64)
        return [at_block, plan.block_id_B.astype(np.int32), at_slid, at_token, np.concatenate(tokens).astype(np.int32)]

    def write(self, changes: Sequence[Tensor]) -> None:
        """Set blocks and tokens, on the device."""
        at_block, block_ids, at_slid, at_token, tokens = changes
        # A released slot keeps its blocks, which nothing reads before they are set anew.
        if len(at_block):
            self.blocks_CSW.view(-1).index_copy_(0, at_block, block_ids)
        if len(at_slid):
            self.blocks_CSW.view(-1).index_fill_(0, at_slid, 0)
        if len(at_token):
            self.tokens_SL.view(-1).index_copy_(0, at_token, tokens)

    def append(self, step: Scheduled, at_O: Tensor, token_O: Tensor) -> None:
        """Write down sampled tokens, on the device. `at_O`: where, as `places` has it."""
        self.num_tokens[step.slot_O] += 1
        self.tokens_SL.view(-1).index_copy_(0, at_O, token_O.int())

    def adjustments(self, slot_O: np.ndarray) -> list[np.ndarray]:
        """What is to be uploaded for `adjust`: of the rows with penalties the row, slot, length of the prompt, number of known
        tokens and the parameters, as `penalties.penalize` takes them; rows, tokens and numbers, as `penalties.add` does."""
        state = self.sampling[slot_O]
        row_A = np.flatnonzero(penalized(state)).astype(np.int32)
        slot_A = slot_O[row_A].astype(np.int32)
        names = "repetition_penalty", "presence_penalty", "frequency_penalty"
        parameters = [self.sampling[name][slot_A].astype(np.float32) for name in names]
        lengths = self.sampling["prompt_len"][slot_A].astype(np.int32), self.num_tokens[slot_A].astype(np.int32)
        rows, tokens, values = [_NONE], [_NONE], [np.zeros(0, np.float32)]
        for row in np.flatnonzero(self._adjusted[slot_O]).tolist():
            slot, record = int(slot_O[row]), state[row]
            is_banned = self.num_tokens[slot] - record["prompt_len"] < record["min_tokens"]
            bans, (ids, numbers) = self._bans[slot] if is_banned else _NONE, self._bias[slot]
            free = ~np.isin(ids, bans)
            tokens += [bans, ids[free]]
            rows.append(np.full(len(bans) + int(free.sum()), row, np.int32))
            values += [np.full(len(bans), -np.inf), numbers[free]]
        added = np.concatenate(rows), np.concatenate(tokens).astype(np.int32), np.concatenate(values).astype(np.float32)
        return [row_A, slot_A, *lengths, *parameters, *added]

    def adjust_on_device(self, logits_OV: Tensor, adjustments: Sequence[Tensor], slot_O: np.ndarray) -> None:
        """`adjust` of all rows at once, bit for bit; `adjustments` as uploaded."""
        *of_rows, row_N, token_N, value_N = adjustments
        row_A, slot_A, prompt_len_A, known_A, *parameters = of_rows
        if len(row_A):
            most = int(self.num_tokens[slot_O].max())
            penalties.penalize(logits_OV, row_A, slot_A, prompt_len_A, known_A, parameters, self.tokens_SL, most)
        penalties.add(logits_OV, row_N, token_N, value_N)

    @property
    def num_slots(self) -> int:
        """S: no step has more sequences."""
        return len(self.num_tokens)

    def upload(self, values: np.ndarray) -> Tensor:
        return self.uploads(values)[0]

    def places(self, slot_X: np.ndarray, position_X: np.ndarray) -> np.ndarray:
        """Where tokens lie in the table seen as one row: i64."""
        return slot_X.astype(np.int64) * self.tokens_SL.shape[1] + position_X

    def _entries(self, cache_X: np.ndarray, slot_X: np.ndarray, index_X: np.ndarray) -> np.ndarray:
        """Where entries lie in the block tables seen as one row: i64."""
        _, num_slots, width = self.blocks_CSW.shape
        return (cache_X.astype(np.int64) * num_slots + slot_X) * width + index_X
