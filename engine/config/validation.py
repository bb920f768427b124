"""Checks of an `EngineConfig` against a model, before any process starts, and what both imply for dispatch."""

from __future__ import annotations

import math
from pathlib import Path

from expertwire.comm.topology import backend_times, topology
from expertwire.engine.config.engine_config import EngineConfig
from expertwire.engine.kv_cache.cache_sizes import cache_sizes
from expertwire.engine.loader.checkpoint import Checkpoint
from expertwire.engine.loader.quantization import expert_format
from expertwire.engine.models.mixer_configs import (
    AttentionConfig,
    DifferentialAttentionConfig,
    LatentAttentionConfig,
    Mixer,
)
from expertwire.engine.models.model_config import ITEM_SIZES, ModelConfig, MoeConfig
from expertwire.moe.eplb.placement import place

_FP8_GROUP = 128  # numbers that share a scale
_FLASHINFER_HEAD_DIMS = (64, 128, 256)
_FLASHINFER_LATENT = (512, 64)  # sizes of a latent without and with position


def validate(config: EngineConfig, model: ModelConfig) -> int:
    """Check that the options fit the model.

    Returns:
        The maximum number of tokens of one request.

    Raises:
        ValueError: they do not; names the option and what is allowed.
    """
    longest = model.max_position_embeddings
    if config.max_model_len is not None and not 2 <= config.max_model_len <= longest:
        raise ValueError(f"max_model_len must be in [2, {longest}], the model's positions, got {config.max_model_len}")
    if any(model.sparse_layers):
        place(model.num_experts, config.ep_size, config.num_redundant_experts)
    else:
        for field in ("num_redundant_experts", "eplb_step_interval"):
            if value := getattr(config, field):
                raise ValueError(f"{field} must be 0: {model.architecture} has no experts; got {value}")
    check_dispatch(config, model)
    check_attention(config, model)
    _check_states(config, model)
    if config.topology is not None:
        topology.read(config.topology).first(config.ep_size)
    if config.quantization is not None:
        _check_quantization(config.quantization, model)
    if config.load_format == "auto":
        Checkpoint(config.model)
    max_model_len = config.max_model_len or longest
    if config.kv_cache_memory_bytes is not None:
        cache_sizes(config.on("cpu"), model.cache_specs(), max_model_len)  # a CPU needs less than a GPU
    return max_model_len


def _check_states(config: EngineConfig, model: ModelConfig) -> None:
    specs = model.cache_specs()
    if not any(spec.kind == "state" for spec in specs):
        for field in ("snapshot_every", "snapshot_share"):
            if (value := getattr(config, field)) != getattr(EngineConfig, field):
                raise ValueError(f"{field} has no effect: {model.architecture} has no recurrent states; got {value}")
        return
    tokens = math.lcm(config.block_size, *(spec.chunk_size or 1 for spec in specs))
    if config.snapshot_every % tokens:
        raise ValueError(
            f"snapshot_every must be a multiple of {tokens}, where blocks of {config.block_size} tokens end and the states of "
            f"{model.architecture} move on, got {config.snapshot_every}"
        )


def sends_fp8(config: EngineConfig, model: ModelConfig, *, on_gpu: bool) -> bool:
    """Return whether activations are dispatched in fp8.

    They are when asked for, and between GPUs when the experts would quantise them to the same numbers.

    Raises:
        ValueError: it was asked for, and the experts cannot read such activations.
    """
    asked = config.dispatch_dtype == "fp8"
    if not on_gpu or (config.ep_size == 1 and not asked):
        return asked
    obstacle = _fp8_obstacle(config, model)
    if asked and obstacle:
        raise ValueError(f"dispatch_dtype 'fp8' needs, on a GPU, {obstacle}")
    return not obstacle


