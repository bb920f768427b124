"""How many tokens of the requests that ask go to each expert of each layer, in one part of a step.

T tokens of the part, B sequences, O owners (sequences that ask), L layers, E logical experts, n counts that are not zero.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from expertwire.engine.models.model_config import ModelConfig
from expertwire.engine.runner.slot_states import Scheduled, SlotStates

NOTHING = np.zeros(0, np.int32)


class RoutedCounts:
    """Counts, where the model computes.

    Attributes:
        tokens_LOE: i32 [L, O + 1, E]; the last owner has the tokens of those who do not ask, and those that have been counted
            before, as a request that was preempted computes tokens again.
    """

    def __init__(self, slots: SlotStates, part: Scheduled, config: ModelConfig) -> None:
        from_B = slots.sampling["experts_from"][part.slot_B]
        asks_B = from_B >= 0
        self._slot_O = part.slot_B[asks_B]
        num_owners, num_B = len(self._slot_O), np.diff(part.cu_seqlens_q)
        owner_T = np.repeat(np.cumsum(asks_B) - 1, num_B)
        counted_T = np.repeat(asks_B, num_B) & (part.position_T >= np.repeat(from_B, num_B))
        self._first_T1 = slots.upload(np.where(counted_T, owner_T, num_owners) * config.num_experts)[:, None]
        shape = config.num_layers, num_owners + 1, config.num_experts
        self.tokens_LOE = torch.zeros(shape, dtype=torch.int32, device=self._first_T1.device)

    @classmethod
    def of(cls, slots: SlotStates, part: Scheduled, config: ModelConfig) -> RoutedCounts | None:
        """None where nobody asks; to find that out is all that other steps cost."""
        return cls(slots, part, config) if (slots.sampling["experts_from"][part.slot_B] >= 0).any() else None

    def add(self, layer: int, ids_TK: Tensor) -> None:
        """The experts of each token in a layer, i64."""
        at_N = (self._first_T1 + ids_TK).flatten()
        self.tokens_LOE[layer].view(-1).scatter_add_(0, at_N, torch.ones_like(at_N, dtype=torch.int32))

    def entries(self, tokens_LOE: np.ndarray) -> np.ndarray:
        """What a `StepResult` says of the counts, which are on the host now: i32 [3 * n]."""
        layer_n, owner_n, expert_n = tokens_LOE[:, :-1].nonzero()
        where_n = layer_n * tokens_LOE.shape[2] + expert_n
        columns = self._slot_O[owner_n], where_n, tokens_LOE[layer_n, owner_n, expert_n]
        return np.stack(columns, axis=1).astype(np.int32).reshape(-1)
