"""Choice of the implementation of each op: made once at start, by device; there is no silent fallback.

`cpu`: numba. `triton`: GPU. `plain`: torch on any device; slow, the others are tested against it.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch

from expertwire.kernels.ops import (
    attention,
    causal_conv1d,
    combine,
    copy_blocks,
    experts,
    gated_delta_rule,
    gated_rms_norm,
    heads,
    index,
    layer_norm,
    linear,
    mamba2,
    mla,
    permute,
    prepare_inputs,
    rms_norm,
    routing,
    sampling,
    selective_scan,
    sigmoid_mul,
)
from expertwire.kernels.ops.attention import Attend, RopeAndCache
from expertwire.kernels.ops.attention_block import AttentionBlock, AttentionWeights, ComposedAttention, FuseAttention
from expertwire.kernels.ops.causal_conv1d import CausalConv1d
from expertwire.kernels.ops.combine import Combine
from expertwire.kernels.ops.copy_blocks import PrepareCopyBlocks
from expertwire.kernels.ops.experts import PrepareExperts, SiluMul
from expertwire.kernels.ops.gated_delta_rule import GatedDeltaRule
from expertwire.kernels.ops.gated_rms_norm import GatedRmsNorm
from expertwire.kernels.ops.heads import PreparePerHead
from expertwire.kernels.ops.index import ChoosePositions, RopeAndCacheIndex
from expertwire.kernels.ops.layer_norm import AddLayerNorm, LayerNorm
from expertwire.kernels.ops.linear import PrepareLinear
from expertwire.kernels.ops.mamba2 import Mamba2Scan
from expertwire.kernels.ops.mla import AttendLatent, RopeAndCacheLatent
from expertwire.kernels.ops.moe_block import FuseMoe, MoeBlock, MoeWeights
from expertwire.kernels.ops.permute import Permute
from expertwire.kernels.ops.prepare_inputs import PrepareInputs
from expertwire.kernels.ops.rms_norm import AddRmsNorm, RmsNorm
from expertwire.kernels.ops.routing import Route, RouteAndCount
from expertwire.kernels.ops.sampling import AddToLogits, Penalize, Sample
from expertwire.kernels.ops.selective_scan import SelectiveScan
from expertwire.kernels.ops.sigmoid_mul import SigmoidMul

if TYPE_CHECKING:
    from expertwire.kernels.gpu.device import Device


@dataclass(frozen=True, kw_only=True)
class Ops:
    """One implementation of each op. `linear`, `linear_per_head` and `experts` prepare weights, `copy_blocks` caches.

    Attributes:
        why: the reason for this choice, for people.
        on_device: sequences and counts are described by tensors on the device (`attention.AttentionMetadata`), and the
            host reads nothing back during a forward pass.
        fast: the bits of a token's results may depend on the batch.
        capturable: CUDA graphs can hold all ops.
        attend_expanded: `attend` of prefills whose keys and values are expanded from latents.
        route_and_count: with the load counted on the device.
        fuse_attention, fuse_moe: the device's own blocks; None: blocks are composed of the ops.
    """

    why: str
    on_device: bool
    fast: bool
    capturable: bool
    linear: PrepareLinear
    linear_per_head: PreparePerHead
    experts: PrepareExperts
    rms_norm: RmsNorm
    add_rms_norm: AddRmsNorm
    layer_norm: LayerNorm
    add_layer_norm: AddLayerNorm
    rope_and_cache: RopeAndCache
    attend: Attend
    attend_expanded: Attend
    rope_and_cache_latent: RopeAndCacheLatent
    attend_latent: AttendLatent
    rope_and_cache_index: RopeAndCacheIndex
    choose_positions: ChoosePositions
    causal_conv1d: CausalConv1d
    mamba2: Mamba2Scan
    selective_scan: SelectiveScan
    gated_rms_norm: GatedRmsNorm
    gated_delta_rule: GatedDeltaRule
    route: Route
    route_and_count: RouteAndCount
    silu_mul: SiluMul
    sigmoid_mul: SigmoidMul
    permute: Permute
    combine: Combine
    prepare_inputs: PrepareInputs
    copy_blocks: PrepareCopyBlocks
    penalize: Penalize
    add_to_logits: AddToLogits
    sample: Sample
    fuse_attention: FuseAttention | None = None
    fuse_moe: FuseMoe | None = None

    def attention_block(self, weights: AttentionWeights, *, scales_queries: bool = False) -> AttentionBlock:
        """Return the device's own attention block if it has one for these weights, else the composed one."""
        fused = self.fuse_attention and self.fuse_attention(weights, scales_queries=scales_queries)
        return fused or ComposedAttention(
            weights=weights,
            rms_norm=self.rms_norm,
            add_rms_norm=self.add_rms_norm,
            rope_and_cache=self.rope_and_cache,
            attend=self.attend,
            sigmoid_mul=self.sigmoid_mul,
        )

    def moe_block(self, weights: MoeWeights) -> MoeBlock | None:
        """Return the device's own MoE block if it has one for these weights; else `MoeLayer` composes the ops."""
        return self.fuse_moe(weights) if self.fuse_moe else None

    def explain(self) -> str:
        """Return the reason for the choice, and the module of each op's implementation."""
        ops = [(field.name, getattr(self, field.name)) for field in fields(self)]
        return "\n".join([self.why, *(f"{name}: {_place(op)}" for name, op in ops if callable(op))])