def exchange_tokens(config: EngineConfig, model: ModelConfig, num_ranks: int, *, fp8: bool) -> int:
    """Return how many tokens of a rank one exchange between GPUs takes.

    It is those of a step, or as many as there is memory for in the worst case; larger steps take several exchanges.
    """
    from expertwire.comm.all_to_all import symmetric_buffer
    from expertwire.kernels.ops.quantize import packed_bytes

    size = max(moe.intermediate_size for layer in model.layers if isinstance(moe := layer.mlp, MoeConfig))
    item = ITEM_SIZES[model.dtype]
    quantised = expert_format(model, config.quantization) in ("fp8_block", "fp8_row")
    return symmetric_buffer.exchange_tokens(
        config.micro_batch_tokens,
        num_ranks=num_ranks,
        experts=-(-(model.num_experts + config.num_redundant_experts) // num_ranks),
        top_k=model.top_k,
        row_bytes=packed_bytes(model.dispatch_size) if fp8 else model.hidden_size * item,
        combine_bytes=model.dispatch_size * item,
        expert_bytes=size * (item + quantised),
        budget=symmetric_buffer.EXCHANGE_BYTES // config.num_micro_batches,
    )


def describe_gpu_dispatch(*, graph_safe: bool, fp8: bool) -> str:
    """Return a line on how tokens are exchanged between GPUs, for people."""
    steps = (
        "small steps replay CUDA graphs"
        if graph_safe
        else "the all-to-all counts rows on the host, so no step replays a CUDA graph"
    )
    rows = (
        "activations are sent in fp8, as the experts would quantise them" if fp8 else "activations are sent as they are"
    )
    return f"{rows}; {steps}"


def check_dispatch(config: EngineConfig, model: ModelConfig) -> None:
    """Check the options about tokens that are exchanged between ranks.

    Raises:
        ValueError: they do not fit the model or the number of ranks.
    """
    for field in ("all2all_table", "dispatch_dtype", "enable_two_batch_overlap"):
        value = getattr(config, field)
        if value not in (None, "auto", False) and not any(model.sparse_layers):
            raise ValueError(f"{field} has no effect: {model.architecture} has no experts; got {value!r}")
    if config.dispatch_dtype == "fp8" and model.dispatch_size % _FP8_GROUP:
        raise ValueError(
            f"dispatch_dtype 'fp8' needs rows of a multiple of {_FP8_GROUP} numbers; {model.architecture} has "
            f"{model.dispatch_size}"
        )
    sends_fp8(config, model, on_gpu=config.device == "cuda")
    if config.all2all_table is not None:
        table = backend_times.read(config.all2all_table)
        table.check(config.ep_size, table.device if config.device == "auto" else config.device)


def _check_quantization(name: str, model: ModelConfig) -> None:
    if model.moe is None:
        raise ValueError(f"quantization must be None: {model.architecture} has no experts; got {name!r}")
    if model.quantization is not None and model.quantization.expert_method is not None:
        raise ValueError(
            f"quantization must be None: the checkpoint has experts in {model.quantization.expert_method} already; got {name!r}"
        )
    group = 1 if name == "fp8" else 32
    if model.dispatch_size % group or model.moe.intermediate_size % group:
        raise ValueError(
            f"quantization {name!r} needs experts whose widths are multiples of {group}; {model.architecture} has "
            f"{model.dispatch_size} and {model.moe.intermediate_size}"
        )


def check_attention(config: EngineConfig, model: ModelConfig) -> None:
    """Check that the attention backend has what the model needs.

    Raises:
        ValueError: it has not.
    """
    if config.attention_backend != "flashinfer":
        return
    lacks = dict.fromkeys(lack for layer in model.layers for lack in _flashinfer_lacks(layer.mixer))
    if model.dtype != "bfloat16":
        lacks[f"dtype {model.dtype} (bfloat16 is allowed)"] = None
    if lacks:
        raise ValueError(
            f"attention_backend 'flashinfer' lacks what {model.architecture} needs: {', '.join(lacks)}; use 'triton'"
        )


def _flashinfer_lacks(attention: Mixer | None) -> list[str]:
    found: list[str] = []
    if isinstance(attention, DifferentialAttentionConfig) and 2 * attention.head_dim not in _FLASHINFER_HEAD_DIMS:
        allowed = ", ".join(str(dim // 2) for dim in _FLASHINFER_HEAD_DIMS)
        found.append(f"differential attention with heads of {attention.head_dim} ({allowed} are allowed)")
    if not isinstance(attention, AttentionConfig | LatentAttentionConfig):
        return found
    if isinstance(attention, LatentAttentionConfig):
        if attention.indexer is not None:
            found.append("sparse attention")
        if (sizes := (attention.kv_lora_rank, attention.rope.size)) != _FLASHINFER_LATENT:
            found.append(f"latents of {sizes} numbers ({_FLASHINFER_LATENT} are allowed)")
        return found
    if attention.chunk is not None:
        found.append("attention in chunks")
    if attention.sinks:
        found.append("sinks")
    if attention.head_dim not in _FLASHINFER_HEAD_DIMS:
        allowed = ", ".join(map(str, _FLASHINFER_HEAD_DIMS))
        found.append(f"heads of {attention.head_dim} ({allowed} are allowed)")
    return found


def _fp8_obstacle(config: EngineConfig, model: ModelConfig) -> str:
    """Return what is needed for experts to read activations in fp8; "" if nothing is missing."""
    if model.dispatch_size % _FP8_GROUP:
        return f"rows of a multiple of {_FP8_GROUP} numbers; {model.architecture} has {model.dispatch_size}"
    format = expert_format(model, config.quantization)
    if (format, model.dtype) != ("fp8_block", "bfloat16"):
        return (
            "experts of format fp8_block (quantization 'fp8', or a checkpoint's) and dtype bfloat16; these are "
            f"{format} and {model.dtype}"
        )
    plain = _layers_with_plain_experts(config, model) if config.quantization is None else []
    if plain:
        layers = f"layer{'s' * (len(plain) > 1)} {', '.join(map(str, plain))}"
        return f"experts of format fp8_block in every layer, and the checkpoint has those of {layers} as they are"
    return ""


def _layers_with_plain_experts(config: EngineConfig, model: ModelConfig) -> list[int]:
    """Return the layers whose experts are unquantised, by the checkpoint's tensors or, without them, its config."""
    from expertwire.engine.models.decoder_parameters import declare_parameters  # slow to import

    unread = config.load_format != "auto" or not any(Path(config.model).glob("*.safetensors*"))
    layout = declare_parameters(model, None if unread else Checkpoint(config.model).tensors, lambda i: ())
    return [i for i, sparse in enumerate(model.sparse_layers) if sparse and f"layers.{i}.w13" in layout.specs]
