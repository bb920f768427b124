"""The configuration of a model, layer by layer: plain values that a model family reads from a checkpoint's `config.json`.

No torch is needed: the frontend and the controller use it too.

D model width, F expert width, E logical experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from expertwire.engine.models.hf_config import HfConfig
from expertwire.engine.models.mixer_configs import (
    AttentionConfig,
    DifferentialAttentionConfig,
    LatentAttentionConfig,
    Mixer,
)
from expertwire.kernels.ops.variants import CHUNK, SWIGLU, Activation, LongRope, Routing
from expertwire.scheduler.config import CacheKind, CacheSpec

ITEM_SIZES = {"float32": 4, "bfloat16": 2, "fp8": 1}
# In the order of a model's caches.
_CACHE_KINDS: tuple[CacheKind, ...] = ("full", "latent", "index", "window", "chunk", "state")


@dataclass(frozen=True, kw_only=True)
class MlpConfig:
    """A dense MLP. "relu2" has no gate."""

    intermediate_size: int
    activation: Activation = SWIGLU


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
        shared_gate: whether its output is multiplied by the sigmoid of a number that the layer computes for each token.
        latent_size: width of the rows that experts read and write, to and from which the layer projects (latent MoE, Nemotron 3
            Super); 0: the model's.
    """

    num_experts: int
    intermediate_size: int
    choice_bias: bool = False
    router_bias: bool = False
    router_fp32: bool = False
    activation: Activation = SWIGLU
    bias: bool = False
    shared_intermediate_size: int = 0
    shared_gate: bool = False
    latent_size: int = 0

    @property
    def w13_parts(self) -> tuple[int, ...]:
        """The rows of each matrix of an expert's first product: gate and up, or up alone."""
        return (self.intermediate_size,) * (2 if self.activation.gated else 1)


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """A decoder layer: a mixer of tokens, then an MLP or a mixture of experts, each with a norm before it; one may be missing."""

    mixer: Mixer | None
    mlp: MlpConfig | MoeConfig | None


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
        embed, norm: the embedding and the last norm.
        input_norm, post_norm: the norms before a layer's mixer and before its MLP.
        attention: prefix of an attention's scales and norms within a layer.
        qkv: the projections of query, key and value, or one module with all of them.
        output: attention's output projection.
        mamba: prefix of a Mamba mixer or a gated memory unit within a layer.
        delta: likewise, of a gated delta net.
        delta_by_head: whether its projections are two, "in_proj_qkvz" and "in_proj_ba", in which each key head has its rows of
            q, k, v and z, and of b and a; else they are four.
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
        shared_gate: the projection of `MoeConfig.shared_gate`, within `moe`.
        latent: within `moe`, the projections of `MoeConfig.latent_size`.
    """

    prefixes: tuple[str, ...] = ("model.",)
    heads: tuple[str, ...] = ("lm_head",)
    embed: str = "embed_tokens"
    norm: str = "norm"
    input_norm: str = "input_layernorm"
    post_norm: str = "post_attention_layernorm"
    attention: str = "self_attn."
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    output: str = "self_attn.o_proj"
    mamba: str = "mamba."
    delta: str = "linear_attn."
    delta_by_head: bool = False
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
    shared_gate: str = "shared_expert_gate"
    latent: tuple[str, str] = ("fc1_latent_proj", "fc2_latent_proj")


DEFAULT_NAMES = TensorNames()


@dataclass(frozen=True, kw_only=True)
class ModelFamily:
    """A family of architectures: its configs and the names in its checkpoints. Everything else is shared by all families.

    Attributes:
        layers: reads the layers from config.json, or from its `text_config` if there is one.
        names: names of the checkpoint's tensors.
        ignored_tensors: tensors of its checkpoints that are not loaded.
        mtp_field: the field with the number of layers for multi-token prediction, which are not loaded; None: there are none.
        fields: reads fields of `ModelConfig` that this family has elsewhere, or alone.
        activation: what `hidden_act` must be.
    """

    layers: Callable[[HfConfig], tuple[LayerConfig, ...]]
    names: TensorNames = DEFAULT_NAMES
    ignored_tensors: tuple[IgnoredTensors, ...] = ()
    mtp_field: str | None = None
    fields: Callable[[HfConfig], Mapping[str, Any]] = lambda hf: {}
    activation: str = "silu"


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Hyperparameters of a decoder.

    Attributes:
        embedding_scale: factor of the embedding.
        logits_scale: factor of the logits.
        head: see `engine.layers.head`; models with another head than "lm" score texts by `num_labels` labels.
        num_labels: 0: the model generates text.
        norm: kind of the norms before each half of a layer and of the last one: "rms" or "layer", which have biases.
        rms_norm_eps: their epsilon, of either kind.
        snapshot_every: as `CacheSpec` has it, for models with recurrent states.
        zero_centred_norms: whether the weights of norms are stored less one; recurrent mixers' own are not.
    """

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
    embedding_scale: float = 1.0
    logits_scale: float = 1.0
    head: Literal["lm", "score", "reward"] = "lm"
    num_labels: int = 0
    norm: Literal["rms", "layer"] = "rms"
    snapshot_every: int = 512
    zero_centred_norms: bool = False

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
    def dispatch_size(self) -> int:
        """Numbers in a row that travels to its experts."""
        return (self.moe.latent_size if self.moe is not None else 0) or self.hidden_size

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
        mixers = [layer.mixer for layer in self.layers]
        ropes = [mixer.rope for mixer in mixers if isinstance(mixer, AttentionConfig | LatentAttentionConfig)]
        scalings = [rope.scaling for rope in ropes if rope is not None]
        originals = {scaling.original_max_position for scaling in scalings if isinstance(scaling, LongRope)}
        assert len(originals) <= 1, f"layers with different original contexts: {originals}"
        return next(iter(originals), None)

    def cache_specs(self) -> tuple[CacheSpec, ...]:
        """Return the KV caches of a rank; those of all tokens come first, recurrent states last."""
        bytes_of: dict[tuple[CacheKind, int | None], dict[int, int]] = {}  # by layer
        for i, layer in enumerate(self.layers):
            if layer.mixer is None:
                continue
            for kind, tensors in layer.mixer.cache_tensors.items():
                nbytes = sum(math.prod(shape) * ITEM_SIZES[self.cache_dtype(kind, dtype)] for shape, dtype in tensors)
                bytes_of.setdefault((kind, _window(layer.mixer) if kind == "window" else None), {})[i] = nbytes
        specs = []
        for kind, window in sorted(bytes_of, key=lambda key: (_CACHE_KINDS.index(key[0]), key[1] or 0)):
            layers = bytes_of[kind, window]
            specs.append(
                CacheSpec(
                    name=kind if window is None else f"window {window}",
                    kind=kind,
                    bytes_per_token=sum(layers.values()),
                    writers=tuple(layers),
                    readers=self._readers(kind, layers),
                    window=window,
                    snapshot_every=self.snapshot_every if kind == "state" else None,
                    chunk_size=CHUNK if kind in ("chunk", "state") else None,
                )
            )
        return tuple(specs)

    def _readers(self, kind: CacheKind, writers: Collection[int]) -> tuple[int, ...]:
        """Return the writers of a cache, and the layers that read what one of them writes."""
        others = [
            i
            for i, layer in enumerate(self.layers)
            if isinstance(layer.mixer, DifferentialAttentionConfig)
            and layer.mixer.kv_layer in writers
            and kind in ("full", "window")
        ]
        return tuple(sorted((*writers, *others)))

    def cache_dtype(self, kind: CacheKind, dtype: str = "auto") -> Literal["float32", "bfloat16", "fp8"]:
        """Return the dtype of a tensor of a kind of cache, for which its mixer names "float32" or "auto".

        Index keys and recurrent states are never fp8: a small error would change the chosen positions, or grow.
        """
        if dtype == "float32":
            return "float32"
        is_fp8 = self.kv_cache_dtype == "fp8" and kind in ("full", "window", "latent")
        return "fp8" if is_fp8 else self.dtype


def _window(mixer: Mixer) -> int | None:
    return mixer.window_size if isinstance(mixer, AttentionConfig | DifferentialAttentionConfig) else None