_SCALED_ROWS = "; rows that meet experts of MXFP4 are quantised to MXFP8, those that meet NVFP4 to NVFP4"


def _mode(fast: bool) -> str:
    return "fast: bits may depend on the batch" if fast else "invariant: bits do not depend on the batch"


def _place(op: Any) -> str:
    op = op.func if isinstance(op, partial) else op
    return f"{op.__module__}.{op.__name__}"


def choose(device: str, *, fast: bool = False, attention: Literal["triton", "flashinfer"] = "triton") -> Ops:
    """Return the ops for "cpu" or "cuda"; `attention` decides whose attention runs on a GPU.

    Raises:
        ValueError: there are no kernels for the GPU, or `attention` is not installed or not for this device.
    """
    if device == "cpu":
        if attention != "triton":
            raise ValueError(f"attention_backend must be 'triton' where the device is a CPU, got {attention!r}")
        return cpu(fast=fast)
    from expertwire.kernels.gpu.device import SUPPORTED, describe

    gpu = describe(device)
    if not gpu.is_supported:
        name = torch.cuda.get_device_name(device)
        raise ValueError(
            f"device {device} is a {name} of compute capability {gpu.arch / 10}; allowed are {SUPPORTED}, or device 'cpu'"
        )
    ops = triton(gpu, fast=fast)
    return flashinfer(ops, device) if attention == "flashinfer" else ops


def flashinfer(ops: Ops, device: str) -> Ops:
    """Return `ops` with FlashInfer's attention. Its bits depend on the batch, so the ops must be `fast`.

    Raises:
        ValueError: it is not installed.
    """
    from expertwire.kernels.gpu.flashinfer import FlashInfer

    if importlib.util.find_spec("flashinfer") is None:
        raise ValueError(
            "attention_backend 'flashinfer' needs the package flashinfer-python, which is not installed: "
            "pip install 'expertwire[flashinfer]', or use attention 'triton'"
        )
    assert ops.fast, "attention_backend 'flashinfer' in invariant numerics: refused by EngineConfig"
    library = FlashInfer(importlib.import_module("flashinfer"), importlib.import_module("flashinfer.mla"), device)
    return replace(
        ops,
        why=f"{ops.why}; attention by flashinfer, as requested: its plans need the host, so that no step replays a CUDA "
        "graph; not yet compared with ours on a GPU",
        capturable=False,
        attend=library.attend,
        attend_latent=library.attend_latent,
    )


