"""What a model is, layer by layer: hyperparameters as plain values, read from a checkpoint by its family (`engine.models`).

Nothing here needs torch: the front and the controller know models too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Literal

from expertwire.kernels.ops.variants import Activation, Rope, Routing
from expertwire.scheduler.plan import CacheKind, CacheSpec

ITEM_SIZES = {"float32": 4, "bfloat16": 2, "fp8": 1}
SWIGLU = Activation()


@dataclass(frozen=True, kw_only=True)
class QueryScaling:
    """Queries at position p are multiplied by `1 + beta * ln(1 + floor((p + offset) / length))` (Llama 4)."""

    beta: float
    length: int
    offset: int = 0


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Grouped-query attention.

    Attributes:
        rope: None: positions are not told (NoPE).
        qk_norm: RMS norms of query and key before they are rotated: of each head with weights, "head"; of the whole projection,
            "row"; of each head without weights, "plain".
        window: tokens that a query sees, itself included; `chunk`: it sees those of its own chunk of so many.
        sinks: a learned logit a head takes part in the softmax (gpt-oss).
        scale: of the logits; None: head_dim^-0.5.
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

    @property
    def qkv_sizes(self) -> tuple[int, int, int]:
        """Rows of the query's, the key's and the value's projection."""
        kv = self.num_kv_heads * self.head_dim
        return self.num_heads * self.head_dim, kv, kv


@dataclass(frozen=True, kw_only=True)
class Indexer:
    """Chooses the `top_k` positions that sparse attention sees (DeepSeek-V3.2); `rope`: of the first numbers of its heads."""

    num_heads: int
    head_dim: int
    top_k: int
    rope: Rope


@dataclass(frozen=True, kw_only=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2): see `kernels.ops.mla`.

    Attributes:
        query_rank: of the compressed query; None: it is projected at once.
        rank: numbers of the latent.
        plain_dim, rope.size, value_dim: numbers of a head's query and key without position, with it, and of its value.
        scale: of the logits; None: `kernels.ops.rotary.softmax_scale`.
        norm_eps: of the norms of the compressed query and the latent, whatever the model's other norms have.
    """

    num_heads: int
    query_rank: int | None
    rank: int
    plain_dim: int
    value_dim: int
    rope: Rope
    scale: float | None = None
    norm_eps: float = 1e-6
    query_scaling: QueryScaling | None = None
    indexer: Indexer | None = None


@dataclass(frozen=True, kw_only=True)
class Mlp:
    """A dense MLP with SwiGLU, of inner width `size`."""

    size: int


@dataclass(frozen=True, kw_only=True)
class Moe(Routing):
    """A mixture of experts.

    Attributes:
        size: inner width of one expert; `shared_size`: of the shared one, 0: none.
        choice_bias: a bias on scores for the choice only; `router_bias`: on logits.
        router_fp32: the router's product is computed in float32, whatever the activations are.
        bias: of the experts' two products.
    """

    num_experts: int
    size: int
    choice_bias: bool = False
    router_bias: bool = False
    router_fp32: bool = False
    activation: Activation = SWIGLU
    bias: bool = False
    shared_size: int = 0


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A residual layer: attention, then an MLP or a mixture of experts, each behind a norm."""

    attention: Attention | LatentAttention
    mlp: Mlp | Moe


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """How a checkpoint stores matrices: names of `engine.loader.quantization.METHODS`, None: as they are.

    `skipped`: modules that are stored as they are, as the checkpoint lists them (see
    `engine.loader.quantization.is_skipped`); asked
    only where there are no tensors to look at.
    """

    linears: str | None
    experts: str | None
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """Tensors of a checkpoint that are knowingly not read: a regular expression of their whole names, and why."""

    pattern: str
    why: str


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Hyperparameters of a decoder."""

    architecture: str  # e.g. "Qwen3MoeForCausalLM"
    model_type: str  # as the checkpoint has it, e.g. "kimi_k2"
    dtype: Literal["float32", "bfloat16"]  # that it runs in: the checkpoint's, or the one asked for
    kv_cache_dtype: Literal["auto", "fp8"] = "auto"  # of keys, values and latents; "auto": `dtype`
    vocab_size: int
    hidden_size: int
    layers: tuple[Layer, ...]
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    eos_token_ids: tuple[int, ...] = ()  # of generation_config.json if there, else of config.json
    quantization: Quantization | None = None
    skipped: tuple[Skipped, ...] = ()

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @cached_property
    def moe(self) -> Moe | None:
        """The mixture of experts, of which a model has one kind; None: it is dense."""
        kinds = {layer.mlp for layer in self.layers if isinstance(layer.mlp, Moe)}
        assert len(kinds) <= 1, f"layers with different mixtures of experts: {kinds}"
        return next(iter(kinds), None)

    @property
    def sparse_layers(self) -> tuple[bool, ...]:
        """Whether each layer is a mixture of experts."""
        return tuple(isinstance(layer.mlp, Moe) for layer in self.layers)

    @property
    def num_experts(self) -> int:
        return self.moe.num_experts if self.moe is not None else 0

    @property
    def top_k(self) -> int:
        return self.moe.top_k if self.moe is not None else 0

    def cache_specs(self) -> tuple[CacheSpec, ...]:
        """The named caches that the model keeps on a rank; those that see everything come first."""
        specs: list[CacheSpec] = []
        kinds: dict[CacheKind, Callable[[Layer], int]] = {"full": _kv, "latent": _latent, "index": _index}
        for kind, numbers in kinds.items():
            specs += self._cache(kind, kind, None, numbers)
        for window in sorted({window for layer in self.layers if (window := _window(layer)) is not None}):
            specs += self._cache(f"window {window}", "window", window, partial(_kv, window=window))
        return tuple(specs)

    def cache_dtype(self, kind: CacheKind) -> Literal["float32", "bfloat16", "fp8"]:
        """Of a kind of cache. Index keys choose positions, which small errors would change: they stay in the model's."""
        return self.dtype if self.kv_cache_dtype == "auto" or kind == "index" else self.kv_cache_dtype

    def _cache(
        self, name: str, kind: CacheKind, window: int | None, numbers: Callable[[Layer], int]
    ) -> list[CacheSpec]:
        """None, or one of the layers that keep any numbers of a token there."""
        layers = tuple(i for i, layer in enumerate(self.layers) if numbers(layer))
        size = ITEM_SIZES[self.cache_dtype(kind)] * sum(numbers(self.layers[i]) for i in layers)
        if not layers:
            return []
        return [CacheSpec(name=name, kind=kind, bytes_per_token=size, writers=layers, readers=layers, window=window)]


def _window(layer: Layer) -> int | None:
    """Tokens of a layer's cache that any token needs; None: all."""
    attention = layer.attention
    return (attention.window or attention.chunk) if isinstance(attention, Attention) else None


def _kv(layer: Layer, window: int | None = None) -> int:
    """Numbers a token of keys and values in the cache of that window, of one layer."""
    attention = layer.attention
    if not isinstance(attention, Attention) or _window(layer) != window:
        return 0
    return 2 * attention.num_kv_heads * attention.head_dim


def _latent(layer: Layer) -> int:
    attention = layer.attention
    return attention.rank + attention.rope.size if isinstance(attention, LatentAttention) else 0


def _index(layer: Layer) -> int:
    attention = layer.attention
    return attention.indexer.head_dim if isinstance(attention, LatentAttention) and attention.indexer else 0
