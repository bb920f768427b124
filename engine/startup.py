"""How an engine starts, from the controller's side: what it is told, what it tells the ranks, and the size of the caches."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

import numpy as np

from expertwire.comm.control import ControlHub
from expertwire.engine.cache_sizes import cache_sizes
from expertwire.engine.config import EngineConfig, ModelInfo
from expertwire.engine.model_config import ModelConfig
from expertwire.scheduler.config import SchedulerConfig

# The share of free memory that caches may take, when no size is given.
_CACHE_SHARE = 0.5


@dataclass(frozen=True, kw_only=True)
class Orders:
    """What a controller is told when it starts."""

    config: EngineConfig
    model: ModelConfig
    max_model_len: int
    hub_address: str
    fronts_address: str
    token: str


@dataclass(frozen=True, kw_only=True)
class Places:
    """Of each rank, its NVLink domain and what fails with it, as numbers; empty where no expert has replicas."""

    domains: tuple[int, ...]
    failure_domains: tuple[int, ...]


def start_ranks(orders: Orders, hub: ControlHub) -> tuple[ModelInfo, Places]:
    """Let the ranks join, load and allocate, as `engine.worker` describes; what is served, and where the ranks are.

    Raises:
        RankLost, RankTimeout, RankError: a rank is at fault.
        CacheTooSmall: the caches do not hold one request.
    """
    config = orders.config
    hub.wait_joined(config.start_timeout_s, lambda: None)
    hub.publish({})
    present = hub.collect(config.start_timeout_s)
    nodes = [bytes(answer["node"]) for answer in present]
    sharers_P = np.array([nodes.count(node) for node in nodes])
    hub.publish({"store": present[0]["store"], "sharers": sharers_P})
    loaded = hub.collect(config.start_timeout_s)
    free_P = np.array([answer["free"][0] for answer in loaded])
    free = int((free_P // sharers_P).min() * _CACHE_SHARE)
    model = orders.model
    specs = model.cache_specs()
    sizes = cache_sizes(config, specs, orders.max_model_len, free)
    hub.publish({"num_blocks": np.array(sizes.num_blocks), "max_model_len": np.array([sizes.max_model_len])})
    hub.collect(config.start_timeout_s)
    names = [spec.name for spec in specs]
    domains, failure_domains = np.stack([answer["place"] for answer in loaded], axis=1).tolist() or ((), ())
    info = ModelInfo(
        name=config.model.rstrip("/").rsplit("/", 1)[-1],
        path=config.model,
        architecture=model.architecture,
        dtype=model.dtype,
        vocab_size=model.vocab_size,
        max_model_len=sizes.max_model_len,
        eos_token_ids=model.eos_token_ids,
        num_layers=model.num_layers,
        num_experts=model.num_experts,
        top_k=model.top_k,
        ep_size=config.ep_size,
        device=bytes(loaded[0]["device"]).decode(),
        all_to_all=bytes(loaded[0]["all_to_all"]).decode(),
        block_size=config.block_size,
        cache_tokens=sizes.num_tokens,
        cache_blocks=dict(zip(names, sizes.num_blocks, strict=True)),
        cache_bytes=dict(zip(names, sizes.num_bytes, strict=True)),
        max_running=config.max_running,
        seed=config.seed,
    )
    return info, Places(domains=tuple(domains), failure_domains=tuple(failure_domains))


def scheduler_config(orders: Orders, info: ModelInfo) -> SchedulerConfig:
    """What the scheduler is told of all this."""
    config = orders.config
    return SchedulerConfig(
        num_ranks=config.ep_size,
        max_running=config.max_running,
        max_num_tokens=config.max_num_tokens,
        max_model_len=info.max_model_len,
        block_size=config.block_size,
        num_blocks=tuple(info.cache_blocks.values()),
        max_waiting=config.max_waiting,
        eos_token_ids=info.eos_token_ids,
        vocab_size=info.vocab_size,
        prefix_cache=config.prefix_cache,
        prefix_secret=secrets.randbits(128),
        chunk_tokens=config.chunk_tokens,
        max_waiting_per_tenant=config.max_waiting_per_tenant,
    )
