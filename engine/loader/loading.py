"""From a checkpoint, or without one, to a model that can run."""

from __future__ import annotations

import torch

from expertwire.engine.kv_cache import memory
from expertwire.engine.layers.step import RankContext
from expertwire.engine.loader import weights
from expertwire.engine.loader.checkpoint import Checkpoint
from expertwire.engine.models.decoder import Decoder
from expertwire.engine.models.model_config import ModelConfig


def load(
    config: ModelConfig,
    context: RankContext,
    checkpoint: Checkpoint | None,
    *,
    quantize: str | None = None,
    seed: int = 0,
    sharers: int = 1,
    progress: bool = False,
) -> Decoder:
    """The rank's share of a model.

    Args:
        config: what it is.
        context: where it runs.
        checkpoint: its weights; None: random ones of `seed`.
        quantize: as `Decoder` has it.
        sharers: ranks that load as much at the same time into the same memory.
        progress: show a bar on stderr.

    Raises:
        ValueError: the checkpoint is not one of this model, or the weights do not fit in memory.
    """
    model = Decoder(config, context, None if checkpoint is None else checkpoint.tensors, quantize)
    specs = model.layout.specs
    peak = memory.peak_bytes(config, model.layout, context.device, quantize=quantize, fast=context.ops.fast)
    weights.check_memory(peak, context.device, sharers=sharers)
    params = weights.allocate(specs, context.dtype, context.device)
    if checkpoint is None:
        weights.dummy_weights(specs, params, seed)
    else:
        skipped = [entry.pattern for entry in config.skipped]
        weights.load_weights(checkpoint, model.layout.sources, params, skipped=skipped, progress=progress)
    with torch.inference_mode():
        model.bind(params)
    return model
