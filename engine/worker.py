"""A rank's process: join the controller and the other ranks, load, then run plans until the controller is gone.

What is said before the first plan, each a round of one message to every rank and one answer of each:

    controller: {}                                      rank: {"node", "store": address, of rank 0 only}
    controller: {"store", "sharers": ranks on each      rank: {"free": bytes left after loading, "device",
                 rank's node}                                        "all_to_all": which, and why, "place": its
                                                                     NVLink domain and what fails with it}
    controller: {"num_blocks": of each cache,           rank: {}
                 "max_model_len"}

A rank that fails answers so (`ControlLink.fail`) instead, and waits for the end.
"""

from __future__ import annotations

import contextlib
import os
import traceback
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from expertwire.comm import backends, topology, topology_probe, topology_table
from expertwire.comm import group as groups
from expertwire.comm.a2a_stream import on_stream
from expertwire.comm.all_to_all import AllToAll, AllToAllSpec, RankStalled
from expertwire.comm.control import ChannelClosed, ControlLink
from expertwire.engine import device_graphs, weights
from expertwire.engine.caches import NamedCache
from expertwire.engine.checkpoint import Checkpoint
from expertwire.engine.config import EngineConfig
from expertwire.engine.decoder import Decoder
from expertwire.engine.hub_config import read_model_config
from expertwire.engine.layers.step import RankContext
from expertwire.engine.loading import load
from expertwire.engine.model_config import ModelConfig
from expertwire.engine.rank_loop import Steps, serve
from expertwire.engine.runner import Runner
from expertwire.engine.slots import Slots
from expertwire.engine.travel import on_gpus, sends_fp8
from expertwire.kernels import registry as kernels
from expertwire.kernels.registry import Ops
from expertwire.moe.mover import Mover
from expertwire.moe.placement import Placement, place

# An exchange may take so much of a step's time, so that the ranks say who stalled, and where, before the controller gives up.
_EXCHANGE_SHARE = 0.9


def worker_main(config: EngineConfig, rank: int, num_ranks: int, address: str, token: str, node: str) -> None:
    """Run rank `rank` until the controller closes the connection; the entry point of every launcher."""
    link = ControlLink(address, token, rank=rank, node=node, hello={})
    # The group is closed after the report: the other ranks would fail, and be blamed, before this one has said why.
    with contextlib.ExitStack() as closing:
        closing.callback(link.close)
        try:
            serve(link, _start(config, rank, num_ranks, node, link, closing))
        except ChannelClosed:
            pass
        except Exception as error:  # noqa: BLE001 - whatever it is, the controller must hear of it
            _report(link, error)


def _report(link: ControlLink, error: Exception) -> None:
    """Answer with the error and wait until the controller has taken it in and closes."""
    for_users = isinstance(error, (ValueError, RankStalled))
    text = str(error) if for_users else "".join(traceback.format_exception(error)).strip()
    stall = {"stall": np.array(error.order)} if isinstance(error, RankStalled) else {}
    with contextlib.suppress(ChannelClosed):
        link.fail(text or repr(error), **stall)
        while True:
            link.recv()


