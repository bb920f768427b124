"""A rank's process: join the controller and the other ranks, load the model, then run plans until the controller is gone.

Messages before the first plan; each is sent to every rank, and every rank answers:

    controller: {}                                      rank: {"node", "store": address, from rank 0 only}
    controller: {"store", "sharers": ranks on each      rank, when it has loaded: {"device", "all_to_all": backend
                 rank's node}                                  and reason, "place": NVLink and failure domain}
    controller: {"max_model_len": at most}              rank: {"cache_bytes": most bytes of its KV caches}
    controller: {"num_blocks": of each KV cache group,  rank: {}
                 "max_model_len", "eos_token_ids", and
                 `ThinkingIds.to_arrays`, if there are any}

A rank that fails answers with the error (`ControlLink.fail`) and waits for the connection to close.

P ranks.
"""

from __future__ import annotations

import contextlib
import gc
import os
import tempfile
import traceback
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from expertwire.comm import group as groups
from expertwire.comm.all_to_all.base import RankStalled
from expertwire.comm.control.channel import ChannelClosed, ControlLink
from expertwire.comm.topology import probe as topology_probe
from expertwire.comm.topology import topology
from expertwire.engine.config.engine_config import EngineConfig
from expertwire.engine.config.thinking import ThinkingIds
from expertwire.engine.kv_cache import memory_plan
from expertwire.engine.kv_cache.caches import NamedCache
from expertwire.engine.loader import weights
from expertwire.engine.loader.rank_model import load_rank
from expertwire.engine.models.decoder import Decoder
from expertwire.engine.models.registry import read_model_config
from expertwire.engine.process import lower_priority, raise_descriptor_limit
from expertwire.engine.rank_loop import Steps, serve
from expertwire.engine.runner import cuda_graphs
from expertwire.engine.runner.cuda_graphs import Capture
from expertwire.engine.runner.model_runner import ModelRunner
from expertwire.engine.runner.thinking import Thinking
from expertwire.moe.eplb.mover import ExpertMover

# Share of a CPU's free memory that KV caches may take, unless their size is given.
_CPU_CACHE_SHARE = 0.5
_ERROR_CHARACTERS = 500


def worker_main(config: EngineConfig, rank: int, num_ranks: int, address: str, token: str, node: str, gpu: int) -> None:
    """Run rank `rank` until the controller closes the connection; the entry point of every launcher.

    Args:
        gpu: which of the GPUs that this process sees is the rank's, if it computes on one.
    """
    link = ControlLink(address, token, rank=rank, node=node, hello={})
    # The group is closed after the report: the other ranks would fail, and be blamed, before this one has said why.
    with contextlib.ExitStack() as closing:
        closing.callback(link.close)
        try:
            serve(link, _start(config, rank, num_ranks, node, gpu, link, closing))
        except ChannelClosed:
            pass
        except Exception as error:  # noqa: BLE001 - the controller must learn of any error
            _report(link, rank, node, error)


def _report(link: ControlLink, rank: int, node: str, error: Exception) -> None:
    """Answer with the error and wait until the controller closes the connection."""
    text = str(error) if _explains_itself(error) else _log_traceback(error, rank, node)
    stall = {"stall": np.array(error.order)} if isinstance(error, RankStalled) else {}
    with contextlib.suppress(ChannelClosed):
        link.fail(text or repr(error), **stall)
        while True:
            link.recv()


def _explains_itself(error: Exception) -> bool:
    """Return whether the error's message suffices without a traceback: a stall, or a `ValueError` that our own code raised."""
    if not isinstance(error, ValueError):
        return isinstance(error, RankStalled)
    *_, (innermost, _) = traceback.walk_tb(error.__traceback__)
    return innermost.f_globals["__name__"].startswith("expertwire.")


