"""Look-up of a step's tokens on a CPU, where every token belongs to a slot.

T tokens, C KV cache groups.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def prepare_inputs(
    slot_T: Tensor, position_T: Tensor, token_ids: Tensor, block_tables: Tensor, block_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`kernels.ops.prepare_inputs.reference`, in numpy: a third of the time of torch's small operations."""
    slots, positions = slot_T.numpy(), position_T.numpy().astype(np.int64)
    # In order, as the loops that read a mapping are compiled apart for one that is not contiguous.
    blocks_CT = block_tables.numpy()[:, slots, positions // block_size].astype(np.int64, order="C")
    ids = token_ids.numpy()[slots, positions].astype(np.int64)
    mapping_CT = blocks_CT * block_size + positions % block_size
    return torch.from_numpy(ids), torch.from_numpy(positions), torch.from_numpy(mapping_CT)
