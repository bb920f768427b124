"""The demo model's network for training: Qwen3-MoE with transformers' parameter names and a fast forward on one CPU core.

Rows are sorted by expert and each expert runs one dense product. Everything is fp32: bf16 was slower here, probably because
an expert's number of rows varies and the CPU's matrix library prepares a kernel for every new shape (docs/demo_model.md).

Shape letters: B batch, S sequence length, T = B*S tokens, D model width, F expert width, E experts, K top-k,
N = T*K routed rows, R rows of one expert, H heads, C head_dim, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from expertwire.deploy.demo_task import WORDS


@dataclass(frozen=True)
class DemoConfig:
    """The sizes of a model, by transformers' names."""

    hidden_size: int = 128
    num_hidden_layers: int = 3
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 32
    num_experts: int = 8
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 96
    vocab_size: int = len(WORDS)
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0


_SMALL = DemoConfig(hidden_size=48, num_hidden_layers=2, head_dim=16, num_experts=16, moe_intermediate_size=32)
CONFIGS = {
    "demo": DemoConfig(),
    "small": _SMALL,
    "small_choices": _SMALL,
    "thinking": DemoConfig(),
}


class _Permute(torch.autograd.Function):
    """rows[order]; since `order` is a permutation, its gradient is a gather too (an index_add is slow on a CPU)."""

    @staticmethod
    def forward(ctx: FunctionCtx, rows_ND: Tensor, order_N: Tensor, inverse_N: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_N)
        return rows_ND.index_select(0, order_N)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None, None]:
        return grad_ND.index_select(0, ctx.saved_tensors[0]), None, None


class _Normalise(torch.autograd.Function):
    """x / rms(x) over the last dimension, in half the passes over memory of the composed one."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, eps: float) -> Tensor:
        scale = (torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1] + eps).rsqrt()
        y = x * scale
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        y, scale = ctx.saved_tensors
        return torch.addcmul(grad, y, (grad * y).mean(-1, keepdim=True), value=-1).mul_(scale), None


class _Norm(nn.Module):
    """RMS norm with a weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return _Normalise.apply(x, self.eps) * self.weight