def _log_traceback(error: Exception, rank: int, node: str) -> str:
    """Write the traceback to a temporary file on this node, and return one line that names the file."""
    text = "".join(traceback.format_exception(error))
    try:
        file, path = tempfile.mkstemp(prefix=f"expertwire-rank{rank}-", suffix=".log")
        with open(file, "w", encoding="utf-8") as log:
            log.write(text)
    except OSError:
        return text.strip()
    says = " ".join(str(error).split())[:_ERROR_CHARACTERS]
    return f"{type(error).__name__}: {says} (traceback in {path} on {node})"


def _start(
    config: EngineConfig,
    rank: int,
    num_ranks: int,
    node: str,
    gpu: int,
    link: ControlLink,
    closing: contextlib.ExitStack,
) -> Steps:
    link.recv()
    raise_descriptor_limit()
    device = choose_device(config, gpu)
    config = config.on(device)
    store, store_address = None, ""
    if rank == 0 and num_ranks > 1:
        if device == "cpu" and link.folder is not None:
            store_address = f"file:{link.folder / 'store'}"
        else:
            store, store_address = groups.serve_store(link.local_ip)
    link.send({"node": _bytes(node), "store": _bytes(store_address)})
    meeting = _receive(link)
    store_address, sharers = bytes(meeting["store"]).decode(), int(meeting["sharers"][rank])

    torch.set_num_threads(config.threads_per_rank or max(1, len(os.sched_getaffinity(0)) // sharers))
    group = groups.make_group(
        store_address=store_address,
        rank=rank,
        size=num_ranks,
        device=device.split(":")[0],
        local_ip=link.local_ip,
        timeout_s=_group_timeout_s(config, device),
        master=store,
    )
    closing.callback(group.close)
    if config.eplb_step_interval:
        group.connect()  # experts move by it
    model_config = read_model_config(config.model, config.dtype, config.kv_cache_dtype, config.snapshot_every)
    domain_P, failing_P = _rank_domains(config, group, node, device)
    model, all_to_all = load_rank(
        config, model_config, group, device, node, sharers=sharers, domains=domain_P, beat=link.beat
    )
    place_2 = np.array([*domain_P[rank : rank + 1], *failing_P[rank : rank + 1]], np.int64)
    link.send({"device": _bytes(device.split(":")[0]), "all_to_all": _bytes(all_to_all), "place": place_2})

    longest = int(_receive(link)["max_model_len"][0])
    link.send({"cache_bytes": np.array([_available_bytes(config, model, longest, num_ranks, sharers)])})

    sizes = _receive(link)
    num_blocks, max_model_len = sizes["num_blocks"].tolist(), int(sizes["max_model_len"][0])
    caches = model.allocate(num_blocks=num_blocks, block_size=config.block_size, max_model_len=max_model_len)
    thinking = _thinking(config, model, sizes)
    runner = _warm_runner(config, model, caches, max_model_len, num_ranks, group, thinking)
    if not model.context.ops.on_device:
        lower_priority()
    link.send({})
    return runner


def _thinking(config: EngineConfig, model: Decoder, sizes: dict[str, np.ndarray]) -> Thinking | None:
    """Return the control of reasoning of this model; None if its tokens are not known."""
    if (ids := ThinkingIds.from_arrays(sizes)) is None:
        return None
    return Thinking(
        ids,
        sizes["eos_token_ids"].tolist(),
        max_num_seqs=config.max_num_seqs,
        vocab_size=model.config.vocab_size,
        device=model.context.device,
    )


def _group_timeout_s(config: EngineConfig, device: str) -> float:
    """Return the seconds that a collective may take.

    NCCL's watchdog ends the process of a rank that waits for another (`handleException` in ProcessGroupNCCL.cpp, torch 2.13);
    the controller would blame that rank. Ranks also wait for each other while they start; steps have the controller's time limit.
    """
    return config.step_timeout_s if device == "cpu" else 2 * max(config.start_timeout_s, config.step_timeout_s)


def _receive(link: ControlLink) -> dict[str, np.ndarray]:
    """Return the controller's next message."""
    message = link.recv()
    assert message is not None, "without a time limit there is a message"
    return message


def _available_bytes(config: EngineConfig, model: Decoder, max_model_len: int, num_ranks: int, sharers: int) -> int:
    """Return the bytes that the rank's caches may have: of a GPU, which is the rank's own, what `gpu_memory_utilization` leaves
    beside the largest step, which all ranks run together; of a CPU's memory half of a fair share of what is free."""
    device = model.context.device
    if not model.context.ops.on_device:
        return int(weights.free_memory(device) // sharers * _CPU_CACHE_SHARE)
    num_blocks = [2] * len(model.config.cache_specs())
    caches = model.allocate(num_blocks=num_blocks, block_size=config.block_size, max_model_len=max_model_len)
    runner = _model_runner(config, model, caches, max_model_len, num_ranks)
    sizes = config.micro_batch_tokens, config.max_num_seqs
    runs = partial(runner.run_largest_graph, *sizes), partial(runner.run_peak, *sizes)
    found = memory_plan.measured(device, *runs)
    runner.settle()
    del runs, runner, caches
    gc.collect()
    torch.cuda.empty_cache()
    return found.room(config, model.config)


def _model_runner(
    config: EngineConfig,
    model: Decoder,
    caches: Sequence[NamedCache],
    max_model_len: int,
    num_ranks: int,
    *,
    capture: Capture | None = None,
    mover: ExpertMover | None = None,
    thinking: Thinking | None = None,
) -> ModelRunner:
    return ModelRunner(
        model=model,
        caches=caches,
        num_ranks=num_ranks,
        max_num_seqs=config.max_num_seqs,
        max_model_len=max_model_len,
        block_size=config.block_size,
        num_micro_batches=config.num_micro_batches,
        capture=capture,
        mover=mover,
        thinking=thinking,
    )


def _warm_runner(
    config: EngineConfig,
    model: Decoder,
    caches: Sequence[NamedCache],
    max_model_len: int,
    num_ranks: int,
    group: groups.Group,
    thinking: Thinking | None,
) -> ModelRunner:
    """Return the warmed-up runner. Graphs are captured now, so that running out of memory is found before anyone is served."""
    mover = None
    if config.eplb_step_interval:
        assert model.context.placement is not None, "a dense model's experts cannot move"
        layers = {i: layer.moe for i, layer in enumerate(model.layers) if layer.moe is not None}
        mover = ExpertMover(layers, model.context.placement, group)
    capture = cuda_graphs.cuda(group.barrier) if model.context.ops.capturable else None
    runner = _model_runner(
        config, model, caches, max_model_len, num_ranks, capture=capture, mover=mover, thinking=thinking
    )
    runner.warm_up(config.micro_batch_tokens, config.max_num_seqs)
    runner.settle()
    return runner


def _rank_domains(
    config: EngineConfig, group: groups.Group, node: str, device: str
) -> tuple[Sequence[int], Sequence[int]]:
    """Return every rank's NVLink domain and failure domain; nothing if no expert has replicas, as they do not matter then."""
    if not config.num_redundant_experts:
        return (), ()
    if config.topology is not None:
        found = topology.read(config.topology).first(group.size)
    else:
        found = topology_probe.assemble(
            topology_probe.gather_reports(group, topology_probe.probe(node, device), device)
        )
    return found.domain_P().tolist(), found.failure_domain_P().tolist()


def choose_device(config: EngineConfig, gpu: int) -> str:
    """Return "cpu", or "cuda:N" with that device the current one.

    Args:
        gpu: which of the GPUs that this process sees is the rank's.

    Raises:
        ValueError: there is no such GPU.
    """
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if config.device == "cuda" and not num_gpus:
        raise ValueError("device 'cuda' was asked for, but torch sees no CUDA device; use device='cpu' or 'auto'")
    if config.device == "cpu" or not num_gpus:
        return "cpu"
    if gpu >= num_gpus:
        raise ValueError(
            f"ep_size {config.ep_size} needs a GPU for each rank, but this node has {num_gpus}, and none for {gpu}; use an "
            f"ep_size of at most {num_gpus} on one node, launcher='ray' over several, or device='cpu'"
        )
    device = f"cuda:{gpu}"
    torch.cuda.set_device(device)
    return device


def _bytes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8)
