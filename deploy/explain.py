"""`expertwire explain`: the kernels that a model runs with on a device, their tile sizes, and the all-to-all between ranks."""

from __future__ import annotations

from collections.abc import Iterator

from expertwire.comm.topology import backend_times
from expertwire.comm.topology.backend_choice import BackendConditions, choose
from expertwire.comm.topology.topology import RankLocation, Topology, read
from expertwire.engine.config import validation
from expertwire.engine.config.engine_config import EngineConfig
from expertwire.engine.loader.quantization import expert_format
from expertwire.engine.models.mixer_configs import AttentionConfig, GatedDeltaNetConfig
from expertwire.engine.models.model_config import ModelConfig
from expertwire.engine.models.registry import read_model_config

_TOKENS = (1, 8, 64, 512, 4096)
_NO_GPU = "--device: there is no CUDA device here; allowed are cpu, h200 and b200"


def explain(options: EngineConfig, device: str, topology: str | None = None) -> Iterator[str]:
    """Yield lines about an engine with these options on a device.

    Args:
        options: the engine's options.
        device: "cpu", "cuda", "h200" or "b200"; the latter two need not be present.
        topology: location of the ranks, as `comm.topology.topology.read` reads it.

    Raises:
        ValueError: there is no such model, device or topology, or the options do not fit it.
    """
    config = read_model_config(options.model, kv_cache_dtype=options.kv_cache_dtype)
    dispatch = list(_describe_all_to_all(config, options, device, topology))  # first, as it may raise
    yield from _on_a_cpu(config) if device == "cpu" else _on_a_gpu(config, device, options.ep_size)
    for spec in config.cache_specs():
        held = "state" if spec.kind == "state" else "token"
        yield f"cache {spec.name!r} in {config.cache_dtype(spec.kind)}: {spec.bytes_per_token:,} bytes a {held} on each rank"
    yield from dispatch


def _describe_all_to_all(
    config: ModelConfig, options: EngineConfig, device: str, topology: str | None
) -> Iterator[str]:
    """Yield the all-to-all backend, the reason for it, the memory it needs and the bytes it moves."""
    if not any(config.sparse_layers):
        return
    options = options.on(device)
    validation.check_dispatch(options, config)
    ep_size, fp8 = options.ep_size, validation.sends_fp8(options, config, on_gpu=device != "cpu")
    where = read(topology).first(ep_size) if topology else _default_topology(device, ep_size)
    row = config.dispatch_size * {"float32": 4, "bfloat16": 2}[config.dtype]
    sent = config.dispatch_size * 33 // 32 if fp8 else row  # a scale of four bytes for 128 numbers
    here = BackendConditions(
        topology=where,
        device="cpu" if device == "cpu" else "cuda",
        step_rows=ep_size * options.micro_batch_tokens * config.top_k,
        row_bytes=sent + row,
        # The libraries of a device that is not present are assumed.
        libraries=_libraries() if device in ("cpu", "cuda") else ("gloo", "nccl"),
    )
    table = backend_times.read(options.all2all_table) if options.all2all_table else None
    choice = choose(options.all2all_backend, here, table)
    if ep_size > 1:
        is_split = options.num_micro_batches > 1
        yield (
            "a step in two micro-batches, one computing while the other is exchanged" if is_split else "a step at once"
        )
        if choice.name == "nvlink":
            tokens = options.micro_batch_tokens
            if device != "cpu":
                tokens = validation.exchange_tokens(options, config, ep_size, fp8=fp8)
            nbytes = tokens * (ep_size * sent + config.top_k * row)
            yield f"symmetric buffers of a rank: {options.num_micro_batches} of about {nbytes / 1e6:.1f} MB, for {tokens} tokens"
        if device != "cpu":
            yield validation.describe_gpu_dispatch(graph_safe=choice.name == "nvlink", fp8=fp8)
    yield str(where)
    yield f"all-to-all {choice}"
    if ep_size == 1:
        return
    from expertwire.comm.all_to_all import cost_model

    copies = cost_model.distinct_ranks(cost_model.even(config.num_experts, ep_size), config.top_k)
    out = cost_model.wire_bytes(sent, copies, ep_size)
    back = cost_model.wire_bytes(row, config.top_k, ep_size)
    yield (
        f"a token goes to {copies:.2f} of {ep_size} ranks, {cost_model.duplicate_probability(copies, config.top_k):.0%} of its "
        f"{config.top_k} copies are saved; {out / 1e3:.1f} KB leave its rank, {back / 1e3:.1f} KB come back (uniform routing)"
    )


