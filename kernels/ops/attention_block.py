"""Attention block: a layer's projections, grouped-query attention and output, and the RMS norm behind it.

    qkv = qkv_proj(normed);  q = rope_and_cache(norms(qkv));  a = output_proj(attend(q))
    sum = x + a;             y = rms_norm(sum)

`ComposedAttention` runs it op by op. A device may run it in fewer calls (`Ops.fuse_attention`), with the same bits.

T tokens, D model width, H query heads, G key/value heads, d head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from expertwire.kernels.ops.attention import PLAIN, Attend, AttentionMetadata, AttentionOptions, RopeAndCache
from expertwire.kernels.ops.linear import Linear
from expertwire.kernels.ops.rms_norm import AddRmsNorm, RmsNorm
from expertwire.kernels.ops.rotary import RopeInputs
from expertwire.kernels.ops.sigmoid_mul import SigmoidMul


@dataclass(frozen=True, kw_only=True)
class AttentionWeights:
    """Prepared weights and options of a block.

    Attributes:
        qkv: to (H + 2G) * d outputs; query, key and value heads in this order. If `gated`, to (2H + 2G) * d: each query
            head has a gate behind it, by whose sigmoid the head's output is multiplied.
        output: from H * d inputs to D.
        row_norms: weights [H * d] and [G * d] of RMS norms over whole query and key projections, or None.
        head_norms_hd: weights [H + G, d] of RMS norms of query and key heads, or None.
        norm_D: weights of the norm behind the block.
        eps: of all norms.
    """

    qkv: Linear
    output: Linear
    norm_D: Tensor
    eps: float
    num_heads: int
    num_kv_heads: int
    head_dim: int
    gated: bool = False
    row_norms: tuple[Tensor, Tensor] | None = None
    head_norms_hd: Tensor | None = None
    options: AttentionOptions = PLAIN


@dataclass(frozen=True, kw_only=True)
class AttentionInputs:
    """Inputs that the blocks of one step share if they use the same rotary embedding and KV cache group.

    Attributes:
        rope: the step's tokens.
        metadata: its sequences in the KV cache group.
        query_scales_T11: fp32 factors of the rotated queries (Llama 4, Mistral 4), or None.
    """

    rope: RopeInputs
    metadata: AttentionMetadata
    query_scales_T11: Tensor | None = None

    @cached_property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """Views for kernels on the host: cosines, sines, positions, slots, block table, cu_seqlens_q, seq_lens."""
        seqs = self.metadata
        sequences = seqs.block_table, seqs.cu_seqlens_q, seqs.seq_lens
        return *self.rope.arrays(), *(tensor.numpy() for tensor in sequences)


class AttentionBlock(Protocol):
    """A block of one layer."""

    def __call__(
        self, x_TD: Tensor, normed_TD: Tensor, k_cache: Tensor, v_cache: Tensor, inputs: AttentionInputs
    ) -> tuple[Tensor, Tensor]:
        """Return the residual sum and its norm, [T, D] each; write keys and values into the caches."""
        ...


class FuseAttention(Protocol):
    """A device's own attention block."""

    def __call__(self, weights: AttentionWeights, *, scales_queries: bool) -> AttentionBlock | None:
        """Return None where it does not support these weights. `scales_queries`: steps give `query_scales_T11`."""
        ...


@dataclass(frozen=True, kw_only=True)
class ComposedAttention:
    """The block as a sequence of ops."""

    weights: AttentionWeights
    rms_norm: RmsNorm
    add_rms_norm: AddRmsNorm
    rope_and_cache: RopeAndCache
    attend: Attend
    sigmoid_mul: SigmoidMul

    def __call__(
        self, x_TD: Tensor, normed_TD: Tensor, k_cache: Tensor, v_cache: Tensor, inputs: AttentionInputs
    ) -> tuple[Tensor, Tensor]:
        """As `AttentionBlock`."""
        w = self.weights
        qkv_Thd, gate_THd = self._project(normed_TD)
        q_THd = self.rope_and_cache(
            qkv_Thd,
            w.head_norms_hd,
            w.eps,
            inputs.rope,
            k_cache,
            v_cache,
            w.options.kv_scales_2G,
        )
        if inputs.query_scales_T11 is not None:
            q_THd = (q_THd * inputs.query_scales_T11).to(x_TD.dtype)
        attended_THd = self.attend(q_THd, k_cache, v_cache, inputs.metadata, w.options)
        if gate_THd is not None:
            attended_THd = self.sigmoid_mul(attended_THd, gate_THd)
        return self.add_rms_norm(x_TD, w.output(attended_THd.flatten(1)), w.norm_D, w.eps)

    def _project(self, normed_TD: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return query, key and value heads [T, H + 2G, d], and gates or None."""
        w, rows, gate_THd = self.weights, self.weights.qkv(normed_TD), None
        if w.gated:
            gated, kv = rows.tensor_split((2 * w.num_heads * w.head_dim,), dim=1)
            q_THd, gate_THd = gated.unflatten(1, (w.num_heads, 2, w.head_dim)).unbind(2)
            rows = torch.cat((q_THd.flatten(1), kv), dim=1)
        if w.row_norms is not None:
            sizes = [heads * w.head_dim for heads in (w.num_heads, w.num_kv_heads, w.num_kv_heads)]
            q, k, v = rows.split(sizes, dim=1)
            q, k = (
                self.rms_norm(part.contiguous(), norm, w.eps) for part, norm in zip((q, k), w.row_norms, strict=True)
            )
            rows = torch.cat((q, k, v), dim=1)
        return rows.unflatten(1, (-1, w.head_dim)), gate_THd
