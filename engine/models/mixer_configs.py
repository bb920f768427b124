"""Configurations of mixers, the halves of layers in which a sequence's tokens see each other.

Every one says which tensors it keeps in the KV caches (`cache_tensors`), how large a token is within it (`activation_size`), and
what it is, for people (`str`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from expertwire.kernels.ops.variants import Rope
from expertwire.scheduler.config import CacheKind

Shape = tuple[int, ...]
# By kind of cache, the shapes and dtypes ("float32", or "auto" for the model's choice) of the tensors that a mixer keeps: of one
# token, but for the kind "state" of one state.
CacheTensors: TypeAlias = Mapping[CacheKind, tuple[tuple[Shape, str], ...]]
_NO_TENSORS: CacheTensors = {}


@dataclass(frozen=True, kw_only=True)
class QueryScaling:
    """Queries at position p are multiplied by `1 + beta * ln(1 + floor((p + offset) / length))` (Llama 4)."""

    beta: float
    length: int
    offset: int = 0


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Grouped-query attention.

    Attributes:
        rope: the rotary embedding; None: no positional embedding (NoPE).
        qk_norm: RMS norm of query and key before the rotary embedding: "head", each head, with weights; "row", the whole
            projection, with weights; "plain", each head, without weights.
        window: tokens of the sliding window, the query's own included; None: no window.
        chunk: tokens of a chunk, outside of which a query attends to nothing (Llama 4); None: no chunks.
        sinks: whether each head has a learned logit in the softmax (gpt-oss).
        gated: whether a head's output is multiplied by the sigmoid of a gate, which the query projection has behind the head's
            query (Qwen3-Next).
        scale: factor of the logits; None: head_dim^-0.5.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: Rope | None
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: Literal["none", "head", "row", "plain"] = "none"
    window: int | None = None
    chunk: int | None = None
    sinks: bool = False
    scale: float | None = None
    query_scaling: QueryScaling | None = None
    gated: bool = False

    @property
    def qkv_sizes(self) -> tuple[int, int, int]:
        """The output sizes of the query projection, gates included, and of the key and value projections."""
        kv = self.num_kv_heads * self.head_dim
        return self.num_heads * self.head_dim * (1 + self.gated), kv, kv

    @property
    def window_size(self) -> int | None:
        """Tokens that a query attends to at most, in the block table of a window or of chunks; None: all."""
        return self.window or self.chunk

    @property
    def cache_tensors(self) -> CacheTensors:
        """Its keys and values."""
        return _keys_and_values(self.num_kv_heads, self.head_dim, self.window_size)

    @property
    def activation_size(self) -> int:
        """Numbers of a token at once: queries, keys and values, and the output of every head."""
        return self.head_dim * 2 * (self.num_heads + self.num_kv_heads)

    def __str__(self) -> str:
        seen = f", window {self.window}" if self.window else f", chunks of {self.chunk}" if self.chunk else ""
        more = seen + (", gated" if self.gated else "") + (", sinks" if self.sinks else "")
        return f"attention, {self.num_heads} heads on {self.num_kv_heads} of {self.head_dim}{more}"


@dataclass(frozen=True, kw_only=True)
class IndexerConfig:
    """The indexer of sparse attention, which chooses the `top_k` positions to attend to (DeepSeek-V3.2)."""

    num_heads: int
    head_dim: int
    top_k: int
    rope: Rope


@dataclass(frozen=True, kw_only=True)
class LatentAttentionConfig:
    """Multi-head latent attention (MLA, DeepSeek-V2): see `kernels.ops.mla`. `rope.size` is `qk_rope_head_dim`.

    Attributes:
        q_lora_rank: size of the compressed query; None: queries are not compressed.
        kv_lora_rank: size of the latent.
        scale: factor of the logits; None: `kernels.ops.rotary.softmax_scale`.
        norm_eps: epsilon of the norms of the compressed query and the latent; other norms have `ModelConfig.rms_norm_eps`.
    """

    num_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    v_head_dim: int
    rope: Rope
    scale: float | None = None
    norm_eps: float = 1e-6
    query_scaling: QueryScaling | None = None
    indexer: IndexerConfig | None = None

    @property
    def cache_tensors(self) -> CacheTensors:
        """The latent with the rotated key that all heads share, and the indexer's keys."""
        latent: CacheTensors = {"latent": (((self.kv_lora_rank + self.rope.size,), "auto"),)}
        return latent if self.indexer is None else {**latent, "index": (((self.indexer.head_dim,), "auto"),)}

    @property
    def activation_size(self) -> int:
        """Numbers of a token at once: queries in both forms, and the output of every head."""
        return self.num_heads * (2 * (self.kv_lora_rank + self.rope.size) + self.kv_lora_rank)

    def __str__(self) -> str:
        sparse = f", sparse: {self.indexer.top_k} positions" if self.indexer is not None else ""
        return (
            f"latent attention, {self.num_heads} heads, {self.kv_lora_rank} + {self.rope.size} numbers a token{sparse}"
        )


