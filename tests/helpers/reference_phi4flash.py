"""Phi-4-mini-flash in plain torch, written from the published facts alone: one sequence, no cache, token by token where that is
simplest. Nothing of the engine is used.

transformers has no such model; its blocks (MambaMixer, DiffLlamaAttention) are compared in `test_phi4flash.py`.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Phi4FlashConfig:
    """The fields of the hub's config.json; those of Mamba are its class's defaults, which the file leaves out."""

    vocab_size: int = 320
    hidden_size: int = 96
    intermediate_size: int = 112
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    sliding_window: Any = 40
    layer_norm_eps: float = 0.05
    max_position_embeddings: int = 1024
    mb_per_layer: int = 2
    hidden_act: str = "silu"
    mlp_bias: bool = False
    lm_head_bias: bool = False
    tie_word_embeddings: bool = True
    bos_token_id: int = 298
    eos_token_id: int = 299
    model_type: str = "phi4flash"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Mamba(nn.Module):
    """Returns the output and the scan's output before the gate."""

    def __init__(self, hidden: int, state: int = 16, taps: int = 4, expand: int = 2) -> None:
        super().__init__()
        inner, self.rank, self.state = expand * hidden, math.ceil(hidden / 16), state
        self.in_proj = nn.Linear(hidden, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, taps, groups=inner, padding=taps - 1)
        self.x_proj = nn.Linear(inner, self.rank + 2 * state, bias=False)
        self.dt_proj = nn.Linear(self.rank, inner)
        self.A_log = nn.Parameter(torch.zeros(inner, state))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        x, z = self.in_proj(h).chunk(2, -1)
        x = F.silu(self.conv1d(x.t())[:, : len(h)].t())
        dt, b, c = self.x_proj(x).split([self.rank, self.state, self.state], -1)
        dt, a = F.softplus(self.dt_proj(dt)), -self.A_log.exp()
        state, scanned = torch.zeros_like(a), []
        for t in range(len(h)):
            state = torch.exp(dt[t, :, None] * a) * state + (dt[t] * x[t])[:, None] * b[t]
            scanned.append(state @ c[t] + self.D * x[t])
        memory = torch.stack(scanned)
        return self.out_proj(memory * F.silu(z)), memory


class GatedMemoryUnit(nn.Module):
    def __init__(self, hidden: int, expand: int = 2) -> None:
        super().__init__()
        self.in_proj = nn.Linear(hidden, expand * hidden, bias=False)
        self.out_proj = nn.Linear(expand * hidden, hidden, bias=False)

    def forward(self, h: Tensor, memory: Tensor) -> Tensor:
        return self.out_proj(F.silu(self.in_proj(h)) * memory)


class InnerAttention(nn.Module):
    """The parameters that checkpoints keep in `inner_cross_attn`."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        for name in ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"):
            setattr(self, name, nn.Parameter(torch.zeros(head_dim)))
        self.subln = nn.Module()
        self.subln.weight = nn.Parameter(torch.ones(2 * head_dim))


class DiffAttention(nn.Module):
    """Differential attention; with `shared` keys and values it has queries only."""

    def __init__(self, config: Phi4FlashConfig, layer: int, window: int | None, cross: bool) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.dim, self.window, self.layer = config.hidden_size // config.num_attention_heads, window, layer
        outputs = self.heads if cross else self.heads + 2 * self.kv_heads
        self.Wqkv = nn.Linear(config.hidden_size, outputs * self.dim)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.inner_cross_attn = InnerAttention(self.dim)

    def forward(self, h: Tensor, shared: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        heads = self.Wqkv(h).view(len(h), -1, self.dim)
        q, inner = heads[:, : self.heads], self.inner_cross_attn
        k, v = shared or heads[:, self.heads :].chunk(2, 1)
        first = 0.8 - 0.6 * math.exp(-0.3 * self.layer)
        one = torch.exp((inner.lambda_q1 * inner.lambda_k1).sum())
        factor = one - torch.exp((inner.lambda_q2 * inner.lambda_k2).sum()) + first
        outputs = []
        for j in range(self.heads // 2):
            i = j // (self.heads // self.kv_heads)
            values = torch.cat((v[:, 2 * i], v[:, 2 * i + 1]), -1)
            a, b = (self.attend(q[:, 2 * j + part], k[:, 2 * i + part], values) for part in (0, 1))
            o = a - factor * b
            o = o * torch.rsqrt(o.pow(2).mean(-1, keepdim=True) + 1e-5) * inner.subln.weight
            outputs.append(o * (1 - first))
        return self.out_proj(torch.cat(outputs, -1)), (k, v)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        position = torch.arange(len(q))
        distance = position[:, None] - position
        seen = (distance >= 0) & (distance < (self.window or len(q)))
        scores = q @ k.t() / math.sqrt(self.dim)
        return scores.masked_fill(~seen, -math.inf).softmax(-1) @ v


class Mlp(nn.Module):
    def __init__(self, config: Phi4FlashConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        gate, up = self.fc1(h).chunk(2, -1)
        return self.fc2(up * F.silu(gate))


class Layer(nn.Module):
    def __init__(self, config: Phi4FlashConfig, i: int) -> None:
        super().__init__()
        half, windows = config.num_hidden_layers // 2, config.sliding_window
        if i % 2:
            window = (windows[i] if isinstance(windows, list) else windows) if i < half else None
            self.attn: nn.Module = DiffAttention(config, i, window, cross=i >= half + 2)
        else:
            self.attn = Mamba(config.hidden_size) if i <= half else GatedMemoryUnit(config.hidden_size)
        self.mlp = Mlp(config)
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


class Decoder(nn.Module):
    def __init__(self, config: Phi4FlashConfig) -> None:
        super().__init__()
        self.half = config.num_hidden_layers // 2
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, ids: Tensor) -> Tensor:
        x, memory, shared = self.embed_tokens(ids), None, None
        for i, layer in enumerate(self.layers):
            h = layer.input_layernorm(x)
            if isinstance(layer.attn, Mamba):
                out, scanned = layer.attn(h)
                memory = scanned if i == self.half else memory
            elif isinstance(layer.attn, GatedMemoryUnit):
                out = layer.attn(h, memory)
            else:
                out, keys_values = layer.attn(h, shared)
                shared = keys_values if i == self.half + 1 else shared
            x = x + out
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return self.final_layernorm(x)


class Phi4Flash(nn.Module):
    """The model, whose head is the embedding."""

    def __init__(self, config: Phi4FlashConfig) -> None:
        super().__init__()
        self.config, self.model = config, Decoder(config)

    def logits(self, ids: Tensor) -> Tensor:
        """Return [T, V] of token ids [1, T]."""
        return self.model(ids[0]) @ self.model.embed_tokens.weight.t()
