"""`expertwire inspect`: what a checkpoint is, in lines of text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from expertwire.engine.inspection import Inspection, inspect
from expertwire.engine.model_config import Attention, LatentAttention, ModelConfig, Moe


def lines(path: str, ep_size: int, context: int | None) -> Iterator[str]:
    """Of the checkpoint in folder `path`; memory at `ep_size` ranks, and of a request of `context` tokens (None: the longest).

    Raises:
        ValueError: the checkpoint is not supported or is damaged, or its context is shorter.
    """
    found = inspect(path, ep_size)
    config = found.config
    context = config.max_position_embeddings if context is None else context
    if context > config.max_position_embeddings:
        raise ValueError(
            f"--context must be at most {config.max_position_embeddings}, which the model can do, got {context}"
        )
    if config.moe is not None and ep_size > config.moe.num_experts:
        raise ValueError(f"--ep-size must be at most {config.moe.num_experts}, the experts of a layer, got {ep_size}")
    yield from _what(config)
    yield from _counts(found)
    yield ""
    yield from _table(found)
    yield ""
    yield from _memory(found, context)
    if found.unread:
        yield ""
        yield from _unread(found)


def _what(config: ModelConfig) -> Iterator[str]:
    yield f"{config.architecture} ({config.model_type}), {config.num_layers} layers of width {config.hidden_size}"
    kinds = Counter((_attention(layer.attention), _mlp(layer.mlp)) for layer in config.layers)
    for (attention, mlp), number in kinds.items():
        yield f"  {number} x {attention}; {mlp}"
    stored = "unquantised"
    if config.quantization is not None:
        q = config.quantization
        stored = f"linear layers {q.linears or 'unquantised'}, experts {q.experts or 'unquantised'}"
    yield f"format: {stored}; computes in {config.dtype}; up to {config.max_position_embeddings} tokens"
    tied = "tied to the embedding" if config.tie_word_embeddings else "of its own"
    yield f"vocabulary of {config.vocab_size}, head {tied}; ends at {', '.join(map(str, config.eos_token_ids)) or 'no token'}"


def _attention(config: Attention | LatentAttention) -> str:
    if isinstance(config, LatentAttention):
        sparse = f", sparse: {config.indexer.top_k} positions" if config.indexer is not None else ""
        return f"latent attention, {config.num_heads} heads, {config.rank} + {config.rope.size} numbers a token{sparse}"
    seen = f", window {config.window}" if config.window else f", chunks of {config.chunk}" if config.chunk else ""
    sinks = ", sinks" if config.sinks else ""
    return f"attention, {config.num_heads} heads on {config.num_kv_heads} of {config.head_dim}{seen}{sinks}"


def _mlp(config: Any) -> str:
    if not isinstance(config, Moe):
        return f"MLP of {config.size}"
    shared = f", shared expert of {config.shared_size}" if config.shared_size else ""
    return f"{config.top_k} of {config.num_experts} experts of {config.size} by {config.score}{shared}"


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
    yield f"{'':<16}{'parameters':>18}{where:>16}{f'a rank of {found.ep_size}':>16}"
    for kind, number in found.parameters.items():
        stored, here = found.stored_bytes.get(kind, 0), found.rank_bytes[kind]
        yield f"{kind:<16}{number:>18,}{_size(stored):>16}{_size(here):>16}"
    stored, here = sum(found.stored_bytes.values()), sum(found.rank_bytes.values())
    yield f"{'all':<16}{found.total:>18,}{_size(stored):>16}{_size(here):>16}"


def _memory(found: Inspection, context: int) -> Iterator[str]:
    caches = found.cache_bytes(context)
    for spec in found.caches:
        kept = f"the last {spec.window} tokens" if spec.window is not None else "every token"
        yield (
            f"cache {spec.name!r} of {len(spec.writers)} layers: {spec.bytes_per_token:,} bytes a token, {kept}: "
            f"{_size(caches[spec.name])} for a request of {context}"
        )
    weights, request = sum(found.rank_bytes.values()), sum(caches.values())
    yield (
        f"a rank of {found.ep_size} needs {_size(weights)} for weights and {_size(request)} for each request of {context} tokens"
    )


def _unread(found: Inspection) -> Iterator[str]:
    for entry in found.unread:
        what = f"{entry.tensors} tensors, {_size(entry.nbytes)}" if found.has_weights else "if they are there"
        yield f"not read: {entry.pattern} ({what}): {entry.why}"


def _billions(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e8 else f"{number / 1e6:.2f} M"


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:,.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:,.2f} MB"
