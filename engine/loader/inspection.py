"""What a checkpoint is, without loading it: parameters, bytes, memory, and what is not read."""

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
from expertwire.engine.models.model_config import ModelConfig
from expertwire.engine.models.registry import read_model_config
from expertwire.scheduler.config import CacheSpec


@dataclass(frozen=True, kw_only=True)
class Unread:
    """Tensors that are knowingly not read, and why."""

    pattern: str
    why: str
    tensors: int
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """A checkpoint's facts.

    Attributes:
        config: what it is.
        parameters: by kind (`memory.KINDS`); router biases that serve the choice alone do not count, as in published figures.
        stored_bytes: by kind, in the checkpoint's files, or, where there are none, in the format that its config names.
        has_weights: whether there are files.
        rank_bytes: by device ("cpu", "cuda") and kind, in the memory of the rank that holds most, at `ep_size` ranks.
        caches: the model's, and `unread` what a checkpoint holds besides.
    """

    config: ModelConfig
    parameters: dict[str, int]
    stored_bytes: dict[str, int]
    has_weights: bool
    ep_size: int
    rank_bytes: dict[str, dict[str, int]]
    caches: tuple[CacheSpec, ...]
    unread: tuple[Unread, ...]

    @property
    def total(self) -> int:
        """Parameters, a tied head counted once."""
        return sum(self.parameters.values())

    @property
    def active(self) -> int:
        """Parameters that a token meets, with the whole embedding and head."""
        idle = 0
        if self.config.moe is not None:
            moe = self.config.moe
            idle = self.parameters["experts"] * (moe.num_experts - moe.top_k) // moe.num_experts
        return self.total - idle

    def memory_plan(self, context: int, gpu_bytes: int) -> MemoryPlan:
        """Return what the memory of a GPU is for, with requests of `context` tokens and otherwise the options' defaults."""
        held = self.rank_bytes["cuda"]
        return memory_plan.estimate(self._options, self.config, held, context, gpu_bytes)

    def cache_tokens(self, plan: MemoryPlan, context: int) -> int | None:
        """Return how many tokens the caches of a GPU hold; None if they do not hold one request of `context` tokens."""
        config = replace(self._options, max_model_len=context, kv_cache_memory_bytes=max(1, plan.caches))
        try:
            return cache_sizes(config, self.caches, context).num_tokens
        except CacheTooSmall:
            return None

    @property
    def _options(self) -> EngineConfig:
        return EngineConfig(model="", ep_size=self.ep_size, device="cuda", load_format="dummy").on("cuda")

    def cache_bytes(self, context: int) -> dict[str, int]:
        """Of one request of `context` tokens, by cache: a window keeps no more than its tokens."""
        return {
            spec.name: spec.bytes_per_token * min(context, spec.window if spec.window is not None else context)
            for spec in self.caches
        }


def inspect(path: str | Path, ep_size: int = 1, kv_cache_dtype: Literal["auto", "fp8"] = "auto") -> Inspection:
    """Of the checkpoint in folder `path`, which may lack its weights: then its config alone is asked.

    Args:
        ep_size, kv_cache_dtype: as `EngineConfig` has them.

    Raises:
        ValueError: it is not supported, or a tensor is missing, unknown or of the wrong shape or type: names it.
    """
    config = read_model_config(path, kv_cache_dtype=kv_cache_dtype)
    checkpoint = Checkpoint(path) if any(Path(path).glob("*.safetensors*")) else None
    num_experts = config.num_experts
    plain = declare_parameters(replace(config, quantization=None), None, lambda i: range(num_experts))
    tensors = None if checkpoint is None else checkpoint.tensors
    stored = declare_parameters(config, tensors, lambda i: range(num_experts))
    of_rank = declare_parameters(config, tensors, lambda i: range(-(-num_experts // ep_size)))
    dtype = getattr(torch, config.dtype)
    if checkpoint is None:
        stored_bytes = memory.by_kind({name: memory.spec_bytes(spec, dtype) for name, spec in stored.specs.items()})
    else:
        params = weights.allocate(stored.specs, dtype, "meta")
        weights.check(checkpoint, stored.sources, params, [entry.pattern for entry in config.ignored_tensors])
        stored_bytes = _stored_bytes(checkpoint, stored)
    parameters = memory.by_kind(
        {name: math.prod(spec.shape) for name, spec in plain.specs.items() if "choice_bias" not in name}
    )
    return Inspection(
        config=config,
        parameters=parameters,
        stored_bytes=stored_bytes,
        has_weights=checkpoint is not None,
        ep_size=ep_size,
        rank_bytes={device: memory.held_bytes(config, of_rank, device) for device in ("cpu", "cuda")},
        caches=config.cache_specs(),
        unread=(*_unread(config, checkpoint), *_unneeded(stored, checkpoint)),
    )


def _stored_bytes(checkpoint: Checkpoint, layout: ParameterLayout) -> dict[str, int]:
    read = {name: destinations[0].param for name, destinations in layout.sources.items() if destinations}
    found: Counter[str] = Counter()
    for name, param in read.items():
        found[param] += checkpoint.tensors[name].nbytes
    return memory.by_kind(found)


def _unread(config: ModelConfig, checkpoint: Checkpoint | None) -> tuple[Unread, ...]:
    tensors = {} if checkpoint is None else checkpoint.tensors
    found = []
    for entry in config.ignored_tensors:
        sizes = [t.nbytes for name, t in tensors.items() if re.fullmatch(entry.pattern, name)]
        if sizes or checkpoint is None:
            found.append(Unread(pattern=entry.pattern, why=entry.why, tensors=len(sizes), nbytes=sum(sizes)))
    return tuple(found)


def _unneeded(layout: ParameterLayout, checkpoint: Checkpoint | None) -> Iterator[Unread]:
    """Tensors of the decoder that are known and go nowhere, by the ends of their names."""
    sizes: dict[str, list[int]] = {}
    for name, stored in {} if checkpoint is None else checkpoint.tensors.items():
        if layout.sources.get(name) == ():
            sizes.setdefault(name.rpartition(".")[2], []).append(stored.nbytes)
    for end, nbytes in sizes.items():
        why = "known, and not needed: the head is the embedding, or activations or the KV cache are not quantised"
        yield Unread(pattern=rf".*\.{end}", why=why, tensors=len(nbytes), nbytes=sum(nbytes))
