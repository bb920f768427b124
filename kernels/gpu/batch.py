"""A step's tokens and where their keys go, looked up in the tables that a rank keeps on its GPU.

T tokens of the step, S slots, L tokens of a slot, W blocks of a slot's table.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertwire.kernels.gpu.compile import Case

_TOKENS = 128  # a program


@triton.jit(do_not_specialize=["num_tokens"])
def look_up_kernel(
    slot_ptr,
    position_ptr,
    tokens_ptr,
    blocks_ptr,
    token_out_ptr,
    position_out_ptr,
    mapping_out_ptr,
    num_tokens,
    tokens_stride,
    blocks_stride,
    block_size,
    TOKENS: tl.constexpr,
):
    t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    inside = t < num_tokens
    slot = tl.load(slot_ptr + t, mask=inside, other=-1).to(tl.int64)
    position = tl.load(position_ptr + t, mask=inside, other=0).to(tl.int64)
    taken = slot >= 0
    token = tl.load(tokens_ptr + slot * tokens_stride + position, mask=taken, other=0)
    block = tl.load(blocks_ptr + slot * blocks_stride + position // block_size, mask=taken, other=0).to(tl.int64)
    mapping = tl.where(taken, block * block_size + position % block_size, -1)
    tl.store(token_out_ptr + t, token.to(tl.int64), mask=inside)
    tl.store(position_out_ptr + t, position, mask=inside)
    tl.store(mapping_out_ptr + t, mapping, mask=inside)


def look_up(
    slot_T: Tensor, position_T: Tensor, tokens_SL: Tensor, blocks_SW: Tensor, block_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, positions and slot mapping, i64 [T], of the tokens at these slots and positions; all tables and arguments i32.

    A slot of -1 is no token: its id is 0 and its mapping -1.
    """
    num_tokens = slot_T.shape[0]
    assert slot_T.shape == position_T.shape, f"{tuple(slot_T.shape)} slots, {tuple(position_T.shape)} positions"
    assert tokens_SL.stride(1) == blocks_SW.stride(1) == 1, f"strides {tokens_SL.stride()}, {blocks_SW.stride()}"
    out = tuple(torch.empty(num_tokens, dtype=torch.int64, device=slot_T.device) for _ in range(3))
    if num_tokens:
        look_up_kernel[(triton.cdiv(num_tokens, _TOKENS),)](
            slot_T,
            position_T,
            tokens_SL,
            blocks_SW,
            *out,
            num_tokens,
            tokens_SL.stride(0),
            blocks_SW.stride(0),
            block_size,
            TOKENS=_TOKENS,
        )
    return out


def cases() -> list[Case]:
    i32, i64 = torch.int32, torch.int64
    pointers = {"slot_ptr": i32, "position_ptr": i32, "tokens_ptr": i32, "blocks_ptr": i32}
    outputs = {"token_out_ptr": i64, "position_out_ptr": i64, "mapping_out_ptr": i64}
    sizes = {"num_tokens": 256, "tokens_stride": 32769, "blocks_stride": 2048, "block_size": 16}
    return [
        Case(
            name="batch.look_up",
            kernel=look_up_kernel,
            args=pointers | outputs | sizes,
            constexprs={"TOKENS": _TOKENS},
            expect={90: "", 100: ""},
            wide=False,  # a few numbers
        )
    ]
