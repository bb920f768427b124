"""Start-up of an engine on the controller's side: the exchange with the ranks, and the size of the KV caches.

P ranks.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from expertwire.comm.control.channel import ControlHub, RankTimeout
from expertwire.engine.config.engine_config import EngineConfig, ModelInfo
from expertwire.engine.config.thinking import ThinkingIds
from expertwire.engine.kv_cache.cache_sizes import CacheSizes, cache_sizes
from expertwire.engine.models.model_config import ModelConfig
from expertwire.scheduler.config import SchedulerConfig


@dataclass(frozen=True, kw_only=True)
class ControllerArgs:
    """Arguments of the controller's process."""

    config: EngineConfig
    model: ModelConfig
    max_model_len: int
    hub_address: str
    token: str
    default_sampling_params: dict[str, Any] = field(default_factory=dict)
    thinking: ThinkingIds | None = None
    log_stats: bool = False


@dataclass(frozen=True, kw_only=True)
class RankDomains:
    """Number of each rank's NVLink domain and failure domain; empty if no expert has replicas."""

    nvlink_domains: tuple[int, ...]
    failure_domains: tuple[int, ...]


def start_ranks(args: ControllerArgs, hub: ControlHub) -> tuple[ModelInfo, RankDomains]:
    """Let the ranks join, load weights and allocate caches, by the exchange that `engine.worker` describes.

    Raises:
        RankLost, RankTimeout, RankError: a rank is at fault.
        CacheTooSmall: the caches do not hold one request.
    """
    timeout_s = args.config.start_timeout_s
    try:
        return _start_within(timeout_s, args, hub)
    except RankTimeout as error:
        raise RankTimeout(error.ranks, f"{error.what}; start_timeout_s is {timeout_s:g}") from None


def _start_within(timeout_s: float, args: ControllerArgs, hub: ControlHub) -> tuple[ModelInfo, RankDomains]:
    hub.wait_joined(timeout_s, lambda: None)
    hub.publish({})
    present = hub.collect(timeout_s)
    nodes = [bytes(answer["node"]) for answer in present]
    sharers_P = np.array([nodes.count(node) for node in nodes])
    hub.publish({"store": present[0]["store"], "sharers": sharers_P})
    loaded = hub.collect(timeout_s)
    device = bytes(loaded[0]["device"]).decode()
    hub.publish({"max_model_len": np.array([args.max_model_len])})
    cache_bytes = min(int(answer["cache_bytes"][0]) for answer in hub.collect(timeout_s))
    specs = args.model.cache_specs()
    sizes = cache_sizes(args.config.on(device), specs, args.max_model_len, cache_bytes)
    thinking = {} if args.thinking is None else args.thinking.to_arrays()
    eos_token_ids = np.array(args.model.eos_token_ids, np.int64)
    numbers = {"num_blocks": np.array(sizes.num_blocks), "max_model_len": np.array([sizes.max_model_len])}
    hub.publish({**numbers, "eos_token_ids": eos_token_ids, **thinking})
    hub.collect(timeout_s)
    domains, failure_domains = np.stack([answer["place"] for answer in loaded], axis=1).tolist() or ((), ())
    info = _model_info(args, sizes, device, bytes(loaded[0]["all_to_all"]).decode())
    return info, RankDomains(nvlink_domains=tuple(domains), failure_domains=tuple(failure_domains))


def _model_info(args: ControllerArgs, sizes: CacheSizes, device: str, all_to_all: str) -> ModelInfo:
    config, model = args.config, args.model
    names = [spec.name for spec in model.cache_specs()]
    return ModelInfo(
        name=config.served_model_name or config.model.rstrip("/").rsplit("/", 1)[-1],
        path=config.model,
        architecture=model.architecture,
        dtype=model.dtype,
        kv_cache_dtype=model.dtype if model.kv_cache_dtype == "auto" else model.kv_cache_dtype,
        vocab_size=model.vocab_size,
        max_model_len=sizes.max_model_len,
        eos_token_ids=model.eos_token_ids,
        num_layers=model.num_layers,
        num_experts=model.num_experts,
        top_k=model.top_k,
        ep_size=config.ep_size,
        device=device,
        all_to_all=all_to_all,
        block_size=config.block_size,
        cache_tokens=sizes.num_tokens,
        cache_blocks=dict(zip(names, sizes.num_blocks, strict=True)),
        cache_bytes=dict(zip(names, sizes.num_bytes, strict=True)),
        max_num_seqs=config.max_num_seqs,
        max_queued_requests=config.max_queued_requests,
        max_queued_requests_per_tenant=config.max_queued_requests_per_tenant or config.max_queued_requests,
        seed=config.seed,
        default_sampling_params=args.default_sampling_params,
        num_labels=model.num_labels,
    )


def scheduler_config(args: ControllerArgs, info: ModelInfo) -> SchedulerConfig:
    """Return the scheduler's configuration."""
    config = args.config.on(info.device)
    return SchedulerConfig(
        num_ranks=config.ep_size,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.step_tokens,
        max_model_len=info.max_model_len,
        block_size=config.block_size,
        num_blocks=tuple(info.cache_blocks.values()),
        max_queued_requests=config.max_queued_requests,
        eos_token_ids=info.eos_token_ids,
        vocab_size=info.vocab_size,
        enable_prefix_caching=config.enable_prefix_caching,
        prefix_secret=secrets.randbits(128),
        chunked_prefill_size=config.chunked_prefill_size,
        max_queued_requests_per_tenant=config.max_queued_requests_per_tenant,
        tenant_quotas=config.tenant_quotas or {},
        default_tenant_quota=config.default_tenant_quota,
        original_max_position_embeddings=args.model.original_max_position_embeddings,
    )
