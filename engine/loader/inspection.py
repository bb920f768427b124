"""Inspection of a checkpoint without loading it: parameters, bytes, memory, and tensors that are not loaded."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from expertwire.engine.config.engine_config import EngineConfig
from expertwire.engine.kv_cache import memory, memory_plan
from expertwire.engine.kv_cache.cache_sizes import CacheTooSmall, cache_sizes
from expertwire.engine.kv_cache.memory_plan import MemoryPlan
from expertwire.engine.loader import weights
from expertwire.engine.loader.checkpoint import Checkpoint
from expertwire.engine.loader.parameters import ParameterLayout
from expertwire.engine.models.decoder_parameters import declare_parameters
from expertwire.engine.models.model_config import IgnoredTensors, ModelConfig
from expertwire.engine.models.registry import read_model_config
from expertwire.scheduler.config import CacheSpec


@dataclass(frozen=True, kw_only=True)
class IgnoredCount:
    """The number and the bytes of a checkpoint's tensors that are not loaded for one reason."""

    tensors: IgnoredTensors
    number: int
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """Facts about a checkpoint.

    Attributes:
        config: the model's configuration.
        parameters: number of parameters by kind (`memory.KINDS`), without biases for the choice of experts, as published figures.
        stored_bytes: bytes by kind: in the files or, without files, in the format that the config names.
        has_weights: whether there are files.
        ep_size: number of ranks.
        rank_bytes: bytes by device ("cpu", "cuda") and kind, in the memory of the rank that holds most.
        caches: the model's KV caches.
        ignored: tensors that are not loaded.
    """

    config: ModelConfig
    parameters: dict[str, int]
    stored_bytes: dict[str, int]
    has_weights: bool
    ep_size: int
    rank_bytes: dict[str, dict[str, int]]
    caches: tuple[CacheSpec, ...]
    ignored: tuple[IgnoredCount, ...]

    @property
    def total(self) -> int:
        """The number of parameters; a tied head counts once."""
        return sum(self.parameters.values())

    @property
    def active(self) -> int:
        """The number of parameters that are used for a token, with the whole embedding and head."""
        if self.config.moe is None:
            return self.total
        num_experts, top_k = self.config.num_experts, self.config.top_k
        return self.total - self.parameters["experts"] * (num_experts - top_k) // num_experts

    def memory_plan(self, context: int, gpu_bytes: int) -> MemoryPlan:
        """Return the use of a GPU's memory for requests of `context` tokens and otherwise default options."""
        return memory_plan.estimate(self._options, self.config, self.rank_bytes["cuda"], context, gpu_bytes)

    def cache_tokens(self, plan: MemoryPlan, context: int) -> int | None:
        """Return how many tokens a GPU's caches hold; None if they do not hold a request of `context` tokens."""
        config = replace(self._options, max_model_len=context, kv_cache_memory_bytes=max(1, plan.caches))
        try:
            return cache_sizes(config, self.caches, context).num_tokens
        except CacheTooSmall:
            return None

    @property
    def _options(self) -> EngineConfig:
        return EngineConfig(model="", ep_size=self.ep_size, device="cuda", load_format="dummy").on("cuda")

    def cache_bytes(self, context: int) -> dict[str, int]:
        """Return the bytes of a request of `context` tokens by cache.

        A window and a chunk keep no more than their own tokens, and there is one state.
        """

        def kept(spec: CacheSpec) -> int:
            if spec.kind == "state":
                return 1
            return min(context, spec.chunk_size or spec.window or context)

        return {spec.name: spec.bytes_per_token * kept(spec) for spec in self.caches}


def inspect(path: str | Path, ep_size: int = 1, kv_cache_dtype: Literal["auto", "fp8"] = "auto") -> Inspection:
    """Return the facts about the checkpoint in folder `path`, or about its config if it has no weights.

    Args:
        path: the folder.
        ep_size, kv_cache_dtype: as `EngineConfig` has them.

    Raises:
        ValueError: the checkpoint is not supported, or a tensor is missing, unknown or has a wrong shape or type.
    """
    config = read_model_config(path, kv_cache_dtype=kv_cache_dtype)
    checkpoint = Checkpoint(path) if any(Path(path).glob("*.safetensors*")) else None
    tensors = None if checkpoint is None else checkpoint.tensors
    all_experts, dtype = range(config.num_experts), getattr(torch, config.dtype)
    plain = declare_parameters(replace(config, quantization=None), None, lambda i: all_experts)
    stored = declare_parameters(config, tensors, lambda i: all_experts)
    of_rank = declare_parameters(config, tensors, lambda i: all_experts[: -(-config.num_experts // ep_size)])
    if checkpoint is None:
        nbytes = {name: memory.spec_bytes(spec, dtype) for name, spec in stored.specs.items()}
    else:
        params = weights.allocate(stored.specs, dtype, "meta")
        weights.check(checkpoint, stored.sources, params, [entry.pattern for entry in config.ignored_tensors])
        nbytes = _stored_bytes(checkpoint, stored)
    sizes = {name: math.prod(spec.shape) for name, spec in plain.specs.items() if "choice_bias" not in name}
    return Inspection(
        config=config,
        parameters=memory.by_kind(sizes),
        stored_bytes=memory.by_kind(nbytes),
        has_weights=checkpoint is not None,
        ep_size=ep_size,
        rank_bytes={device: memory.held_bytes(config, of_rank, device) for device in ("cpu", "cuda")},
        caches=config.cache_specs(),
        ignored=(*_ignored(config, checkpoint), *_not_needed(stored, checkpoint)),
    )


def _stored_bytes(checkpoint: Checkpoint, layout: ParameterLayout) -> Counter[str]:
    found: Counter[str] = Counter()
    for name, destinations in layout.sources.items():
        if destinations:
            found[destinations[0].param] += checkpoint.tensors[name].nbytes
    return found


def _ignored(config: ModelConfig, checkpoint: Checkpoint | None) -> Iterator[IgnoredCount]:
    tensors = {} if checkpoint is None else checkpoint.tensors
    for entry in config.ignored_tensors:
        sizes = [t.nbytes for name, t in tensors.items() if re.fullmatch(entry.pattern, name)]
        if sizes or checkpoint is None:
            yield IgnoredCount(tensors=entry, number=len(sizes), nbytes=sum(sizes))


def _not_needed(layout: ParameterLayout, checkpoint: Checkpoint | None) -> Iterator[IgnoredCount]:
    """Yield the decoder's tensors that are known and not needed, by the last part of their names."""
    sizes: dict[str, list[int]] = {}
    for name, stored in {} if checkpoint is None else checkpoint.tensors.items():
        if layout.sources.get(name) == ():
            sizes.setdefault(name.rpartition(".")[2], []).append(stored.nbytes)
    why = "known, and not needed: the head is the embedding, or activations or the KV cache are not quantised"
    for end, found in sizes.items():
        entry = IgnoredTensors(pattern=rf".*\.{end}", why=why)
        yield IgnoredCount(tensors=entry, number=len(found), nbytes=sum(found))
