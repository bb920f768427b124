"""What of the option `attention_backend` can be refused before anything starts."""

from __future__ import annotations

from expertwire.engine.config.engine import EngineConfig
from expertwire.engine.models.model_config import Attention, LatentAttention, ModelConfig

_HEAD_DIMS = (64, 128, 256)  # that FlashInfer has kernels for
_LATENT = (512, 64)  # numbers of a latent without and with position


def check(config: EngineConfig, model: ModelConfig) -> None:
    """Whether the asked implementation has what the model's attention needs.

    Raises:
        ValueError: it has not; names the lack and what is allowed.
    """
    if config.attention_backend != "flashinfer":
        return
    lacks = dict.fromkeys(lack for layer in model.layers for lack in _lacks(layer.attention))
    if model.dtype != "bfloat16":
        lacks[f"dtype {model.dtype} (bfloat16 is allowed)"] = None
    if lacks:
        raise ValueError(
            f"attention_backend 'flashinfer' lacks what {model.architecture} needs: {', '.join(lacks)}; use 'triton'"
        )


def _lacks(attention: Attention | LatentAttention) -> list[str]:
    found = []
    if isinstance(attention, LatentAttention):
        if attention.indexer is not None:
            found.append("sparse attention")
        if (sizes := (attention.rank, attention.rope.size)) != _LATENT:
            found.append(f"latents of {sizes} numbers ({_LATENT} are allowed)")
        return found
    if attention.chunk is not None:
        found.append("attention in chunks")
    if attention.sinks:
        found.append("sinks")
    if attention.head_dim not in _HEAD_DIMS:
        found.append(f"heads of {attention.head_dim} ({', '.join(map(str, _HEAD_DIMS))} are allowed)")
    return found
