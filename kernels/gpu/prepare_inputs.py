"""Token ids, positions and slot mappings of a step, looked up in the tables that a rank keeps on its GPU.

T tokens of the step, C KV cache groups, W blocks of a slot's table.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TOKENS_PER_PROGRAM = 128  # a program


@triton.jit(do_not_specialize=["num_tokens"])
def prepare_inputs_kernel(
    slot_ptr,
    position_ptr,
    tokens_ptr,
    blocks_ptr,
    token_out_ptr,
    position_out_ptr,
    mapping_out_ptr,
    num_tokens,
    tokens_stride,
    cache_stride,
    blocks_stride,
    block_size,
    TOKENS: tl.constexpr,
):
    t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    cache = tl.program_id(1).to(tl.int64)
    inside = t < num_tokens
    slot = tl.load(slot_ptr + t, mask=inside, other=-1).to(tl.int64)
    position = tl.load(position_ptr + t, mask=inside, other=0).to(tl.int64)
    taken = slot >= 0
    token = tl.load(tokens_ptr + slot * tokens_stride + position, mask=taken, other=0)
    block = tl.load(
        blocks_ptr + cache * cache_stride + slot * blocks_stride + position // block_size, mask=taken, other=0
    ).to(tl.int64)
    mapping = tl.where(taken, block * block_size + position % block_size, -1)
    tl.store(token_out_ptr + t, token.to(tl.int64), mask=inside & (cache == 0))
    tl.store(position_out_ptr + t, position, mask=inside & (cache == 0))
    tl.store(mapping_out_ptr + cache * num_tokens + t, mapping, mask=inside)


def prepare_inputs(
    slot_T: Tensor, position_T: Tensor, token_ids: Tensor, block_tables: Tensor, block_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return token ids and positions, i64 [T], and the slot mapping of each cache group, i64 [C, T],
    of these slots and positions.

    `token_ids` is [slots, tokens] and `block_tables` [C, slots, W]; all tables and arguments are
    i32. A slot of -1 is no token: its id is 0 and its mapping -1.
    """
    num_tokens = slot_T.shape[0]
    assert slot_T.shape == position_T.shape, f"{tuple(slot_T.shape)} slots, {tuple(position_T.shape)} positions"
    assert token_ids.stride(1) == block_tables.stride(2) == 1, f"strides {token_ids.stride()}, {block_tables.stride()}"
    token_T, position_out_T = (slot_T.new_empty(num_tokens, dtype=torch.int64) for _ in range(2))
    slot_mapping_CT = slot_T.new_empty(len(block_tables), num_tokens, dtype=torch.int64)
    if num_tokens:
        prepare_inputs_kernel[(triton.cdiv(num_tokens, TOKENS_PER_PROGRAM), len(block_tables))](
            slot_T,
            position_T,
            token_ids,
            block_tables,
            token_T,
            position_out_T,
            slot_mapping_CT,
            num_tokens,
            token_ids.stride(0),
            block_tables.stride(0),
            block_tables.stride(1),
            block_size,
            TOKENS=TOKENS_PER_PROGRAM,
        )
    return token_T, position_out_T, slot_mapping_CT