def cpu(*, fast: bool = False) -> Ops:
    """Return the ops for a CPU."""
    # numba is slow to import and of no use elsewhere.
    from expertwire.kernels.cpu import attention as cpu_attention
    from expertwire.kernels.cpu import blocks, elementwise, gemm, rotary
    from expertwire.kernels.cpu import causal_conv1d as cpu_causal_conv1d
    from expertwire.kernels.cpu import gated_delta_rule as cpu_gated_delta_rule
    from expertwire.kernels.cpu import mamba2 as cpu_mamba2
    from expertwire.kernels.cpu import mla as cpu_mla
    from expertwire.kernels.cpu import prepare_inputs as cpu_prepare_inputs
    from expertwire.kernels.cpu import routing as cpu_routing
    from expertwire.kernels.cpu import sampling as cpu_sampling
    from expertwire.kernels.cpu import selective_scan as cpu_selective_scan
    from expertwire.kernels.cpu._llvm import BF16_PRODUCTS

    return Ops(
        why=f"the device is a CPU: numba, its products of bf16 by {BF16_PRODUCTS}; {_mode(fast)}",
        on_device=False,
        fast=fast,
        capturable=False,
        linear=gemm.prepare_linear,
        linear_per_head=gemm.prepare_per_head,
        experts=gemm.prepare_experts,
        rms_norm=elementwise.rms_norm,
        add_rms_norm=elementwise.add_rms_norm,
        layer_norm=layer_norm.reference,
        add_layer_norm=layer_norm.add_reference,
        rope_and_cache=rotary.rope_and_cache,
        attend=cpu_attention.attend,
        attend_expanded=cpu_attention.attend,
        rope_and_cache_latent=rotary.rope_and_cache_latent,
        attend_latent=cpu_mla.attend,
        rope_and_cache_index=rotary.rope_and_cache_index,
        choose_positions=cpu_mla.choose_positions,
        causal_conv1d=cpu_causal_conv1d.causal_conv1d,
        mamba2=cpu_mamba2.mamba2,
        selective_scan=cpu_selective_scan.selective_scan,
        gated_rms_norm=elementwise.gated_rms_norm,
        gated_delta_rule=cpu_gated_delta_rule.gated_delta_rule,
        route=cpu_routing.route,
        route_and_count=partial(routing.route_and_count, route=cpu_routing.route),
        silu_mul=elementwise.silu_mul,
        sigmoid_mul=elementwise.sigmoid_mul,
        permute=permute.reference,
        combine=elementwise.combine,
        prepare_inputs=cpu_prepare_inputs.prepare_inputs,
        copy_blocks=copy_blocks.prepare,
        penalize=sampling.penalize_rows,
        add_to_logits=sampling.add_to_logits,
        sample=cpu_sampling.sample,
        fuse_attention=blocks.fuse_attention,
        fuse_moe=blocks.fuse_moe,
    )


def plain() -> Ops:
    """Return the ops in torch alone."""
    return Ops(
        why="asked for: torch alone",
        on_device=False,
        fast=False,
        capturable=False,
        linear=linear.prepare,
        linear_per_head=heads.prepare,
        experts=experts.prepare,
        rms_norm=rms_norm.reference,
        add_rms_norm=rms_norm.add_reference,
        layer_norm=layer_norm.reference,
        add_layer_norm=layer_norm.add_reference,
        rope_and_cache=attention.rope_and_cache,
        attend=attention.attend,
        attend_expanded=attention.attend,
        rope_and_cache_latent=mla.rope_and_cache,
        attend_latent=mla.attend,
        rope_and_cache_index=index.rope_and_cache,
        choose_positions=index.choose_positions,
        causal_conv1d=causal_conv1d.reference,
        mamba2=mamba2.reference,
        selective_scan=selective_scan.reference,
        gated_rms_norm=gated_rms_norm.reference,
        gated_delta_rule=gated_delta_rule.reference,
        route=routing.reference,
        route_and_count=routing.route_and_count,
        silu_mul=experts.silu_mul_reference,
        sigmoid_mul=sigmoid_mul.reference,
        permute=permute.reference,
        combine=combine.combine,
        prepare_inputs=prepare_inputs.reference,
        copy_blocks=copy_blocks.prepare,
        penalize=sampling.penalize_rows,
        add_to_logits=sampling.add_to_logits,
        sample=sampling.sample,
    )


