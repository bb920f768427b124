"""A rank's runner with the GPU's kernels, for fakes on which they are launched and not run."""

from __future__ import annotations

import torch

from expertwire.comm.all_to_all.base import AllToAllSpec
from expertwire.comm.all_to_all.local import LocalAllToAll
from expertwire.comm.all_to_all.nvlink_gpu import NvlinkGpuAllToAll
from expertwire.comm.all_to_all.stream import on_stream
from expertwire.comm.all_to_all.symmetric_buffer import BufferLayout
from expertwire.comm.group import SoloGroup
from expertwire.engine.layers.step import RankContext
from expertwire.engine.loader.checkpoint import Checkpoint
from expertwire.engine.loader.weights import load_model
from expertwire.engine.models.registry import read_model_config
from expertwire.engine.runner.model_runner import ModelRunner
from expertwire.kernels import registry as kernels
from expertwire.kernels.gpu.device import H200
from expertwire.moe.eplb.placement import place
from helpers import tiny_checkpoints

MAX_RUNNING, NUM_BLOCKS = 24, 2000
SIZES = {"max_model_len": 9000, "block_size": 16}


class Alone(SoloGroup):
    """The first of several ranks, without the others."""

    def __init__(self, size):
        self.size = size


def build(
    num_ranks, max_tokens, capture, *, folder=None, fast=False, device="cpu", num_micro_batches=1, num_blocks=NUM_BLOCKS
):
    """Return a model's config and a runner. `folder`: of the checkpoint; None: a Qwen3-MoE with one sparse and one dense layer.

    With several micro-batches, their all-to-alls have streams of their own.
    """
    folder = folder or tiny_checkpoints.cached("qwen3_moe", num_hidden_layers=2)
    config, ops = read_model_config(folder, "bfloat16"), kernels.triton(H200, fast=fast)
    placement, all_to_alls = None, ()
    if any(config.sparse_layers):
        placement = place(config.num_experts, num_ranks)
        all_to_alls = _all_to_alls(config, ops, placement.rank_offsets, num_ranks, max_tokens, num_micro_batches)
    context = RankContext(
        rank=0, dtype=torch.bfloat16, device=device, ops=ops, placement=placement, all_to_alls=tuple(all_to_alls)
    )
    model, specs = load_model(config, context, Checkpoint(folder)), config.cache_specs()
    caches = model.allocate(num_blocks=[num_blocks] * len(specs), **SIZES)
    options = {"num_ranks": num_ranks, "num_micro_batches": num_micro_batches, "max_num_seqs": MAX_RUNNING}
    return config, ModelRunner(model=model, caches=caches, capture=capture, **options, **SIZES)


def _all_to_alls(config, ops, rank_offsets, num_ranks, max_tokens, num_micro_batches):
    spec = AllToAllSpec(
        group=Alone(num_ranks),
        rank_offsets=rank_offsets,
        max_tokens=max_tokens,
        hidden_size=config.dispatch_size,
        top_k=config.top_k,
        dtype=torch.bfloat16,
        num_micro_batches=num_micro_batches,
    )
    if num_ranks == 1:
        all_to_alls = [LocalAllToAll(spec, ops.permute) for _ in range(num_micro_batches)]
    else:
        memories = [torch.zeros(BufferLayout.of(spec).nbytes, dtype=torch.uint8) for _ in range(num_ranks)]
        all_to_alls = [NvlinkGpuAllToAll(spec, memories, num_programs=132) for _ in range(num_micro_batches)]
    return map(on_stream, all_to_alls) if num_micro_batches > 1 else all_to_alls
