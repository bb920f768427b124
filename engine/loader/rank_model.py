"""A rank's share of a model: its kernels, its experts, its all-to-all and its weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from expertwire.comm.all_to_all import backends
from expertwire.comm.all_to_all.base import AllToAll
from expertwire.comm.all_to_all.stream import on_stream
from expertwire.comm.group import Group
from expertwire.comm.topology import backend_times
from expertwire.engine.config.engine_config import EngineConfig
from expertwire.engine.config.validation import describe_gpu_dispatch
from expertwire.engine.kv_cache import memory, memory_plan
from expertwire.engine.layers.step import RankContext
from expertwire.engine.loader.checkpoint import Checkpoint
from expertwire.engine.loader.weights import load_model
from expertwire.engine.models.decoder import Decoder
from expertwire.engine.models.decoder_parameters import declare_parameters
from expertwire.engine.models.model_config import ModelConfig
from expertwire.engine.runner.exchange import Exchange, exchange_of
from expertwire.kernels import registry as kernels
from expertwire.kernels.registry import Ops
from expertwire.moe.eplb.placement import Placement, place

# Share of the step timeout that an exchange may take: ranks report who stalled, and where, before the controller gives up.
_EXCHANGE_SHARE = 0.9


def load_rank(
    config: EngineConfig,
    model_config: ModelConfig,
    group: Group,
    device: str,
    node: str,
    *,
    sharers: int,
    domains: Sequence[int],
    beat: Callable[[], None],
) -> tuple[Decoder, str]:
    """Return the rank's share of the model, and a description of its all-to-all.

    Args:
        group: all ranks.
        sharers: the ranks on this rank's node.
        domains: every rank's NVLink domain; empty if it does not matter.
        beat: tells the controller that the rank works.

    Raises:
        ValueError: the model does not fit into the GPU's memory, or the checkpoint is not that of the model.
    """
    checkpoint = None if config.load_format == "dummy" else Checkpoint(config.model)
    context, all_to_all = _context(config, model_config, checkpoint, group, device, node, domains=domains, beat=beat)
    compiling = None
    if context.ops.on_device:
        from expertwire.engine.runner import precompile

        compiling = precompile.start(config, model_config, group.rank, group.size, device, domains, sharers)
    model = load_model(
        model_config,
        context,
        checkpoint,
        quantize=config.quantization,
        seed=config.seed,
        sharers=sharers if device == "cpu" else 1,
        progress=group.rank == 0,
    )
    if compiling is not None:
        compiling.wait()
    return model, all_to_all


def _context(
    config: EngineConfig,
    model_config: ModelConfig,
    checkpoint: Checkpoint | None,
    group: Group,
    device: str,
    node: str,
    *,
    domains: Sequence[int],
    beat: Callable[[], None],
) -> tuple[RankContext, str]:
    """Return what the rank's layers are built with, and a description of its all-to-all."""
    placement: Placement | None = None
    all_to_alls: tuple[AllToAll, ...] = ()
    all_to_all, exchange_tokens = "", None
    ops = kernels.choose(device, fast=config.numerics == "fast", attention=config.attention_backend)
    if any(model_config.sparse_layers):
        redundant, num_layers = config.num_redundant_experts, model_config.num_layers
        placement = place(model_config.num_experts, group.size, redundant, num_layers, domains)
    if device != "cpu":
        _check_fits(config, model_config, checkpoint, group.rank, device, placement)
    if placement is not None:
        exchange = exchange_of(
            config,
            model_config,
            group,
            placement.rank_offsets,
            on_gpu=ops.on_device,
            layers=tuple(np.flatnonzero(model_config.sparse_layers).tolist()),
            timeout_s=_EXCHANGE_SHARE * config.step_timeout_s,
        )
        exchange_tokens = exchange.max_tokens
        all_to_alls, all_to_all = _all_to_alls(config, exchange, ops, node, device)
    context = RankContext(
        rank=group.rank,
        dtype=getattr(torch, model_config.dtype),
        device=device,
        ops=ops,
        placement=placement,
        all_to_alls=all_to_alls,
        exchange_tokens=exchange_tokens,
        beat=beat,
    )
    return context, all_to_all


def _check_fits(
    config: EngineConfig,
    model: ModelConfig,
    checkpoint: Checkpoint | None,
    rank: int,
    device: str,
    placement: Placement | None,
) -> None:
    """Refuse a model that does not fit into the GPU, before anything is allocated there."""

    def experts_of(layer: int) -> Sequence[int]:
        assert placement is not None, f"{model.architecture} has experts but no placement"
        return placement.experts_of(rank, layer)

    layout = declare_parameters(model, None if checkpoint is None else checkpoint.tensors, experts_of)
    fast = config.numerics == "fast"
    held = memory.held_bytes(model, layout, device, quantize=config.quantization, fast=fast)
    longest = config.max_model_len or model.max_position_embeddings
    total = torch.cuda.mem_get_info(device)[1]
    memory_plan.check(memory_plan.estimate(config, model, held, longest, total))


def _all_to_alls(
    config: EngineConfig, exchange: Exchange, ops: Ops, node: str, device: str
) -> tuple[tuple[AllToAll, ...], str]:
    """Return the all-to-all of each micro-batch, and a description of them."""
    table = None if config.all2all_table is None else backend_times.read(config.all2all_table)
    spec, fp8, _ = exchange
    made, choice = backends.build(config.all2all_backend, spec, ops, node, device, fp8=fp8, table=table)
    description = (
        str(choice) if device == "cpu" else f"{choice}; {describe_gpu_dispatch(graph_safe=made[0].graph_safe, fp8=fp8)}"
    )
    if spec.num_micro_batches > 1 and device != "cpu":
        made = tuple(map(on_stream, made))
    return made, description if spec.group.size > 1 else ""
