"""Copies of blocks within the tensors of a cache group: what a fork does with its last block.

M blocks copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Protocol

from torch import Tensor

from expertwire.kernels.ops.attention import as_bytes


class CopyBlocks(Protocol):
    """Copies of blocks within the tensors that it was prepared for."""

    def __call__(self, source_M: Tensor, target_M: Tensor) -> None:
        """Copy block `source_M[m]` of each tensor to its block `target_M[m]`, i64. No block is both a source and a target."""
        ...


class PrepareCopyBlocks(Protocol):
    """Preparation for the tensors of a cache group."""

    def __call__(self, tensors: Sequence[Tensor]) -> CopyBlocks:
        """Return the copies within contiguous tensors [blocks, ...], which must stay where they are."""
        ...


def reference(tensors: Sequence[Tensor], source_M: Tensor, target_M: Tensor) -> None:
    """Copy the blocks of one tensor after the other."""
    for blocks in map(as_bytes, tensors):
        blocks.index_copy_(0, target_M, blocks.index_select(0, source_M))


def prepare(tensors: Sequence[Tensor]) -> CopyBlocks:
    """As `PrepareCopyBlocks`."""
    return partial(reference, tensors)
