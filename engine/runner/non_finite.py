"""Log which requests have logits that are not finite. Nothing here runs in other steps.

C KV cache groups, W, S slots.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from expertwire.engine.kv_cache.caches import NamedCache
from expertwire.engine.runner.micro_batch import MicroBatch
from expertwire.kernels.ops.attention import as_bytes
from expertwire.scheduler.plan import StepResult

_log = logging.getLogger(__name__)


def log(
    result: StepResult, step: MicroBatch, caches: Sequence[NamedCache], block_tables: Tensor, block_size: int
) -> None:
    """Log which slots of a step have logits that are not finite, if any, and where one of them comes from.

    `block_tables`: [groups, slots, blocks].
    """
    sampled, prompts = result.token_O < 0, np.isnan(result.prompt_logprob)
    if not (sampled.any() or prompts.any()):
        return
    slots = np.unique(np.concatenate((result.slot_O[sampled], result.prompt_slot[prompts]))).tolist()
    first = next(slot for slot in slots if slot in step.slot_S)  # not one that samples as another slot does
    position = int(step.seq_len_S[step.slot_S == first].max()) - 1
    layer = _first_layer(caches, block_tables[:, first], position, block_size)
    where = "all caches are finite" if layer is None else f"the first layer with such numbers in its cache is {layer}"
    _log.error(
        "step %d, rank %d: the logits of slot(s) %s are not finite; for the token at position %d of slot %d, %s",
        result.step,
        result.rank,
        ", ".join(map(str, slots)),
        position,
        first,
        where,
    )


def _first_layer(caches: Sequence[NamedCache], tables_CW: Tensor, position: int, block_size: int) -> int | None:
    """Return the first layer with a number that is not finite in its cache of the tokens up to a position, or None."""
    wrong = []
    for cache, table_W in zip(caches, tables_CW, strict=True):
        if cache.spec.kind == "state":
            block = int(table_W[position // cache.spec.tokens_per_block(block_size)])
            wrong += [
                layer
                for layer, tensors in cache.layers.items()
                if not all(tensor[block].isfinite().all() for tensor in tensors)
            ]
            continue
        if cache.spec.kind == "chunk":  # what it holds of other tokens is in no order
            continue
        at = torch.arange(position + 1, device=table_W.device)
        blocks, offsets = table_W[at // block_size].long(), at % block_size
        held = blocks > 0  # block 0 stands for blocks that have slid out of a window
        wrong += [
            layer
            for layer, tensors in cache.layers.items()
            if not all(_at(tensor, blocks[held], offsets[held]).isfinite().all() for tensor in tensors)
        ]
    return min(wrong, default=None)


def _at(tensor: Tensor, blocks: Tensor, offsets: Tensor) -> Tensor:
    """Return the cached values of some tokens, in fp32; an fp8 cache is read as bytes."""
    return as_bytes(tensor)[blocks, offsets].view(tensor.dtype).float()
