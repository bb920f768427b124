"""Compiling a rank's kernels while its weights are loaded: a process beside it, without a GPU, finds out which the warm-up will
launch, and compiles them in several processes more. The warm-up then finds them in Triton's cache on disk.

Which they are is found by the warm-up itself, of a model of the same layers whose tensors have no storage. Ranks of a node share
the work. What is missed, if anything, the warm-up compiles.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from expertwire.comm.all_to_all import fp8 as a2a_fp8
from expertwire.comm.all_to_all.base import AllToAll, AllToAllSpec
from expertwire.comm.all_to_all.local import LocalAllToAll
from expertwire.engine.config.engine_config import EngineConfig
from expertwire.engine.layers.step import RankContext
from expertwire.engine.loader import weights
from expertwire.engine.models.decoder import Decoder
from expertwire.engine.models.model_config import ModelConfig
from expertwire.engine.runner.exchange import absent_group, exchange_of
from expertwire.engine.runner.model_runner import ModelRunner
from expertwire.kernels import registry as kernels
from expertwire.kernels.gpu import compile_ahead
from expertwire.kernels.gpu.compile_ahead import Launch
from expertwire.kernels.gpu.device import Device, describe
from expertwire.moe.eplb.placement import place

_DEVICE = "meta"  # where tensors have no storage


@dataclass(frozen=True, kw_only=True)
class Rank:
    """A rank as far as it decides which kernels it launches.

    Attributes:
        max_model_len: of one request, at most.
        gpu: of the rank.
        domains: of each rank, as the placement of experts takes them.
    """

    config: EngineConfig
    model: ModelConfig
    max_model_len: int
    gpu: Device
    rank: int
    num_ranks: int
    domains: tuple[int, ...] = ()


def launches(of: Rank) -> list[Launch]:
    """Return what the rank's warm-up launches, found without a GPU."""
    return compile_ahead.recorded(lambda: _warm_up(of), of.gpu.arch)


@torch.inference_mode()
def _warm_up(of: Rank) -> None:
    config = replace(of.model, layers=tuple(dict.fromkeys(of.model.layers)))  # equal layers launch equal kernels
    model = _StoragelessDecoder(config, _context(of, config), None, of.config.quantization)
    model.bind(weights.allocate(model.layout.specs, model.context.dtype, _DEVICE))
    specs = config.cache_specs()
    caches = model.allocate(
        num_blocks=[2] * len(specs), block_size=of.config.block_size, max_model_len=of.max_model_len
    )
    runner = ModelRunner(
        model=model,
        caches=caches,
        num_ranks=of.num_ranks,
        max_num_seqs=of.config.max_num_seqs,
        max_model_len=of.max_model_len,
        block_size=of.config.block_size,
        num_micro_batches=of.config.num_micro_batches,
    )
    runner.warm_up(of.config.micro_batch_tokens, of.config.max_num_seqs)


def _context(of: Rank, config: ModelConfig) -> RankContext:
    dtype = getattr(torch, config.dtype)
    ops = kernels.triton(of.gpu, fast=of.config.numerics == "fast")
    placement, exchange_tokens = None, None
    all_to_alls: tuple[AllToAll, ...] = ()
    if any(config.sparse_layers):
        redundant = of.config.num_redundant_experts
        placement = place(config.num_experts, of.num_ranks, redundant, config.num_layers, of.domains)
        # The checkpoint's model decides on fp8; `config` has fewer layers.
        group = absent_group(of.rank, of.num_ranks)
        spec, is_fp8, exchange_tokens = exchange_of(of.config, of.model, group, placement.rank_offsets, on_gpu=True)
        if is_fp8:
            spec = a2a_fp8.packed(spec)
        all_to_alls = tuple(
            _all_to_all(replace(spec, micro_batch=index), of, ops) for index in range(spec.num_micro_batches)
        )
    return RankContext(
        rank=of.rank,
        dtype=dtype,
        device=_DEVICE,
        ops=ops,
        placement=placement,
        all_to_alls=all_to_alls,
        exchange_tokens=exchange_tokens,
    )


def _all_to_all(spec: AllToAllSpec, of: Rank, ops: kernels.Ops) -> AllToAll:
    """Return the one that compiles most: through NVLink, if there are several ranks."""
    if of.num_ranks == 1:
        return LocalAllToAll(spec, ops.permute)
    from expertwire.comm.all_to_all.nvlink_gpu import NvlinkGpuAllToAll
    from expertwire.comm.all_to_all.symmetric_buffer import BufferLayout

    memory = torch.empty(BufferLayout.of(spec).nbytes, dtype=torch.uint8, device=_DEVICE)
    return NvlinkGpuAllToAll(spec, [memory] * of.num_ranks, num_programs=of.gpu.num_sms)


class _StoragelessDecoder(Decoder):
    """A decoder whose parameters are on "meta"."""

    def take_expert_load(self) -> Tensor:
        return torch.zeros(0, dtype=torch.int64)


class Precompilation:
    """A process that compiles a rank's kernels; it ends by itself when it has.

    Args:
        share: of the node's ranks, which this one is.
        num_shares: how many there are.
        num_processes: that compile at once.
    """

    def __init__(self, of: Rank, *, share: int, num_shares: int, num_processes: int) -> None:
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `wait`
        command = [sys.executable, "-P", "-m", __name__]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=self._said)
        assert self._process.stdin is not None
        with self._process.stdin as given:
            given.write(pickle.dumps((of, share, num_shares, num_processes)))

    def wait(self) -> None:
        """Wait until everything is compiled. If something is not, warn and say why: the warm-up compiles what it lacks."""
        code = self._process.wait()
        with self._said as file:
            file.seek(0)
            said = file.read().decode(errors="replace").strip()
        if code:
            warnings.warn(f"kernels are compiled one by one, as compiling ahead failed: {said}", stacklevel=2)


def start(
    config: EngineConfig,
    model: ModelConfig,
    rank: int,
    num_ranks: int,
    device: str,
    domains: Sequence[int],
    sharers: int,
) -> Precompilation | None:
    """Begin to compile a rank's part of the kernels that the `sharers` ranks of its node launch.

    None where kernels are interpreted, and there is nothing to compile.
    """
    if not compile_ahead.is_needed():
        return None
    of = Rank(
        config=config,
        model=model,
        max_model_len=config.max_model_len or model.max_position_embeddings,
        gpu=describe(device),
        rank=rank,
        num_ranks=num_ranks,
        domains=tuple(domains),
    )
    num_processes = max(1, len(os.sched_getaffinity(0)) // sharers)
    return Precompilation(of, share=rank % sharers, num_shares=sharers, num_processes=num_processes)


def main() -> None:
    """Compile the share of the rank that is described on the standard input."""
    of, share, num_shares, num_processes = pickle.load(sys.stdin.buffer)
    mine = compile_ahead.share_of(launches(of), share, num_shares)
    compile_ahead.compile_all(mine, of.gpu.arch, num_processes)


if __name__ == "__main__":
    main()
