"""The decoder that the supported families share: grouped-query attention, then a dense MLP or a mixture of experts.

A family's file in `engine/models` says what its checkpoint calls the tensors. The life of a model: `param_specs` -> the loader
fills parameters by `weight_map` -> `bind` takes them over in the form the kernels want -> `forward`, `logits`.

T tokens of this rank, D model width, H query heads, G key/value heads, d head size, F expert width, E experts, e experts here,
I width of a dense MLP, V vocabulary, P ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from expertwire.comm.all_to_all import AllToAll
from expertwire.engine.batch import ForwardBatch
from expertwire.engine.caches import PagedKv, paged_kv
from expertwire.engine.config import ModelConfig
from expertwire.engine.weight_map import Destination, ParamSpec, WeightMap
from expertwire.kernels import attention, rotary
from expertwire.kernels.linear import Linear
from expertwire.kernels.registry import Ops
from expertwire.moe import layer as moe_layer
from expertwire.moe.layer import MoeLayer
from expertwire.moe.placement import Placement

Params = dict[str, Tensor]


class Model(Protocol):
    """What the runner asks of a model."""

    def forward(self, batch: ForwardBatch, caches: list[PagedKv]) -> Tensor:
        """Hidden states [T, D] after the last norm; writes the caches. All ranks of the group call it together."""
        ...

    def logits(self, x_XD: Tensor) -> Tensor:
        """fp32 [X, V] of any rows of hidden states."""
        ...

    def weight_map(self) -> WeightMap: ...

    def allocate(self, *, num_blocks: int, block_size: int, max_model_len: int) -> list[PagedKv]:
        """The tensors of the caches that `ModelConfig.cache_specs` names; called once, before `forward`."""
        ...


@dataclass(frozen=True, kw_only=True)
class RankContext:
    """Where a model runs."""

    rank: int
    dtype: torch.dtype
    device: str
    ops: Ops
    placement: Placement | None  # None: a dense model
    all_to_all: AllToAll | None


@dataclass(frozen=True, kw_only=True)
class Attention:
    """One layer's attention and the norm behind it. Query, key and value projections are one product; so are the norms of
    query and key. `fused` does all of it in one call."""

    ops: Ops
    eps: float
    head_dim: int
    qkv: Linear
    qk_norm: Tensor | None  # [H + G, d]
    output: Linear
    norm: Tensor
    fused: attention.Fused | None

    def forward(
        self,
        x_TD: Tensor,
        normed_TD: Tensor,
        batch: ForwardBatch,
        cache: PagedKv,
        tables: tuple[Tensor, Tensor],
        step: Any,
    ) -> tuple[Tensor, Tensor]:
        """x plus the attention of its norm, and the norm of that."""
        if self.fused is not None:
            return self.fused(x_TD, normed_TD, cache.k, cache.v, step)
        qkv_Thd = self.qkv(normed_TD).unflatten(1, (-1, self.head_dim))
        positions_T, slots_T = batch.positions_T, batch.slot_mapping_T
        q_THd = self.ops.rotate_and_store(
            qkv_Thd, self.qk_norm, self.eps, tables, positions_T, slots_T, cache.k, cache.v
        )
        attended_TD = self.output(self.ops.attend(q_THd, cache.k, cache.v, batch.sequences).flatten(1))
        return self.ops.add_rms_norm(x_TD, attended_TD, self.norm, self.eps)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Pre-norm residual layer. Of x and its norm, `mlp` too makes the sum and the norm of that; it takes every rank's token count
    (a dense one ignores it)."""

    attention: Attention
    mlp: Callable[[Tensor, Tensor, list[int] | Tensor], tuple[Tensor, Tensor]]
    moe: MoeLayer | None


