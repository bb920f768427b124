"""Token ids, positions and slot mappings of a step's tokens, looked up in a rank's persistent input batch.

T tokens, C KV cache groups, W entries of a block table.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class PrepareInputs(Protocol):
    """See `reference`."""

    def __call__(
        self, slot_T: Tensor, position_T: Tensor, token_ids: Tensor, block_tables: Tensor, block_size: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return token ids and positions, i64 [T], and the slot mapping of each group, i64 [C, T]."""
        ...


def reference(
    slot_T: Tensor, position_T: Tensor, token_ids: Tensor, block_tables: Tensor, block_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Look up the tokens at these slots and positions.

    Args:
        slot_T: i32; -1 is no token: its id is 0 and its mapping -1.
        position_T: i32.
        token_ids: i32 [slots, tokens].
        block_tables: i32 [C, slots, W].
    """
    is_token_T, slots_T, positions_T = slot_T >= 0, slot_T.long().clamp_(min=0), position_T.long()
    blocks_CT = block_tables[:, slots_T, positions_T // block_size]
    mapping_CT = torch.where(is_token_T, blocks_CT * block_size + positions_T % block_size, -1)
    return torch.where(is_token_T, token_ids[slots_T, positions_T], 0).long(), positions_T, mapping_CT
