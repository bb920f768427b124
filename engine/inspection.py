"""What a checkpoint is, without loading it: parameters, bytes, memory, and what is not read."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from expertwire.engine import weights
from expertwire.engine.checkpoint import Checkpoint
from expertwire.engine.declaration import declare
from expertwire.engine.hub_config import read_model_config
from expertwire.engine.layout import Layout
from expertwire.engine.model_config import ModelConfig
from expertwire.engine.models import registry
from expertwire.engine.weight_map import ParamSpec
from expertwire.scheduler.plan import CacheSpec

# A parameter's kind, by the first of these that its name within the layer begins with; anything else is attention.
_KINDS = (
    ("embed", "embedding"),
    ("lm_head", "head"),
    ("w13", "experts"),
    ("w2", "experts"),
    ("shared.", "shared experts"),
    ("router", "routers"),
    ("choice_bias", "routers"),
    ("gate_up", "dense MLPs"),
    ("down", "dense MLPs"),
    ("indexer.", "indexers"),
    ("input_norm", "norms"),
    ("post_norm", "norms"),
    ("norm", "norms"),
)
KINDS = (*dict.fromkeys(kind for _, kind in _KINDS), "attention")


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
        parameters: by kind (`KINDS`); router biases that serve the choice alone do not count, as in published figures.
        stored_bytes: by kind, in the checkpoint's files, or, where there are none, in the format that its config names.
        has_weights: whether there are files.
        rank_bytes: by kind, in the memory of the rank that holds most, at `ep_size` ranks; experts as they are stored.
        caches: the model's, and `unread` what a checkpoint holds besides.
    """

    config: ModelConfig
    parameters: dict[str, int]
    stored_bytes: dict[str, int]
    has_weights: bool
    ep_size: int
    rank_bytes: dict[str, int]
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

    def cache_bytes(self, context: int) -> dict[str, int]:
        """Of one request of `context` tokens, by cache: a window keeps no more than its tokens."""
        return {
            spec.name: spec.bytes_per_token * min(context, spec.window if spec.window is not None else context)
            for spec in self.caches
        }


def inspect(path: str | Path, ep_size: int = 1) -> Inspection:
    """Of the checkpoint in folder `path`, which may lack its weights: then its config alone is asked.

    Raises:
        ValueError: it is not supported, or a tensor is missing, unknown or of the wrong shape or type: names it.
    """
    config = read_model_config(path)
    checkpoint = Checkpoint(path) if any(Path(path).glob("*.safetensors*")) else None
    names = registry.FAMILIES[config.architecture].names
    num_experts = config.num_experts
    plain = Layout(stored=None, quantization=None)
    declare(config, names, plain, lambda i: range(num_experts))
    stored = Layout(stored=None if checkpoint is None else checkpoint.tensors, quantization=config.quantization)
    declare(config, names, stored, lambda i: range(num_experts))
    dtype = getattr(torch, config.dtype)
    if checkpoint is None:
        stored_bytes = _by_kind({name: _nbytes(spec, dtype) for name, spec in stored.specs.items()})
    else:
        params = weights.allocate(stored.specs, dtype, "meta")
        weights.check(checkpoint, stored.sources, params, [entry.pattern for entry in config.skipped])
        stored_bytes = _stored_bytes(checkpoint, stored)
    parameters = _by_kind(
        {name: math.prod(spec.shape) for name, spec in plain.specs.items() if "choice_bias" not in name}
    )
    return Inspection(
        config=config,
        parameters=parameters,
        stored_bytes=stored_bytes,
        has_weights=checkpoint is not None,
        ep_size=ep_size,
        rank_bytes=_rank_bytes(config, plain, stored, ep_size),
        caches=config.cache_specs(),
        unread=(*_unread(config, checkpoint), *_unneeded(stored, checkpoint)),
    )


def _nbytes(spec: ParamSpec, dtype: torch.dtype) -> int:
    return math.prod(spec.shape) * (spec.dtype or dtype).itemsize


def _kind(param: str) -> str:
    name = re.sub(r"^layers\.\d+\.", "", param)
    return next((kind for prefix, kind in _KINDS if name.startswith(prefix)), "attention")


def _by_kind(numbers: dict[str, int]) -> dict[str, int]:
    """Sums, of the kinds that there are."""
    found: Counter[str] = Counter()
    for param, number in numbers.items():
        found[_kind(param)] += number
    return {kind: found[kind] for kind in KINDS if found[kind]}


def _stored_bytes(checkpoint: Checkpoint, layout: Layout) -> dict[str, int]:
    found: Counter[str] = Counter()
    for name, destinations in layout.sources.items():
        if destinations:
            found[_kind(destinations[0].param)] += checkpoint.tensors[name].nbytes
    return {kind: found[kind] for kind in KINDS if found[kind]}


def _rank_bytes(config: ModelConfig, plain: Layout, stored: Layout, ep_size: int) -> dict[str, int]:
    """Experts stay as they are stored, everything else is unpacked."""
    dtype = getattr(torch, config.dtype)
    found = _by_kind({name: _nbytes(spec, dtype) for name, spec in plain.specs.items()})
    if config.moe is not None:
        here = -(-config.num_experts // ep_size)
        experts = _by_kind({name: _nbytes(spec, dtype) for name, spec in stored.specs.items()})["experts"]
        found["experts"] = experts * here // config.num_experts
    return found


def _unread(config: ModelConfig, checkpoint: Checkpoint | None) -> tuple[Unread, ...]:
    tensors = {} if checkpoint is None else checkpoint.tensors
    found = []
    for entry in config.skipped:
        sizes = [t.nbytes for name, t in tensors.items() if re.fullmatch(entry.pattern, name)]
        if sizes or checkpoint is None:
            found.append(Unread(pattern=entry.pattern, why=entry.why, tensors=len(sizes), nbytes=sum(sizes)))
    return tuple(found)


def _unneeded(layout: Layout, checkpoint: Checkpoint | None) -> Iterator[Unread]:
    """Tensors of the decoder that are known and go nowhere, by the ends of their names."""
    sizes: dict[str, list[int]] = {}
    for name, stored in {} if checkpoint is None else checkpoint.tensors.items():
        if layout.sources.get(name) == ():
            sizes.setdefault(name.rpartition(".")[2], []).append(stored.nbytes)
    for end, nbytes in sizes.items():
        why = "known, and not needed: the head is the embedding, or activations are not quantised"
        yield Unread(pattern=rf".*\.{end}", why=why, tensors=len(nbytes), nbytes=sum(nbytes))
