"""Routed expert counts: how many tokens of each request that asks go to each expert of each layer, in one micro-batch.

T tokens, S sequences, L layers, E logical experts, K experts a token, N routed rows. An owner is a sequence
that asks.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from expertwire.engine.models.model_config import ModelConfig
from expertwire.engine.runner.micro_batch import MicroBatch
from expertwire.engine.runner.staging import Upload

NOTHING = np.zeros(0, np.int32)


class RoutedCounts:
    """Counts on the device.

    Attributes:
        tokens: i32 [L, owners + 1, E]; the last owner has the tokens of those who do not ask, and those that have been counted
            before, as a request that was preempted computes tokens again.
    """

    def __init__(self, sampling: np.ndarray, part: MicroBatch, config: ModelConfig, upload: Upload) -> None:
        from_S = sampling["experts_from"][part.slot_S]
        asks_S = from_S >= 0
        self._slots = part.slot_S[asks_S]
        num_owners, num_S = len(self._slots), np.diff(part.cu_seqlens_q)
        owner_T = np.repeat(np.cumsum(asks_S) - 1, num_S)
        counted_T = np.repeat(asks_S, num_S) & (part.position_T >= np.repeat(from_S, num_S))
        [first_T] = upload(np.where(counted_T, owner_T, num_owners) * config.num_experts)
        self._first_T1 = first_T[:, None]
        shape = config.num_layers, num_owners + 1, config.num_experts
        self.tokens = torch.zeros(shape, dtype=torch.int32, device=self._first_T1.device)

    @classmethod
    def of(cls, sampling: np.ndarray, part: MicroBatch, config: ModelConfig, upload: Upload) -> RoutedCounts | None:
        """Return None if no request asks. `sampling`: of all slots."""
        asks = (sampling["experts_from"][part.slot_S] >= 0).any()
        return cls(sampling, part, config, upload) if asks else None

    def add(self, layer: int, ids_TK: Tensor) -> None:
        """Count the experts of each token in a layer, i64; `ForwardBatch.on_routed`."""
        at_N = (self._first_T1 + ids_TK).flatten()
        self.tokens[layer].view(-1).scatter_add_(0, at_N, torch.ones_like(at_N, dtype=torch.int32))

    def entries(self, tokens: np.ndarray) -> np.ndarray:
        """Return the field of a `StepResult` for these counts, which are on the host now: (slot, layer and expert, tokens) of
        each count that is not zero, i32."""
        layers, owners, experts = tokens[:, :-1].nonzero()
        indices = layers * tokens.shape[2] + experts
        columns = self._slots[owners], indices, tokens[layers, owners, experts]
        return np.stack(columns, axis=1).astype(np.int32).reshape(-1)
