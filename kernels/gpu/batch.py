"""A step's tokens and where their keys go, looked up in the tables that a rank keeps on its GPU.

T tokens of the step, S slots, L tokens of a slot, C caches, W blocks of a slot's table.
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


def look_up(
    slot_T: Tensor, position_T: Tensor, tokens_SL: Tensor, blocks_CSW: Tensor, block_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids and positions, i64 [T], and the slot mapping of each cache, i64 [C, T], of the tokens at these slots and
    positions; all tables and arguments i32.

    A slot of -1 is no token: its id is 0 and its mapping -1.
    """
    num_tokens = slot_T.shape[0]
    assert slot_T.shape == position_T.shape, f"{tuple(slot_T.shape)} slots, {tuple(position_T.shape)} positions"
    assert tokens_SL.stride(1) == blocks_CSW.stride(2) == 1, f"strides {tokens_SL.stride()}, {blocks_CSW.stride()}"
    shapes = (num_tokens,), (num_tokens,), (len(blocks_CSW), num_tokens)
    out = tuple(torch.empty(shape, dtype=torch.int64, device=slot_T.device) for shape in shapes)
    if num_tokens:
        look_up_kernel[(triton.cdiv(num_tokens, _TOKENS), len(blocks_CSW))](
            slot_T,
            position_T,
            tokens_SL,
            blocks_CSW,
            *out,
            num_tokens,
            tokens_SL.stride(0),
            blocks_CSW.stride(0),
            blocks_CSW.stride(1),
            block_size,
            TOKENS=_TOKENS,
        )
    return out


def cases() -> list[Case]:
    i32, i64 = torch.int32, torch.int64
    pointers = {"slot_ptr": i32, "position_ptr": i32, "tokens_ptr": i32, "blocks_ptr": i32}
    outputs = {"token_out_ptr": i64, "position_out_ptr": i64, "mapping_out_ptr": i64}
    sizes = {"num_tokens": 256, "tokens_stride": 32769, "cache_stride": 524288, "blocks_stride": 2048, "block_size": 16}
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
