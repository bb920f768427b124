"""`RankModel`: a model on one rank in this process, without an engine, for its logits.

T tokens, V vocabulary, P ranks, C KV cache groups, W entries of a block table.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from expertwire.comm.all_to_all.base import AllToAllSpec
from expertwire.comm.all_to_all.reference import ReferenceAllToAll
from expertwire.comm.group import Group, SoloGroup
from expertwire.engine.layers.step import RankContext
from expertwire.engine.loader.checkpoint import Checkpoint
from expertwire.engine.loader.weights import load_model
from expertwire.engine.models.registry import read_model_config
from expertwire.engine.runner.batch import prompt_batch
from expertwire.engine.runner.micro_batch import split_tokens
from expertwire.kernels import registry as kernels
from expertwire.moe.eplb.placement import Placement, place

BLOCK_SIZE = 16


class RankModel:
    """One rank's part of a model on a CPU, for the number of torch threads set when it is created.

    All ranks of a group call its methods together, with prompts of the same length.

    Args:
        folder: folder of the checkpoint.
        dtype: "auto", "float32" or "bfloat16".
        group: the ranks; None for one rank.
        max_tokens: maximum number of tokens of a prompt and its output; a multiple of 16.
        quantize: `EngineConfig.quantization`.
        kv_cache_dtype: `EngineConfig.kv_cache_dtype`.
        fast: whether `EngineConfig.numerics` is "fast".
        num_micro_batches: in which the tokens of a forward pass are computed.
        snapshot_every: `EngineConfig.snapshot_every`.
    """

    def __init__(
        self,
        folder: Path | str,
        dtype: Literal["auto", "float32", "bfloat16"] = "float32",
        *,
        group: Group | None = None,
        max_tokens: int = 512,
        quantize: str | None = None,
        kv_cache_dtype: Literal["auto", "fp8"] = "auto",
        fast: bool = False,
        num_micro_batches: int = 1,
        snapshot_every: int = 128,
    ) -> None:
        group = SoloGroup() if group is None else group
        config = read_model_config(folder, dtype, kv_cache_dtype, snapshot_every)
        torch_dtype = getattr(torch, config.dtype)
        placement: Placement | None = None
        all_to_alls: tuple[ReferenceAllToAll, ...] = ()
        if config.moe is not None:
            placement = place(config.num_experts, group.size, num_layers=config.num_layers)
            spec = AllToAllSpec(
                group=group,
                rank_offsets=placement.rank_offsets,
                max_tokens=max_tokens,
                hidden_size=config.dispatch_size,
                top_k=config.top_k,
                dtype=torch_dtype,
            )
            all_to_alls = tuple(ReferenceAllToAll(spec) for _ in range(num_micro_batches))
        context = RankContext(
            rank=group.rank,
            dtype=torch_dtype,
            device="cpu",
            ops=kernels.choose("cpu", fast=fast),
            placement=placement,
            all_to_alls=all_to_alls,
        )
        self.config, self._size, self._num_micro_batches = config, group.size, num_micro_batches
        self.model = load_model(config, context, Checkpoint(folder), quantize=quantize)
        self._num_blocks = max_tokens // BLOCK_SIZE
        num_blocks = [self._num_blocks + 1] * len(config.cache_specs())
        self._caches = self.model.allocate(num_blocks=num_blocks, block_size=BLOCK_SIZE, max_model_len=max_tokens)

    @torch.inference_mode()
    def logits(self, ids: Sequence[int], chunk: int | None = None) -> np.ndarray:
        """Return logits, fp32 [T, V], with the prompt computed in chunks of `chunk` tokens."""
        blocks_CW, is_long = self._blocks(len(ids)), self._is_long(len(ids))
        return np.concatenate(list(self._logits(ids, blocks_CW, chunk or len(ids), is_long)))

    @torch.inference_mode()
    def greedy(self, ids: Sequence[int], num: int) -> list[int]:
        """Return the next `num` tokens of greedy decoding."""
        known, blocks_CW, is_long = list(ids), self._blocks(len(ids) + num), self._is_long(len(ids) + num - 1)
        [*_, last] = self._logits(ids, blocks_CW, 64, is_long)
        for _ in range(num):
            known.append(int(last[-1].argmax()))
            last = self._forward(known[-1:], len(known) - 1, blocks_CW, is_long)
        return known[len(ids) :]

    def _is_long(self, num_computed: int) -> bool:
        original = self.config.original_max_position_embeddings
        return original is not None and num_computed > original

    def _blocks(self, length: int) -> np.ndarray:
        """Return a block table for each cache, in random order."""
        rng = np.random.default_rng(length)
        return np.stack([1 + rng.permutation(self._num_blocks) for _ in self._caches]).astype(np.int32)

    def _logits(self, ids: Sequence[int], blocks_CW: np.ndarray, chunk: int, is_long: bool) -> Iterator[np.ndarray]:
        for start in range(0, len(ids), chunk):
            yield self._forward(ids[start : start + chunk], start, blocks_CW, is_long)

    def _forward(self, ids: Sequence[int], start: int, blocks_CW: np.ndarray, is_long: bool) -> np.ndarray:
        batches, begin = [], 0
        for [num] in split_tokens([len(ids)], min(self._num_micro_batches, len(ids))):
            part, num_tokens_P = ids[begin : begin + num], [num] * self._size
            batch = prompt_batch(part, start + begin, blocks_CW, BLOCK_SIZE, num_tokens_P, is_long=is_long)
            batches.append(batch)
            begin += num
        return self.model.logits(self.model.forward(batches, self._caches)).numpy()
