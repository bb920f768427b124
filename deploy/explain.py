"""`expertwire explain`: which implementations a model runs with on a device, and how its products are cut into tiles."""

from __future__ import annotations

from collections.abc import Iterator

from expertwire.engine.checkpoint import read_model_config
from expertwire.engine.config import ModelConfig

_TOKENS = (1, 8, 64, 512, 4096)


def explain(model: str, device: str, ep_size: int) -> Iterator[str]:
    """Lines of text. "h200" and "b200" need not be here.

    Raises:
        ValueError: there is no such model or device.
    """
    config = read_model_config(model)
    yield from _on_a_cpu(config) if device == "cpu" else _on_a_gpu(config, device, ep_size)


def _on_a_cpu(config: ModelConfig) -> Iterator[str]:
    import torch

    from expertwire.kernels import registry
    from expertwire.kernels.cpu import gemm
    from expertwire.kernels.linear import few_rows_apart

    yield registry.cpu().explain()
    for name, shape in _products(config).items():
        weight = torch.empty(shape, dtype=getattr(torch, config.dtype))
        if few_rows_apart(weight):
            yield f"{name} {list(shape)}: up to {gemm.few(weight.dtype)} rows by {gemm.__name__}, more by oneDNN"
        else:
            yield f"{name} {list(shape)}: by oneDNN, as it has {torch.get_num_threads()} threads, or for the shape"


def _on_a_gpu(config: ModelConfig, device: str, ep_size: int) -> Iterator[str]:
    import torch

    from expertwire.kernels import registry
    from expertwire.kernels.gpu import attention, linear, tiles
    from expertwire.kernels.gpu.device import B200, H200, describe

    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: there is no CUDA device here; allowed are cpu, h200 and b200")
    gpu = {"h200": H200, "b200": B200}.get(device) or describe("cuda")
    dtype = getattr(torch, config.dtype)
    yield registry.triton(gpu).explain()
    yield f"attention: {attention.tiles(head_dim=config.head_dim, element_size=dtype.itemsize, arch=gpu.arch)}"
    for tokens in _TOKENS:
        yield f"{tokens} tokens a step on each of {ep_size} ranks:"
        for name, (rows, depth) in _products(config).items():
            if name == "query, key and value":
                yield f"  {name}: {linear.tiles(tokens, rows, depth, dtype, gpu)}"
                continue
            experts, planned = -(-config.num_experts // ep_size), tokens * config.top_k  # as many come here as go out
            each = tiles.token_tile("dense", planned, experts)
            yield f"  {name}: {tiles.gemm_tiles('dense', each, (experts, rows, depth), planned, gpu)}"


def _products(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """The shapes of some weights."""
    heads = config.num_heads + 2 * config.num_kv_heads
    shapes = {"query, key and value": (heads * config.head_dim, config.hidden_size)}
    if any(config.sparse_layers):
        shapes["w13"] = (2 * config.expert_size, config.hidden_size)
        shapes["w2"] = (config.hidden_size, config.expert_size)
    return shapes
