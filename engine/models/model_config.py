"""The configuration of a model, layer by layer: plain values that a model family reads from a checkpoint's `config.json`.

No torch is needed: the frontend and the controller use it too.

D model width, F expert width, E logical experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from expertwire.engine.models.hf_config import HfConfig
from expertwire.kernels.ops.variants import Activation, LongRope, Rope, Routing
from expertwire.scheduler.config import CacheKind, CacheSpec

ITEM_SIZES = {"float32": 4, "bfloat16": 2, "fp8": 1}
SWIGLU = Activation()


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

    @property
    def qkv_sizes(self) -> tuple[int, int, int]:
        """The output sizes of the query, key and value projections."""
        kv = self.num_kv_heads * self.head_dim
        return self.num_heads * self.head_dim, kv, kv


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


@dataclass(frozen=True, kw_only=True)
class MlpConfig:
    """A dense MLP with SwiGLU."""

    intermediate_size: int


@dataclass(frozen=True, kw_only=True)
class MoeConfig(Routing):
    """A mixture of experts.

    Attributes:
        intermediate_size: of one expert.
        choice_bias: whether a bias is added to the scores for the choice of experts only.
        router_bias: whether a bias is added to the router's logits.
        router_fp32: whether the router's product is computed in float32, whatever the activations are.
        bias: whether the experts' two products have biases.
        shared_intermediate_size: of the shared expert; 0: there is none.
    """

    num_experts: int
    intermediate_size: int
    choice_bias: bool = False
    router_bias: bool = False
    router_fp32: bool = False
    activation: Activation = SWIGLU
    bias: bool = False
    shared_intermediate_size: int = 0


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """A decoder layer: attention, then an MLP or a mixture of experts, each with a norm before it."""

    attention: AttentionConfig | LatentAttentionConfig
    mlp: MlpConfig | MoeConfig


@dataclass(frozen=True, kw_only=True)
class QuantizationConfig:
    """The quantization of a checkpoint's matrices.

    Attributes:
        linear_method: name of a method in `engine.loader.quantization.METHODS`, of linear layers; None: not quantized.
        expert_method: likewise, of experts.
        ignored_modules: modules that are not quantized, as the config lists them (see `engine.loader.quantization.is_ignored`).
            Used only without a checkpoint: otherwise its tensors show what is quantized.
    """

    linear_method: str | None
    expert_method: str | None
    ignored_modules: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class IgnoredTensors:
    """Tensors of a checkpoint that are not loaded: a regular expression for their whole names, and the reason."""

    pattern: str
    why: str


@dataclass(frozen=True, kw_only=True)
class TensorNames:
    """The names of a checkpoint's modules, without ".weight"; the defaults are those of Llama and Qwen.

    Attributes:
        prefixes: possible prefixes of the decoder; the first one that the checkpoint has is used.
        heads: possible names of the language model's head, likewise.
        qkv: the projections of query, key and value, or one module with all of them.
        output: attention's output projection.
        mlp: prefix of a dense MLP within a layer.
        moe: prefix of a mixture of experts within a layer.
        gate, up, down: projections of an MLP, a shared expert and each expert.
        gate_up: module with both projections of a dense MLP; None: `gate` and `up`.
        router: within `moe`.
        choice_bias: the tensor of `MoeConfig.choice_bias`, within `moe`.
        experts: prefix of one expert within `moe`, a format string of its id.
        fused: the tensors that hold all experts' gate and up, and all experts' down, within `moe`.
        fused_layout: axes of unquantized fused tensors: "rows" [E, 2F, D] and [E, D, F], gate before up; "columns" [E, D, 2F]
            and [E, F, D].
        interleaved: whether the rows of gate and up alternate in fused tensors.
        shared: prefix of the shared expert within `moe`.
    """

    prefixes: tuple[str, ...] = ("model.",)
    heads: tuple[str, ...] = ("lm_head",)
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    output: str = "self_attn.o_proj"
    mlp: str = "mlp."
    moe: str = "mlp."
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    gate_up: str | None = None
    router: str = "gate"
    choice_bias: str = "gate.e_score_correction_bias"
    experts: str = "experts.{}."
    fused: tuple[str, str] = ("experts.gate_up_proj", "experts.down_proj")
    fused_layout: Literal["rows", "columns"] = "rows"
    interleaved: bool = False
    shared: str = "shared_experts."


DEFAULT_NAMES = TensorNames()


@dataclass(frozen=True, kw_only=True)
class ModelFamily:
    """A family of architectures: its configs and the names in its checkpoints. Everything else is shared by all families.

    Attributes:
        layers: reads the layers from config.json, or from its `text_config` if there is one.
        names: names of the checkpoint's tensors.
        ignored_tensors: tensors of its checkpoints that are not loaded.
        mtp_field: the field with the number of layers for multi-token prediction, which are not loaded; None: there are none.
    """

    layers: Callable[[HfConfig], tuple[LayerConfig, ...]]
    names: TensorNames = DEFAULT_NAMES
    ignored_tensors: tuple[IgnoredTensors, ...] = ()
    mtp_field: str | None = None


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Hyperparameters of a decoder."""

    architecture: str  # e.g. "Qwen3MoeForCausalLM"
    model_type: str  # the checkpoint's, e.g. "kimi_k2"
    dtype: Literal["float32", "bfloat16"]  # of activations and unquantized weights
    kv_cache_dtype: Literal["auto", "fp8"] = "auto"  # of keys, values and latents; "auto": `dtype`
    vocab_size: int
    hidden_size: int
    layers: tuple[LayerConfig, ...]
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    eos_token_ids: tuple[int, ...] = ()
    quantization: QuantizationConfig | None = None
    tensor_names: TensorNames = DEFAULT_NAMES
    ignored_tensors: tuple[IgnoredTensors, ...] = ()

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @cached_property
    def moe(self) -> MoeConfig | None:
        """The mixture of experts, which is the same in all layers that have one; None: the model is dense."""
        kinds = {layer.mlp for layer in self.layers if isinstance(layer.mlp, MoeConfig)}
        assert len(kinds) <= 1, f"layers with different mixtures of experts: {kinds}"
        return next(iter(kinds), None)

    @property
    def sparse_layers(self) -> tuple[bool, ...]:
        """For each layer, whether it is a mixture of experts."""
        return tuple(isinstance(layer.mlp, MoeConfig) for layer in self.layers)

    @property
    def num_experts(self) -> int:
        return self.moe.num_experts if self.moe is not None else 0

    @property
    def top_k(self) -> int:
        return self.moe.top_k if self.moe is not None else 0

    @property
    def original_max_position_embeddings(self) -> int | None:
        """The model's original context, up to which sequences are rotated by other factors; None: all by the same ones."""
        ropes = [layer.attention.rope for layer in self.layers]
        scalings = [rope.scaling for rope in ropes if rope is not None]
        originals = {scaling.original_max_position for scaling in scalings if isinstance(scaling, LongRope)}
        assert len(originals) <= 1, f"layers with different original contexts: {originals}"
        return next(iter(originals), None)

    def cache_specs(self) -> tuple[CacheSpec, ...]:
        """Return the KV caches of a rank; those without a window come first."""
        values_of: dict[tuple[CacheKind, int | None], dict[int, int]] = {}  # by layer
        for i, layer in enumerate(self.layers):
            for kind, window, num_values in _cached_values(layer.attention):
                values_of.setdefault((kind, window), {})[i] = num_values
        kinds: list[CacheKind] = ["full", "latent", "index", "window"]
        specs = []
        for kind, window in sorted(values_of, key=lambda key: (kinds.index(key[0]), key[1] or 0)):
            values = values_of[kind, window]
            specs.append(
                CacheSpec(
                    name=kind if window is None else f"window {window}",
                    kind=kind,
                    bytes_per_token=ITEM_SIZES[self.cache_dtype(kind)] * sum(values.values()),
                    writers=tuple(values),
                    readers=tuple(values),
                    window=window,
                )
            )
        return tuple(specs)

    def cache_dtype(self, kind: CacheKind) -> Literal["float32", "bfloat16", "fp8"]:
        """Return the dtype of a kind of cache. Index keys are never fp8: a small error would change the chosen positions."""
        return self.dtype if self.kv_cache_dtype == "auto" or kind == "index" else self.kv_cache_dtype


def _cached_values(
    attention: AttentionConfig | LatentAttentionConfig,
) -> Iterator[tuple[CacheKind, int | None, int]]:
    """Yield the kind and the window of each cache that a layer writes, and how many values of a token."""
    if isinstance(attention, AttentionConfig):
        window = attention.window or attention.chunk
        yield "full" if window is None else "window", window, 2 * attention.num_kv_heads * attention.head_dim
        return
    yield "latent", None, attention.kv_lora_rank + attention.rope.size
    if attention.indexer is not None:
        yield "index", None, attention.indexer.head_dim