@dataclass(frozen=True, kw_only=True)
class DifferentialAttentionConfig:
    """Differential attention without positions (Ye et al., "Differential Transformer", 2024): see
    `engine.layers.differential_attention`. All projections have biases.

    Attributes:
        num_heads, num_kv_heads, head_dim: neighbouring heads are a pair.
        lambda_init: added to the layer's learned lambda; one less it is also the factor of the output.
        norm_eps: epsilon of the norm of each pair's output.
        window: tokens of the sliding window, the query's own included; None: no window.
        kv_layer: the earlier layer whose keys and values are read; None: the layer has its own.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    lambda_init: float
    norm_eps: float = 1e-5
    window: int | None = None
    kv_layer: int | None = None

    @property
    def qkv_sizes(self) -> tuple[int, ...]:
        """The output sizes of the query, key and value projections, or of the query's alone."""
        kv = self.num_kv_heads * self.head_dim
        return (self.num_heads * self.head_dim, *((kv, kv) if self.kv_layer is None else ()))

    @property
    def window_size(self) -> int | None:
        """Tokens that a query attends to at most; None: all."""
        return self.window

    @property
    def cache_tensors(self) -> CacheTensors:
        """The keys and values of pairs of heads, unless an earlier layer's are read."""
        if self.kv_layer is not None:
            return _NO_TENSORS
        return _keys_and_values(self.num_kv_heads // 2, 2 * self.head_dim, self.window)

    @property
    def activation_size(self) -> int:
        """Numbers of a token at once; queries and outputs are twice as wide, and once more in fp32."""
        return self.head_dim * 2 * (6 * self.num_heads + self.num_kv_heads)

    def __str__(self) -> str:
        seen = f", window {self.window}" if self.window else ""
        shared = f", of layer {self.kv_layer}" if self.kv_layer is not None else ""
        return f"differential attention, {self.num_heads} heads on {self.num_kv_heads} of {self.head_dim}{seen}{shared}"


@dataclass(frozen=True, kw_only=True)
class Mamba2Config:
    """A Mamba-2 mixer (Dao and Gu, 2024): see `kernels.ops.mamba2`.

    Attributes:
        num_heads, head_dim: of the inner width.
        state_size: numbers of the state for each number of a head.
        num_groups: groups of heads that share B and C, and which the gated norm normalises apart.
        norm_eps: epsilon of that norm.
        conv_kernel: taps of the convolution.
        conv_bias: whether the convolution has a bias.
        proj_bias: whether the two projections have biases.
        dt_limits: bounds of the time step.
    """

    num_heads: int
    head_dim: int
    state_size: int
    num_groups: int
    conv_kernel: int
    conv_bias: bool
    norm_eps: float
    proj_bias: bool = False
    dt_limits: tuple[float, float] = (0.0, math.inf)

    @property
    def inner_size(self) -> int:
        """The width of x, z and the output."""
        return self.num_heads * self.head_dim

    @property
    def conv_size(self) -> int:
        """The channels of the convolution: x, B and C."""
        return self.stored_size + self.num_groups * self.state_size

    @property
    def stored_size(self) -> int:
        """The width of a row of the chunk cache: x and B."""
        return self.inner_size + self.num_groups * self.state_size

    @property
    def cache_tensors(self) -> CacheTensors:
        """x and B, and the time steps, of the chunk's tokens; the convolution's last inputs and the state."""
        state = self.num_heads, self.state_size, self.head_dim
        return {
            "chunk": (((self.stored_size,), "auto"), ((self.num_heads,), "float32")),
            "state": (((self.conv_kernel - 1, self.conv_size), "auto"), (state, "float32")),
        }

    @property
    def activation_size(self) -> int:
        """Numbers of a token at once: the projection, the convolution and the output."""
        return 2 * (self.inner_size + self.conv_size) + self.num_heads

    def __str__(self) -> str:
        groups = f"states of {self.state_size} in {self.num_groups} groups"
        return f"Mamba-2, {self.num_heads} heads of {self.head_dim}, {groups}"


@dataclass(frozen=True, kw_only=True)
class GatedDeltaNetConfig:
    """A gated delta net (Yang, Kautz and Hatamizadeh, 2024): see `kernels.ops.gated_delta_rule`.

    Attributes:
        num_heads: of values.
        num_key_heads: of queries and of keys; divides `num_heads`.
        key_dim, value_dim: sizes of a head's keys and values.
        conv_kernel: taps of the convolution.
        norm_eps: epsilon of the gated norm.
    """

    num_heads: int
    num_key_heads: int
    key_dim: int
    value_dim: int
    conv_kernel: int
    norm_eps: float

    @property
    def key_size(self) -> int:
        """The width of the queries, and that of the keys."""
        return self.num_key_heads * self.key_dim

    @property
    def inner_size(self) -> int:
        """The width of the values, of z and of the output."""
        return self.num_heads * self.value_dim

    @property
    def conv_size(self) -> int:
        """The channels of the convolution: queries, keys and values."""
        return 2 * self.key_size + self.inner_size

    @property
    def cache_tensors(self) -> CacheTensors:
        """Keys, updates and decays of the chunk's tokens; the convolution's last inputs and the state."""
        keys, values = (self.num_key_heads, self.key_dim), (self.num_heads, self.value_dim)
        state = self.num_heads, self.key_dim, self.value_dim
        return {
            "chunk": ((keys, "float32"), (values, "float32"), ((self.num_heads,), "float32")),
            "state": (((self.conv_kernel - 1, self.conv_size), "auto"), (state, "float32")),
        }

    @property
    def activation_size(self) -> int:
        """Numbers of a token at once: the projection, the convolution and the output."""
        return 2 * (self.inner_size + self.conv_size) + self.num_heads

    def __str__(self) -> str:
        sizes = f"states of {self.key_dim} x {self.value_dim}"
        return f"gated delta net, {self.num_heads} heads on {self.num_key_heads}, {sizes}"


@dataclass(frozen=True, kw_only=True)
class MambaConfig:
    """A Mamba mixer of the first kind (Gu and Dao, 2023): see `kernels.ops.selective_scan`.

    Attributes:
        inner_size: channels.
        state_size: numbers of the state for each channel.
        dt_rank: numbers from which a token's steps are projected.
        conv_kernel: taps of the convolution, which has a bias.
        gives_memory: whether gated memory units read its scan's output.
    """

    inner_size: int
    state_size: int
    dt_rank: int
    conv_kernel: int
    gives_memory: bool = False

    @property
    def cache_tensors(self) -> CacheTensors:
        """The convolution's last inputs and the state."""
        window, state = (self.conv_kernel - 1, self.inner_size), (self.state_size, self.inner_size)
        return {"state": ((window, "auto"), (state, "float32"))}

    @property
    def activation_size(self) -> int:
        """Numbers of a token at once: the projection, the convolution, steps and outputs in fp32."""
        return 8 * self.inner_size

    def __str__(self) -> str:
        return f"Mamba, {self.inner_size} channels, states of {self.state_size}"


@dataclass(frozen=True, kw_only=True)
class GatedMemoryConfig:
    """A gated memory unit: `out_proj(silu(in_proj(x)) * memory)`.

    Attributes:
        inner_size: numbers of the memory.
        memory_layer: the earlier layer whose scan's output is the memory.
    """

    inner_size: int
    memory_layer: int

    @property
    def cache_tensors(self) -> CacheTensors:
        """Nothing: the memory is of the same step."""
        return _NO_TENSORS

    @property
    def activation_size(self) -> int:
        """Numbers of a token at once: the projection, the memory and their product."""
        return 8 * self.inner_size

    def __str__(self) -> str:
        return f"gated memory of layer {self.memory_layer}, {self.inner_size} channels"


def _keys_and_values(num_heads: int, head_dim: int, window: int | None) -> CacheTensors:
    shape = num_heads, head_dim
    return {"full" if window is None else "window": ((shape, "auto"), (shape, "auto"))}


AttentionMixer = AttentionConfig | LatentAttentionConfig | DifferentialAttentionConfig
RecurrentConfig = Mamba2Config | GatedDeltaNetConfig | MambaConfig
Mixer = AttentionMixer | RecurrentConfig | GatedMemoryConfig
