"""The all-to-all that an engine's options and its model ask for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import torch

from expertwire.comm.all_to_all.base import AllToAllSpec
from expertwire.comm.group import Group
from expertwire.engine.config.engine_config import EngineConfig
from expertwire.engine.config.validation import exchange_tokens, sends_fp8
from expertwire.engine.models.model_config import ModelConfig


class Exchange(NamedTuple):
    """An all-to-all to build.

    Attributes:
        is_fp8: whether activations are dispatched in fp8.
        max_tokens: most tokens of a rank in one exchange, if a step can have more (`RankContext.exchange_tokens`).
    """

    spec: AllToAllSpec
    is_fp8: bool
    max_tokens: int | None


def exchange_of(
    config: EngineConfig,
    model: ModelConfig,
    group: Group,
    rank_offsets: tuple[int, ...],
    *,
    on_gpu: bool,
    layers: tuple[int, ...] = (),
    **options: Any,
) -> Exchange:
    """Return the exchange of a rank.

    Args:
        rank_offsets: first physical expert of each rank, and their number.
        layers: the layers that exchange, once a step each; not used where a step takes several exchanges.
        options: more fields of the spec.
    """
    spec = AllToAllSpec(
        group=group,
        rank_offsets=rank_offsets,
        max_tokens=config.micro_batch_tokens,
        hidden_size=model.dispatch_size,
        top_k=model.top_k,
        dtype=getattr(torch, model.dtype),
        layers=layers,
        num_micro_batches=config.num_micro_batches,
        **options,
    )
    is_fp8 = sends_fp8(config, model, on_gpu=on_gpu)
    if on_gpu and group.size > 1:
        tokens = exchange_tokens(config, model, group.size, fp8=is_fp8)
        if tokens < config.micro_batch_tokens:
            return Exchange(replace(spec, max_tokens=tokens, layers=()), is_fp8, tokens)
    return Exchange(spec, is_fp8, None)


@dataclass(frozen=True, kw_only=True)
class _AbsentGroup:
    rank: int
    size: int


def absent_group(rank: int, size: int) -> Group:
    """Return a stand-in for a group whose other ranks are not there, where only its size matters."""
    return cast(Group, _AbsentGroup(rank=rank, size=size))
