"""One rank's share of a step, as the model sees it.

T tokens of this rank, P ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from expertwire.kernels.attention import DeviceSequences, PagedSequences


@dataclass(frozen=True, kw_only=True)
class ForwardBatch:
    """Tokens of several sequences, one after another.

    `token_ids_T`, `positions_T` and `slot_mapping_T` (where each token's keys go: block * block_size + offset) are i64.
    `num_valid`, i32 [1] on the device: of a single rank; tokens from there on only fill up a captured step. None: all count.
    """

    token_ids_T: Tensor
    positions_T: Tensor
    slot_mapping_T: Tensor
    sequences: PagedSequences | DeviceSequences
    num_tokens_P: Sequence[int]
    num_valid: Tensor | None = None
