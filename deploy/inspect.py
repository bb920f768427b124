"""`expertwire inspect`: a description of a checkpoint in lines of text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Literal

from expertwire.engine.loader.inspection import Inspection, inspect
from expertwire.engine.models.model_config import LayerConfig, MlpConfig, ModelConfig, MoeConfig


def lines(
    path: str,
    ep_size: int,
    context: int | None,
    gpu_memory: float,
    kv_cache_dtype: Literal["auto", "fp8"] = "auto",
) -> Iterator[str]:
    """Yield the description of the checkpoint in folder `path`.

    Args:
        path: the folder.
        ep_size: number of ranks.
        context: tokens of a request; None: the model's longest.
        gpu_memory: GiB of a GPU.
        kv_cache_dtype: as `EngineConfig` has it.

    Raises:
        ValueError: the checkpoint is not supported or is damaged, or an argument is too large for it.
    """
    found = inspect(path, ep_size, kv_cache_dtype)
    config = found.config
    context = config.max_position_embeddings if context is None else context
    if context > config.max_position_embeddings:
        raise ValueError(
            f"--context must be at most {config.max_position_embeddings}, which the model can do, got {context}"
        )
    if config.moe is not None and ep_size > config.moe.num_experts:
        raise ValueError(f"--ep-size must be at most {config.moe.num_experts}, the experts of a layer, got {ep_size}")
    yield from _model(config)
    yield from _counts(found)
    yield ""
    yield from _table(found)
    yield ""
    yield from _memory(found, context)
    yield ""
    yield from _on_gpus(found, context, int(gpu_memory * 2**30))
    if found.ignored:
        yield ""
        yield from _ignored(found)


def _model(config: ModelConfig) -> Iterator[str]:
    yield f"{config.architecture} ({config.model_type}), {config.num_layers} layers of width {config.hidden_size}"
    for layer, number in Counter(map(_layer, config.layers)).items():
        yield f"  {number} x {layer}"
    stored = "unquantised"
    if config.quantization is not None:
        q = config.quantization
        stored = f"linear layers {q.linear_method or 'unquantised'}, experts {q.expert_method or 'unquantised'}"
    yield f"format: {stored}; computes in {config.dtype}; up to {config.max_position_embeddings} tokens"
    tied = "tied to the embedding" if config.tie_word_embeddings else "of its own"
    yield f"vocabulary of {config.vocab_size}, head {tied}; ends at {', '.join(map(str, config.eos_token_ids)) or 'no token'}"


def _layer(layer: LayerConfig) -> str:
    halves = [] if layer.mixer is None else [str(layer.mixer)]
    return "; ".join([*halves, *([] if layer.mlp is None else [_mlp(layer.mlp)])])


def _mlp(config: MlpConfig | MoeConfig) -> str:
    if not isinstance(config, MoeConfig):
        return f"MLP of {config.intermediate_size}"
    shared = f", shared expert of {config.shared_intermediate_size}" if config.shared_intermediate_size else ""
    latent = f" on latents of {config.latent_size}" if config.latent_size else ""
    return f"{config.top_k} of {config.num_experts} experts of {config.intermediate_size}{latent} by {config.score}{shared}"


def _counts(found: Inspection) -> Iterator[str]:
    embedding = found.parameters["embedding"]
    yield f"parameters: {found.total:,} ({_billions(found.total)})"
    if found.config.moe is not None:
        head = found.parameters.get("head", 0)
        yield (
            f"active a token: {found.active:,} ({_billions(found.active)}) with embedding and head, "
            f"{_billions(found.active - embedding)} without the embedding, "
            f"{_billions(found.active - embedding - head)} without both"
        )


def _table(found: Inspection) -> Iterator[str]:
    where = "in the files" if found.has_weights else "as stored"
    rank = f"of a rank of {found.ep_size}:"
    yield f"{'':<16}{'parameters':>18}{where:>16}{rank:>20}{'on a CPU':>14}{'on a GPU':>14}"
    held = [found.rank_bytes[device] for device in ("cpu", "cuda")]
    for kind in dict.fromkeys([*found.parameters, *held[0], *held[1]]):
        number, stored = found.parameters.get(kind, 0), found.stored_bytes.get(kind, 0)
        yield _row(kind, number, stored, [bytes_by_kind.get(kind, 0) for bytes_by_kind in held])
    yield _row("all", found.total, sum(found.stored_bytes.values()), [sum(each.values()) for each in held])


def _row(kind: str, number: int, stored: int, held: list[int]) -> str:
    return f"{kind:<16}{number:>18,}{_size(stored):>16}{'':>20}{_size(held[0]):>14}{_size(held[1]):>14}"


def _memory(found: Inspection, context: int) -> Iterator[str]:
    caches = found.cache_bytes(context)
    for spec in found.caches:
        kept = f"a token, the last {spec.window} tokens" if spec.window is not None else "a token, every token"
        if spec.kind == "chunk":
            kept = f"a token, at most {spec.chunk_size} tokens"
        elif spec.kind == "state":
            kept = "a request, and a snapshot"
        yield (
            f"cache {spec.name!r} of {len(spec.writers)} layers, {found.config.cache_dtype(spec.kind)}: "
            f"{spec.bytes_per_token:,} bytes {kept}: {_size(caches[spec.name])} for a request of {context}"
        )
    on_cpu, on_gpu = (sum(found.rank_bytes[device].values()) for device in ("cpu", "cuda"))
    yield (
        f"a rank of {found.ep_size} needs {_size(on_gpu)} for weights on a GPU, {_size(on_cpu)} on a CPU, and "
        f"{_size(sum(caches.values()))} for each request of {context} tokens"
    )


def _on_gpus(found: Inspection, context: int, gpu_bytes: int) -> Iterator[str]:
    """Yield the use of a GPU's memory with default options."""
    plan = found.memory_plan(context, gpu_bytes)
    yield f"a GPU of {_size(gpu_bytes)}, of which {plan.utilization:.0%} may be taken (estimated):"
    for name, nbytes in plan.rows():
        if not name.startswith("weights:"):
            yield f"  {name:<20}{_size(nbytes) if nbytes >= 0 else f'-{_size(-nbytes)}':>14}"
    if (tokens := found.cache_tokens(plan, context)) is not None:
        yield f"  which holds {tokens:,} tokens a GPU"
    else:
        yield f"  which does not hold a request of {context:,} tokens: use a larger --ep-size, or a smaller --context"


def _ignored(found: Inspection) -> Iterator[str]:
    for entry in found.ignored:
        size = f"{entry.number} tensors, {_size(entry.nbytes)}" if found.has_weights else "if they are there"
        yield f"not read: {entry.tensors.pattern} ({size}): {entry.tensors.why}"


def _billions(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e8 else f"{number / 1e6:.2f} M"


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:,.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:,.2f} MB"