def triton(gpu: Device, *, fast: bool = False) -> Ops:
    """Return the ops for a GPU, or in Triton's interpreter for tensors on a CPU."""
    from expertwire.kernels.gpu import attention as gpu_attention
    from expertwire.kernels.gpu import causal_conv1d as gpu_causal_conv1d
    from expertwire.kernels.gpu import combine as gpu_combine
    from expertwire.kernels.gpu import copy_blocks as gpu_copy_blocks
    from expertwire.kernels.gpu import experts as gpu_experts
    from expertwire.kernels.gpu import gated_delta_rule as gpu_gated_delta_rule
    from expertwire.kernels.gpu import gated_rms_norm as gpu_gated_rms_norm
    from expertwire.kernels.gpu import heads as gpu_heads
    from expertwire.kernels.gpu import index as gpu_index
    from expertwire.kernels.gpu import index_rope_and_cache as gpu_index_keys
    from expertwire.kernels.gpu import layer_norm as gpu_layer_norm
    from expertwire.kernels.gpu import linear as gpu_linear
    from expertwire.kernels.gpu import mamba2 as gpu_mamba2
    from expertwire.kernels.gpu import mla as gpu_mla
    from expertwire.kernels.gpu import mla_rope_and_cache, penalties, quantize, rope_and_cache
    from expertwire.kernels.gpu import permute as gpu_permute
    from expertwire.kernels.gpu import prefill as gpu_prefill
    from expertwire.kernels.gpu import prepare_inputs as gpu_prepare_inputs
    from expertwire.kernels.gpu import rms_norm as gpu_rms_norm
    from expertwire.kernels.gpu import routing as gpu_routing
    from expertwire.kernels.gpu import sampling as gpu_sampling
    from expertwire.kernels.gpu import selective_scan as gpu_selective_scan
    from expertwire.kernels.gpu import sigmoid_mul as gpu_sigmoid_mul

    scale_rows = fast and gpu.arch // 10 == 10  # tensor cores of Blackwell's data centre GPUs take scales
    attend = partial((gpu_prefill if fast else gpu_attention).attend, device=gpu)
    return Ops(
        why=(
            f"the device is a GPU of compute capability {gpu.arch / 10} with {gpu.num_sms} multiprocessors: Triton; "
            f"{_mode(fast)}{_SCALED_ROWS if scale_rows else ''}"
        ),
        on_device=True,
        fast=fast,
        capturable=True,
        linear=partial(gpu_linear.prepare, device=gpu),
        linear_per_head=partial(gpu_heads.prepare, device=gpu),
        experts=partial(gpu_experts.prepare, device=gpu, scale_rows=scale_rows),
        rms_norm=gpu_rms_norm.rms_norm,
        add_rms_norm=gpu_rms_norm.add_rms_norm,
        layer_norm=gpu_layer_norm.layer_norm,
        add_layer_norm=gpu_layer_norm.add_layer_norm,
        rope_and_cache=rope_and_cache.rope_and_cache,
        attend=attend,
        attend_expanded=attend,
        rope_and_cache_latent=mla_rope_and_cache.rope_and_cache,
        attend_latent=partial(gpu_mla.attend, device=gpu),
        rope_and_cache_index=gpu_index_keys.rope_and_cache,
        choose_positions=partial(gpu_index.choose_positions, device=gpu),
        causal_conv1d=gpu_causal_conv1d.causal_conv1d,
        mamba2=gpu_mamba2.mamba2,
        selective_scan=gpu_selective_scan.selective_scan,
        gated_rms_norm=gpu_gated_rms_norm.gated_rms_norm,
        gated_delta_rule=partial(gpu_gated_delta_rule.gated_delta_rule, fast=fast),
        route=gpu_routing.route,
        route_and_count=gpu_routing.route_and_count,
        silu_mul=quantize.silu_mul,
        sigmoid_mul=gpu_sigmoid_mul.sigmoid_mul,
        permute=partial(gpu_permute.permute, format="dense"),
        combine=gpu_combine.combine,
        prepare_inputs=gpu_prepare_inputs.prepare_inputs,
        copy_blocks=gpu_copy_blocks.prepare,
        penalize=penalties.penalize,
        add_to_logits=penalties.add,
        sample=gpu_sampling.sample,
    )