class Decoder:
    """See the module. Subclasses name the checkpoint's tensors in `layer_map`."""

    def __init__(self, config: ModelConfig, context: RankContext) -> None:
        self.config, self.context = config, context
        self.layers: list[Layer] = []
        self._tables: tuple[Tensor, Tensor] | None = None

    # ---- parameters

    def param_specs(self) -> dict[str, ParamSpec]:
        """Every parameter of this rank, in checkpoint precision, before `bind`."""
        c = self.config
        width, q_size, kv_size = c.hidden_size, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        specs = {"embed": ParamSpec(shape=(c.vocab_size, width), fan_in=width)}
        for i, sparse in enumerate(c.sparse_layers):
            layer = {
                "input_norm": ParamSpec(shape=(width,), fan_in=None),
                "qkv": ParamSpec(shape=(q_size + 2 * kv_size, width), fan_in=width),
                "o": ParamSpec(shape=(width, q_size), fan_in=q_size),
                "post_norm": ParamSpec(shape=(width,), fan_in=None),
            }
            if c.attention_bias:
                layer["qkv_bias"] = ParamSpec(shape=(q_size + 2 * kv_size,), fan_in=width)
                layer["o_bias"] = ParamSpec(shape=(width,), fan_in=width)
            if c.qk_norm:
                layer["q_norm"] = layer["k_norm"] = ParamSpec(shape=(c.head_dim,), fan_in=None)
            layer |= self._moe_specs(i) if sparse else self._dense_specs()
            specs |= {f"layers.{i}.{name}": spec for name, spec in layer.items()}
        specs["norm"] = ParamSpec(shape=(width,), fan_in=None)
        if not c.tie_word_embeddings:
            specs["lm_head"] = ParamSpec(shape=(c.vocab_size, width), fan_in=width)
        return specs

    def _dense_specs(self) -> dict[str, ParamSpec]:
        width, inner = self.config.hidden_size, self.config.intermediate_size
        return {
            "gate_up": ParamSpec(shape=(2 * inner, width), fan_in=width),
            "down": ParamSpec(shape=(width, inner), fan_in=inner),
        }

    def _moe_specs(self, i: int) -> dict[str, ParamSpec]:
        c, here = self.config, self._experts_here(i)
        return {
            "router": ParamSpec(shape=(c.num_experts, c.hidden_size), fan_in=c.hidden_size),
            "w13": ParamSpec(shape=(len(here), 2 * c.expert_size, c.hidden_size), fan_in=c.hidden_size, experts=here),
            "w2": ParamSpec(shape=(len(here), c.hidden_size, c.expert_size), fan_in=c.expert_size, experts=here),
        }

    def _experts_here(self, i: int) -> tuple[int, ...]:
        assert self.context.placement is not None, f"{self.config.architecture} has experts but no placement"
        return self.context.placement.experts_of(self.context.rank, i)

    def weight_map(self) -> WeightMap:
        """Checkpoint tensor name -> where it goes on this rank."""
        names = {
            "model.embed_tokens.weight": (Destination(param="embed"),),
            "model.norm.weight": (Destination(param="norm"),),
            # A tied checkpoint may still carry the head.
            "lm_head.weight": () if self.config.tie_word_embeddings else (Destination(param="lm_head"),),
        }
        for i, sparse in enumerate(self.config.sparse_layers):
            names |= self._attention_map(i) | (self.moe_map(i) if sparse else self._dense_map(i))
        return names

    def _attention_map(self, i: int) -> WeightMap:
        c = self.config
        source, param = f"model.layers.{i}.", f"layers.{i}."
        names = {
            source + "input_layernorm.weight": (Destination(param=param + "input_norm"),),
            source + "post_attention_layernorm.weight": (Destination(param=param + "post_norm"),),
            source + "self_attn.o_proj.weight": (Destination(param=param + "o"),),
        }
        start = 0
        for name, heads in (("q", c.num_heads), ("k", c.num_kv_heads), ("v", c.num_kv_heads)):
            region = (slice(start, start + heads * c.head_dim),)
            names[f"{source}self_attn.{name}_proj.weight"] = (Destination(param=param + "qkv", region=region),)
            if c.attention_bias:
                names[f"{source}self_attn.{name}_proj.bias"] = (Destination(param=param + "qkv_bias", region=region),)
            start = region[0].stop
        if c.attention_bias:
            names[source + "self_attn.o_proj.bias"] = (Destination(param=param + "o_bias"),)
        if c.qk_norm:
            for name in ("q_norm", "k_norm"):
                names[f"{source}self_attn.{name}.weight"] = (Destination(param=param + name),)
        return names

    def _dense_map(self, i: int) -> WeightMap:
        inner = self.config.intermediate_size
        source, param = f"model.layers.{i}.mlp.", f"layers.{i}."
        return {
            source + "gate_proj.weight": (Destination(param=param + "gate_up", region=(slice(0, inner),)),),
            source + "up_proj.weight": (Destination(param=param + "gate_up", region=(slice(inner, 2 * inner),)),),
            source + "down_proj.weight": (Destination(param=param + "down"),),
        }

    def moe_map(self, i: int) -> WeightMap:
        """The names of layer i's router and experts; a family's own."""
        raise AssertionError(f"{type(self).__name__} has a sparse layer {i} but no names for it")

    def expert_map(self, i: int, router: str, expert: str, gate: str, up: str, down: str) -> WeightMap:
        """Per-expert tensors; `expert` is a format string of the expert's id, `gate`, `up`, `down` its tensors."""
        width, here, param = self.config.expert_size, self._experts_here(i), f"layers.{i}."
        names: dict[str, tuple[Destination, ...]] = {router: (Destination(param=param + "router"),)}
        for e in range(self.config.num_experts):
            slots = [slot for slot, logical in enumerate(here) if logical == e]
            prefix = expert.format(e)
            names[prefix + gate] = tuple(Destination(param=param + "w13", region=(s, slice(0, width))) for s in slots)
            names[prefix + up] = tuple(
                Destination(param=param + "w13", region=(s, slice(width, 2 * width))) for s in slots
            )
            names[prefix + down] = tuple(Destination(param=param + "w2", region=(s,)) for s in slots)
        return names

    # ---- taking the parameters over

    def bind(self, params: Params) -> None:
        """Take `params` over, emptying the dictionary as it goes, so that memory holds one copy and one parameter more."""
        c = self.config
        self._embed = params.pop("embed")
        # A tied head is packed from a copy: the embedding is read row by row.
        self._head = self.context.ops.linear(self._embed.clone() if c.tie_word_embeddings else params.pop("lm_head"))
        # The norm after each layer is the next layer's first one.
        norms = [*(params.pop(f"layers.{i}.input_norm") for i in range(c.num_layers)), params.pop("norm")]
        self._first_norm = norms[0]
        for i, (sparse, next_norm) in enumerate(zip(c.sparse_layers, norms[1:], strict=True)):
            prefix = f"layers.{i}."
            layer = {name.removeprefix(prefix): params.pop(name) for name in list(params) if name.startswith(prefix)}
            self.layers.append(self._bind_layer(i, layer, sparse, next_norm))
        assert not params, f"parameters that no layer took: {sorted(params)}"

    def _bind_layer(self, i: int, p: Params, sparse: bool, next_norm: Tensor) -> Layer:
        c = self.config
        qk_norm = None
        if c.qk_norm:
            q_norm, k_norm = p["q_norm"].expand(c.num_heads, -1), p["k_norm"].expand(c.num_kv_heads, -1)
            qk_norm = torch.cat((q_norm, k_norm))
        ops, fused = self.context.ops, None
        qkv, output = ops.linear(p.pop("qkv"), p.get("qkv_bias")), ops.linear(p.pop("o"), p.get("o_bias"))
        if not ops.on_device:
            fused = attention.fuse(qkv, output, qk_norm, p["post_norm"], c.rms_norm_eps, c.head_dim)
        attn = Attention(
            ops=ops,
            eps=c.rms_norm_eps,
            head_dim=c.head_dim,
            qkv=qkv,
            qk_norm=qk_norm,
            output=output,
            norm=p["post_norm"],
            fused=fused,
        )
        if not sparse:
            return Layer(attention=attn, mlp=_dense_mlp(p, self.context.ops, next_norm, c.rms_norm_eps), moe=None)
        moe = self._bind_moe(i, p, next_norm)
        return Layer(attention=attn, mlp=moe.forward, moe=moe)

    def _bind_moe(self, i: int, p: Params, next_norm: Tensor) -> MoeLayer:
        c, context = self.config, self.context
        assert context.placement is not None
        assert context.all_to_all is not None
        return moe_layer.prepare(
            p.pop("router"),
            p.pop("w13"),
            p.pop("w2"),
            next_norm,
            ops=context.ops,
            top_k=c.top_k,
            renormalize=c.renormalize,
            eps=c.rms_norm_eps,
            placement=context.placement,
            rank=context.rank,
            all_to_all=context.all_to_all,
            layer=i,
        )

    # ---- running

    def allocate(self, *, num_blocks: int, block_size: int, max_model_len: int) -> list[PagedKv]:
        """As `Model.allocate`."""
        c, dtype, device = self.config, self.context.dtype, self.context.device
        self._tables = rotary.tables(max_model_len, c.head_dim, c.rope_theta, device)
        shape = (num_blocks, block_size, c.num_kv_heads, c.head_dim)
        return [paged_kv(shape, dtype, device) for _ in range(c.num_layers)]

    def forward(self, batch: ForwardBatch, caches: list[PagedKv]) -> Tensor:
        """As `Model.forward`."""
        assert self._tables is not None, "forward before allocate"
        num_tokens_P = list(batch.num_tokens_P) if batch.num_valid is None else batch.num_valid
        x_TD = self._embed[batch.token_ids_T]
        normed_TD = self.context.ops.rms_norm(x_TD, self._first_norm, self.config.rms_norm_eps)
        fused = self.layers[0].attention.fused
        step = fused and fused.step(self._tables, batch.positions_T, batch.slot_mapping_T, batch.sequences)
        for layer, cache in zip(self.layers, caches, strict=True):
            x_TD, normed_TD = layer.attention.forward(x_TD, normed_TD, batch, cache, self._tables, step)
            x_TD, normed_TD = layer.mlp(x_TD, normed_TD, num_tokens_P)
        return normed_TD

    def logits(self, x_XD: Tensor) -> Tensor:
        """As `Model.logits`."""
        return self._head(x_XD).float()

    def take_expert_load(self) -> np.ndarray:
        """i64 [layers * E]: rows this rank's tokens sent to each logical expert since the last call; dense layers stay zero."""
        load = np.zeros((self.config.num_layers, self.config.num_experts), np.int64)
        for i, layer in enumerate(self.layers):
            if layer.moe is not None:
                counted = layer.moe.load_E
                load[i] = counted.cpu().numpy() if isinstance(counted, Tensor) else counted
                counted[:] = 0
        return load.reshape(-1)


def _dense_mlp(
    p: Params, ops: Ops, norm_D: Tensor, eps: float
) -> Callable[[Tensor, Tensor, list[int] | Tensor], tuple[Tensor, Tensor]]:
    gate_up, down = ops.linear(p.pop("gate_up")), ops.linear(p.pop("down"))

    def apply(x_TD: Tensor, normed_TD: Tensor, num_tokens_P: list[int] | Tensor) -> tuple[Tensor, Tensor]:
        return ops.add_rms_norm(x_TD, down(ops.silu_mul(gate_up(normed_TD))), norm_D, eps)

    return apply
