"""Quantised activations, as on GPUs beside fp8 experts: a model's distributions beside those of a reference that
quantises identically, with every kernel in Triton's interpreter."""

import dataclasses

import numpy as np
import pytest
import torch
from helpers import tiny_checkpoints as tiny

from expertwire.bench.serving.rank_model import RankModel
from expertwire.comm.all_to_all.base import AllToAllSpec
from expertwire.comm.all_to_all.local import LocalAllToAll
from expertwire.comm.group import SoloGroup
from expertwire.engine.layers.step import RankContext
from expertwire.engine.loader.checkpoint import Checkpoint
from expertwire.engine.loader.weights import load_model
from expertwire.engine.models.registry import read_model_config
from expertwire.engine.runner.batch import ForwardBatch
from expertwire.kernels import formats
from expertwire.kernels import registry as kernels
from expertwire.kernels.gpu import experts as gpu_experts
from expertwire.kernels.gpu import grouped_gemm_tiles
from expertwire.kernels.gpu.device import Device
from expertwire.kernels.ops import experts, quantize
from expertwire.kernels.ops.attention import describe
from expertwire.kernels.ops.variants import Activation
from expertwire.moe.eplb.placement import place

SHAPE = {
    "num_hidden_layers": 2,
    "mlp_only_layers": None,
    "hidden_size": 128,
    "moe_intermediate_size": 128,
    "num_experts": 4,
}


class ReferenceExperts:
    """fp8 weights times rows that are quantised in groups of 128, with fp32 arithmetic; the layer between is fp32, too."""

    def __init__(self, weights, **_):
        self.w13, self.w2 = (formats.dequantize(weight, torch.float32) for weight in (weights.w13, weights.w2))
        self.weights = (self.w13, self.w2)

    def __call__(self, x_UD, row_index_R, offsets, home_R=None, tile_map=None):
        rows, ends = row_index_R.int(), torch.from_numpy(np.asarray(offsets)).int()
        hidden_RF = experts.w13_reference(quantised(x_UD), rows, ends, self.w13, Activation())
        home_R, out_RD = torch.arange(len(rows)), torch.empty(len(rows), x_UD.shape[1])
        return experts.w2_reference(quantised(hidden_RF), ends, self.w2, home_R, out_RD)


def quantised(x):
    return quantize.dequantize(quantize.reference(x, 128))


def device_logits(folder, ids):
    ops, config = kernels.triton(Device(arch=90, num_sms=2)), read_model_config(folder, "float32")
    placement = place(config.num_experts, 1, num_layers=config.num_layers)
    spec = AllToAllSpec(
        group=SoloGroup(),
        rank_offsets=placement.rank_offsets,
        max_tokens=32,
        hidden_size=config.hidden_size,
        top_k=config.top_k,
        dtype=torch.float32,
    )
    context = RankContext(
        rank=0,
        dtype=torch.float32,
        device="cpu",
        ops=ops,
        placement=placement,
        all_to_alls=(LocalAllToAll(spec, ops.permute),),
    )
    model = load_model(config, context, Checkpoint(folder), quantize="fp8")
    caches = model.allocate(num_blocks=[3], block_size=16, max_model_len=32)
    positions, table = torch.arange(len(ids)), torch.tensor([[1, 2]], dtype=torch.int32)
    batch = ForwardBatch(
        token_ids_T=torch.tensor(ids),
        positions_T=positions,
        attention_metadata=(describe([len(ids)], [len(ids)], table, slot_mapping=positions + 16),),
        num_tokens_P=[len(ids)],
    )
    with torch.inference_mode():
        return model.logits(model.forward([batch], caches))


def quantize_tiles(x, expert_offsets, tile_map):
    values, scales = quantize.reference(x)
    return values, grouped_gemm_tiles.tile_scales(scales, None, expert_offsets, tile_map)


@pytest.mark.filterwarnings("ignore:overflow")  # scales of padding are undefined
def test_divergence_from_a_reference_that_quantises_identically(monkeypatch):
    # The interpreter rounds to fp8 wrongly.
    monkeypatch.setattr(gpu_experts.quantize, "quantize", quantize.reference)
    monkeypatch.setattr(gpu_experts.grouped_gemm_tiles, "quantize_tiles", quantize_tiles)
    folder = tiny.cached("qwen3_moe", **SHAPE)
    ids = tiny.safe_prompt(folder, 20)
    found = device_logits(folder, ids).double().log_softmax(-1)
    plain = torch.from_numpy(RankModel(folder, quantize="fp8").logits(ids)).double().log_softmax(-1)
    ops = dataclasses.replace(kernels.cpu(), experts=ReferenceExperts)
    monkeypatch.setattr(kernels, "choose", lambda device, **_: ops)
    right = torch.from_numpy(RankModel(folder, quantize="fp8").logits(ids)).double().log_softmax(-1)
    divergence, of_weights_alone = (float((right.exp() * (right - other)).sum(-1).mean()) for other in (found, plain))
    assert divergence < 1e-4, divergence
    assert of_weights_alone > 10 * divergence, (of_weights_alone, divergence)  # so activations were quantised