class _Attention(nn.Module):
    """Causal attention over whole sequences, with norms of queries and keys and grouped KV heads."""

    def __init__(self, c: DemoConfig) -> None:
        super().__init__()
        self.c = c
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=False)
        self.q_norm, self.k_norm = _Norm(c.head_dim, c.rms_norm_eps), _Norm(c.head_dim, c.rms_norm_eps)

    def forward(self, x_BSD: Tensor, cos_SC: Tensor, sin_SC: Tensor) -> Tensor:
        """`sin_SC` carries the signs of the rotation, so that turning is a roll of the halves."""
        B, S, _ = x_BSD.shape

        def heads(projection: nn.Linear) -> Tensor:
            return projection(x_BSD).view(B, S, -1, self.c.head_dim)

        def rotated(x_BSHC: Tensor) -> Tensor:
            turned_BSHC = x_BSHC.roll(self.c.head_dim // 2, dims=-1)
            return torch.addcmul(x_BSHC * cos_SC[:, None], turned_BSHC, sin_SC[:, None]).transpose(1, 2)

        q_BHSC, k_BHSC = rotated(self.q_norm(heads(self.q_proj))), rotated(self.k_norm(heads(self.k_proj)))
        v_BHSC = heads(self.v_proj).transpose(1, 2)
        y_BHSC = F.scaled_dot_product_attention(q_BHSC, k_BHSC, v_BHSC, is_causal=True, enable_gqa=True)
        return self.o_proj(y_BHSC.transpose(1, 2).reshape(B, S, -1))


class _Experts(nn.Module):
    """The experts' weights, stacked as transformers stacks them: gate and up in one."""

    def __init__(self, c: DemoConfig) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(c.num_experts, 2 * c.moe_intermediate_size, c.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(c.num_experts, c.hidden_size, c.moe_intermediate_size))

    def forward(self, rows_ND: Tensor, counts_E: list[int]) -> Tensor:
        """`rows_ND` sorted by expert, `counts_E` rows each."""
        outputs = []
        for x_RD, w13, w2 in zip(
            rows_ND.split(counts_E), self.gate_up_proj.unbind(0), self.down_proj.unbind(0), strict=True
        ):
            gate_RF, up_RF = F.linear(x_RD, w13).chunk(2, dim=-1)
            outputs.append(F.linear(F.silu(gate_RF) * up_RF, w2))
        return torch.cat(outputs)


class _MoE(nn.Module):
    """Top-k routing with renormalised weights; rows sorted by expert."""

    def __init__(self, c: DemoConfig) -> None:
        super().__init__()
        self.c, self.gate, self.experts = c, nn.Linear(c.hidden_size, c.num_experts, bias=False), _Experts(c)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Return the layer's output and its load-balancing loss: E times the sum of (rows per token) x (mean probability)."""
        (T, D), K = x_TD.shape, self.c.num_experts_per_tok
        probabilities_TE = self.gate(x_TD).softmax(-1)
        topk_weights_TK, topk_ids_TK = probabilities_TE.topk(K)
        topk_weights_TK = topk_weights_TK / topk_weights_TK.sum(-1, keepdim=True)
        order_N = topk_ids_TK.view(-1).argsort(stable=True)
        inverse_N = torch.empty_like(order_N)
        inverse_N[order_N] = torch.arange(T * K)
        counts_E = topk_ids_TK.view(-1).bincount(minlength=self.c.num_experts)
        rows_ND = _Permute.apply(x_TD[:, None].expand(T, K, D).reshape(T * K, D), order_N, inverse_N)
        rows_ND = _Permute.apply(self.experts(rows_ND, counts_E.tolist()), inverse_N, order_N)
        y_TD = (rows_ND.view(T, K, D) * topk_weights_TK[..., None]).sum(1)
        return y_TD, self.c.num_experts * ((counts_E / T) * probabilities_TE.mean(0)).sum()


class _Layer(nn.Module):
    def __init__(self, c: DemoConfig) -> None:
        super().__init__()
        self.input_layernorm, self.self_attn = _Norm(c.hidden_size, c.rms_norm_eps), _Attention(c)
        self.post_attention_layernorm, self.mlp = _Norm(c.hidden_size, c.rms_norm_eps), _MoE(c)


class _Trunk(nn.Module):
    def __init__(self, c: DemoConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(_Layer(c) for _ in range(c.num_hidden_layers))
        self.norm = _Norm(c.hidden_size, c.rms_norm_eps)


class DemoModel(nn.Module):
    """Qwen3-MoE with tied embeddings, initialised by `seed`."""

    def __init__(self, c: DemoConfig, seed: int = 0) -> None:
        super().__init__()
        self.c, self.model = c, _Trunk(c)
        generator = torch.Generator().manual_seed(seed)
        for name, weight in self.named_parameters():
            if weight.dim() > 1:
                std = 0.02 if "embed" in name else weight.shape[-1] ** -0.5
                nn.init.normal_(weight, std=std, generator=generator)

    def forward(self, ids_BS: Tensor, first: int = 0) -> tuple[Tensor, Tensor]:
        """Logits of the positions from `first` on [B, S - first, V], and the layers' mean load-balancing loss."""
        (B, S), half = ids_BS.shape, self.c.head_dim // 2
        angles_SC = torch.arange(S)[:, None] * self.c.rope_theta ** -(torch.arange(half) / half).repeat(2)
        cos_SC, sin_SC = angles_SC.cos(), angles_SC.sin() * torch.tensor((-1.0, 1.0)).repeat_interleave(half)
        x_BSD, aux = self.model.embed_tokens(ids_BS), torch.zeros(())
        for layer in self.model.layers:
            assert isinstance(layer, _Layer)
            x_BSD = x_BSD + layer.self_attn(layer.input_layernorm(x_BSD), cos_SC, sin_SC)
            y_TD, layer_aux = layer.mlp(layer.post_attention_layernorm(x_BSD).view(B * S, -1))
            x_BSD, aux = x_BSD + y_TD.view(B, S, -1), aux + layer_aux / self.c.num_hidden_layers
        return F.linear(self.model.norm(x_BSD[:, first:]), self.model.embed_tokens.weight), aux