def _libraries() -> tuple[str, ...]:
    from expertwire.comm.all_to_all import backends

    return backends.libraries()


def _default_topology(device: str, ep_size: int) -> Topology:
    """Return the topology without a file: one machine, or a rack of Blackwell GPUs."""
    if device in ("h200", "b200"):
        return read("hgx8" if device == "h200" else "nvl72").first(ep_size)
    if device == "cuda":
        return _gpus_here(ep_size)
    location = RankLocation(domain="this machine", node="this machine", failure_domain="this machine")
    return Topology(name="this machine", locations=(location,) * ep_size)


def _gpus_here(ep_size: int) -> Topology:
    import torch

    from expertwire.comm.topology import probe as topology_probe

    count = torch.cuda.device_count()
    if not count:
        raise ValueError(_NO_GPU)
    if ep_size > count:
        raise ValueError(
            f"--ep-size must be in [1, {count}], the GPUs of this machine, unless --topology is set, got {ep_size}"
        )
    return topology_probe.assemble([topology_probe.probe("this machine", f"cuda:{rank}") for rank in range(ep_size)])


def _on_a_cpu(config: ModelConfig) -> Iterator[str]:
    import torch

    from expertwire.kernels import registry
    from expertwire.kernels.cpu import gated_delta_rule, gemm

    yield registry.cpu().explain()
    mixers = [layer.mixer for layer in config.layers]
    for sizes in sorted({(m.key_dim, m.value_dim) for m in mixers if isinstance(m, GatedDeltaNetConfig)}):
        if why := gated_delta_rule.why_reference(*sizes):
            yield f"gated_delta_rule: {registry.plain().gated_delta_rule.__module__}.reference for {why}"
    for name, shape in _products(config).items():
        weight = torch.empty(shape, dtype=getattr(torch, config.dtype))
        if gemm.is_packed(weight):
            yield f"{name} {list(shape)}: packed, by {gemm.__name__}"
        else:
            yield f"{name} {list(shape)}: by torch, as it has {torch.get_num_threads()} threads, or for the shape"


def _on_a_gpu(config: ModelConfig, device: str, ep_size: int) -> Iterator[str]:
    import torch

    from expertwire.kernels import registry
    from expertwire.kernels.gpu import attention, grouped_gemm_tiles, linear
    from expertwire.kernels.gpu.device import B200, H200, describe

    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(_NO_GPU)
    gpu = {"h200": H200, "b200": B200}.get(device) or describe("cuda")
    dtype = getattr(torch, config.dtype)
    yield registry.triton(gpu).explain()
    for head_dim in sorted({a.head_dim for layer in config.layers if isinstance(a := layer.mixer, AttentionConfig)}):
        yield f"attention: {attention.tile_config(head_dim=head_dim, element_size=dtype.itemsize, arch=gpu.arch)}"
    format = expert_format(config, None)
    for tokens in _TOKENS:
        yield f"{tokens} tokens a step on each of {ep_size} ranks:"
        for name, (rows, depth) in _products(config).items():
            if name == "query, key and value":
                yield f"  {name}: {linear.tile_config(tokens, rows, depth, dtype, gpu)}"
                continue
            experts, planned = -(-config.num_experts // ep_size), tokens * config.top_k  # as many come here as go out
            each = grouped_gemm_tiles.token_tile(format, planned, experts)
            tiles = grouped_gemm_tiles.tile_config(format, each, (experts, rows, depth), planned, gpu)
            yield f"  {name}, {format}: {tiles}"


def _products(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Return the shapes of some weights."""
    shapes: dict[str, tuple[int, int]] = {}
    for layer in config.layers:
        if isinstance(layer.mixer, AttentionConfig):
            shapes.setdefault("query, key and value", (sum(layer.mixer.qkv_sizes), config.hidden_size))
    if config.moe is not None:
        shapes["w13"] = (sum(config.moe.w13_parts), config.dispatch_size)
        shapes["w2"] = (config.dispatch_size, config.moe.intermediate_size)
    return shapes