def _start(
    config: EngineConfig, rank: int, num_ranks: int, node: str, link: ControlLink, closing: contextlib.ExitStack
) -> Steps:
    link.recv()
    device = _device(config, rank)
    store, store_address = None, ""
    if rank == 0 and num_ranks > 1:
        store, store_address = groups.serve_store(link.local_ip)
    link.send({"node": _bytes(node), "store": _bytes(store_address)})
    meeting = _told(link)
    store_address, sharers = bytes(meeting["store"]).decode(), int(meeting["sharers"][rank])

    torch.set_num_threads(config.threads_per_rank or max(1, len(os.sched_getaffinity(0)) // sharers))
    group = groups.make_group(
        store_address=store_address,
        rank=rank,
        size=num_ranks,
        device=device.split(":")[0],
        local_ip=link.local_ip,
        timeout_s=config.step_timeout_s,
        master=store,
    )
    closing.callback(group.close)
    model_config = read_model_config(config.model, config.dtype)
    domain_P, failing_P = _places(config, group, node, device)
    model, travel = _load(config, model_config, rank, num_ranks, node, sharers, device, group, domain_P)
    free = np.array([weights.free_memory(device)])
    place_2 = np.array([*domain_P[rank : rank + 1], *failing_P[rank : rank + 1]], np.int64)
    link.send({"free": free, "device": _bytes(device.split(":")[0]), "all_to_all": _bytes(travel), "place": place_2})

    sizes = _told(link)
    num_blocks, max_model_len = sizes["num_blocks"].tolist(), int(sizes["max_model_len"][0])
    caches = model.allocate(num_blocks=num_blocks, block_size=config.block_size, max_model_len=max_model_len)
    runner = _make_runner(config, model, caches, max_model_len, num_ranks, group)
    link.send({})
    return runner


def _told(link: ControlLink) -> dict[str, np.ndarray]:
    """What the controller says next."""
    message = link.recv()
    assert message is not None, "without a time limit there is a message"
    return message


def _make_runner(
    config: EngineConfig,
    model: Decoder,
    caches: list[NamedCache],
    max_model_len: int,
    num_ranks: int,
    group: groups.Group,
) -> Steps:
    """Warmed up: on a GPU, graphs are captured now, so that running out of memory is found before anyone is served."""
    device, rank = model.context.device, model.context.rank
    specs = [cache.spec for cache in caches]
    sizes = {"num_slots": config.max_running, "max_model_len": max_model_len, "block_size": config.block_size}
    mover = None
    if config.rebalance_steps:
        assert model.context.placement is not None, "a dense model's experts cannot move"
        layers = {i: layer.moe for i, layer in enumerate(model.layers) if layer.moe is not None}
        mover = Mover(layers, model.context.placement, group)
    if model.context.ops.on_device:
        from expertwire.engine.device_runner import DeviceRunner  # Triton is of no use elsewhere
        from expertwire.engine.device_slots import DeviceSlots

        on_device = DeviceRunner(
            model=model,
            caches=caches,
            slots=DeviceSlots(**sizes, specs=specs, device=device),
            rank=rank,
            num_ranks=num_ranks,
            num_parts=config.num_parts,
            capture=device_graphs.cuda(),
            mover=mover,
        )
        on_device.warm_up(config.part_tokens, config.max_running)
        return on_device
    slots = Slots(**sizes, specs=specs, device=device)
    runner = Runner(model=model, caches=caches, slots=slots, rank=rank, num_parts=config.num_parts, mover=mover)
    runner.warm_up(num_ranks, config.part_tokens)
    return runner


def _load(
    config: EngineConfig,
    model_config: ModelConfig,
    rank: int,
    num_ranks: int,
    node: str,
    sharers: int,
    device: str,
    group: groups.Group,
    domains: Sequence[int],
) -> tuple[Decoder, str]:
    """The rank's share of the model, and how its tokens travel."""
    dtype = getattr(torch, model_config.dtype)
    placement: Placement | None = None
    all_to_alls: tuple[AllToAll, ...] = ()
    travel = ""
    ops = kernels.choose(device, fast=config.numerics == "fast")
    if any(model_config.sparse_layers):
        redundant, num_layers = config.redundant_experts, model_config.num_layers
        placement = place(model_config.num_experts, num_ranks, redundant, num_layers, domains)
        spec = AllToAllSpec(
            group=group,
            rank_offsets=placement.rank_offsets,
            max_tokens=config.part_tokens,
            hidden_size=model_config.hidden_size,
            top_k=model_config.top_k,
            dtype=dtype,
            layers=tuple(np.flatnonzero(model_config.sparse_layers).tolist()),
            timeout_s=_EXCHANGE_SHARE * config.step_timeout_s,
            num_parts=config.num_parts,
        )
        fp8 = sends_fp8(config, model_config, on_gpu=ops.on_device)
        all_to_alls, travel = _all_to_alls(config, spec, ops, node, device, fp8=fp8)
    context = RankContext(
        rank=rank,
        dtype=dtype,
        device=device,
        ops=ops,
        placement=placement,
        all_to_alls=all_to_alls,
    )
    model = load(
        model_config,
        context,
        None if config.load_format == "dummy" else Checkpoint(config.model),
        quantize=config.quantize,
        seed=config.seed,
        sharers=sharers if device == "cpu" else 1,
        progress=rank == 0,
    )
    return model, travel


def _places(config: EngineConfig, group: groups.Group, node: str, device: str) -> tuple[Sequence[int], Sequence[int]]:
    """Every rank's NVLink domain, and what fails with it; nothing where no expert has replicas, so that nothing depends on it."""
    if not config.redundant_experts:
        return (), ()
    if config.topology is not None:
        found = topology.read(config.topology).first(group.size)
    else:
        found = topology_probe.assemble(topology_probe.gather(group, topology_probe.probe(node, device), device))
    return found.domain_P().tolist(), found.failure_domain_P().tolist()


def _all_to_alls(
    config: EngineConfig, spec: AllToAllSpec, ops: Ops, node: str, device: str, *, fp8: bool
) -> tuple[tuple[AllToAll, ...], str]:
    """One for each part of a step, as what one has to say or to store never meets another's; and which they are."""
    table = None if config.all_to_all_table is None else topology_table.read(config.all_to_all_table)
    made: list[AllToAll] = []
    for part in range(spec.num_parts):
        of_part = replace(spec, part=part)
        all_to_all, choice = backends.build(config.all_to_all, of_part, ops, node, device, fp8=fp8, table=table)
        made.append(all_to_all if spec.num_parts == 1 or device == "cpu" else on_stream(all_to_all))
    says = str(choice) if device == "cpu" else f"{choice}; {on_gpus(graph_safe=made[0].graph_safe, fp8=fp8)}"
    return tuple(made), says if spec.group.size > 1 else ""


def _device(config: EngineConfig, rank: int) -> str:
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise ValueError("device 'cuda' was asked for, but torch sees no CUDA device; use device='cpu' or 'auto'")
    if config.device == "cpu" or not available:
        return "cpu"
    device = f"cuda:{rank % torch.cuda.device_count()}"
    torch.cuda.set_device(device)
    return device


def _bytes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8)
