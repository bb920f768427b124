"""Copies of blocks within all tensors of a cache group in one launch: `kernels.ops.copy_blocks` in Triton.

M blocks copied, N tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertwire.kernels.ops.copy_blocks import CopyBlocks

CHUNK_WORDS = 1024
_WORD = 4  # bytes


@triton.jit
def copy_blocks_kernel(address_ptr, words_ptr, source_ptr, target_ptr, CHUNK: tl.constexpr):
    """Grid (M, N): addresses and words of a block, i64 [N]; sources and targets, i64 [M]."""
    m, tensor = tl.program_id(0), tl.program_id(1)
    blocks, words = tl.load(address_ptr + tensor).to(tl.pointer_type(tl.int32)), tl.load(words_ptr + tensor)
    source, target = blocks + tl.load(source_ptr + m) * words, blocks + tl.load(target_ptr + m) * words
    for start in range(0, words, CHUNK):
        at = start + tl.arange(0, CHUNK)
        tl.store(target + at, tl.load(source + at, mask=at < words, other=0), mask=at < words)


def prepare(tensors: Sequence[Tensor]) -> CopyBlocks:
    """As `kernels.ops.copy_blocks.PrepareCopyBlocks`."""
    words = [blocks[0].nbytes // _WORD for blocks in tensors]
    for blocks, num in zip(tensors, words, strict=True):
        assert blocks.is_contiguous(), f"strides {blocks.stride()} of shape {tuple(blocks.shape)}"
        assert blocks[0].nbytes == num * _WORD, f"blocks of {blocks[0].nbytes} bytes"
    device = tensors[0].device
    words_N = torch.tensor(words, dtype=torch.int64, device=device)
    address_N = torch.tensor([blocks.data_ptr() for blocks in tensors], dtype=torch.int64, device=device)

    def copy(source_M: Tensor, target_M: Tensor) -> None:
        copy_blocks_kernel[len(source_M), len(tensors)](address_N, words_N, source_M, target_M, CHUNK=CHUNK_WORDS)

    return copy
