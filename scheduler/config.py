"""Configuration of the scheduler: sizes of the ranks' caches and steps, and the caches that a model declares."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeGuard, get_args

if TYPE_CHECKING:
    from expertwire.scheduler.quotas import TenantQuota

_NEVER = 2**31 - 1  # more tokens than any request has
CacheKind = Literal["full", "window", "latent", "index", "chunk", "state"]


def is_int(value: object) -> TypeGuard[int]:
    """Return whether `value` is an integer; a bool is not."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[int | float]:
    """Return whether `value` is a number that a finite float can hold; a bool is not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


@dataclass(frozen=True, kw_only=True)
class CacheSpec:
    """A cache that a model declares by name. The scheduler accounts for its blocks and never sees a tensor.

    Args:
        name: unique within the model.
        kind: `full` paged KV; `window` paged KV of the last `window` tokens; `latent` one compressed
            row a token; `index` sparse-attention keys; `state` one recurrent state a sequence; `chunk` the inputs of a
            recurrent mixer since its state last moved on.
        bytes_per_token: on one rank, all writing layers together (for `state`: bytes of a state).
        writers: layers that write it.
        readers: layers that read it (a layer may read another layer's cache).
        window: tokens kept, for kind `window`.
        snapshot_every: tokens between kept copies of the state, for kind `state`: each block holds one
            state. A multiple of the block size.
        chunk_size: tokens after which the state moves on, for kinds `chunk` and `state`: a token reads those of its own chunk.
            Of kind `chunk` a request has one block of so many tokens, which each chunk overwrites.
    """

    name: str
    kind: CacheKind
    bytes_per_token: int
    writers: tuple[int, ...]
    readers: tuple[int, ...]
    window: int | None = None
    snapshot_every: int | None = None
    chunk_size: int | None = None

    @property
    def num_seen(self) -> int | None:
        """Number of cached tokens that a token reads beside those in its own block, plus one; None: all."""
        if self.kind == "state":
            return 2  # a token reads the state after the one before
        return 1 if self.kind == "chunk" else self.window

    def tokens_per_block(self, block_size: int) -> int:
        """Return the tokens of an entry of a block table: `block_size`, for a state those after which a snapshot can be kept, for
        chunks more than there are."""
        if self.kind == "chunk":
            return _NEVER // block_size * block_size
        return math.lcm(block_size, self.chunk_size or 1) if self.kind == "state" else block_size

    def entries_per_snapshot(self, block_size: int) -> int:
        """Return after how many entries of a block table a state's snapshot is kept; 1 of other kinds."""
        return (self.snapshot_every or 1) // self.tokens_per_block(block_size) or 1

    def bytes_per_block(self, block_size: int) -> int:
        """Return the bytes of a block."""
        return self.bytes_per_token * (1 if self.kind == "state" else self.chunk_size or block_size)

    def most_blocks(self, block_size: int, max_model_len: int, max_num_batched_tokens: int) -> int:
        """Return the most blocks that one request holds, at its longest or in a window and one step."""
        size, seen = self.tokens_per_block(block_size), self.num_seen
        longest = -(-max_model_len // size)
        if seen is None:
            return longest
        if self.kind == "state":
            size *= self.entries_per_snapshot(block_size)
        return min(longest, -(-(seen + max_num_batched_tokens) // size) + 1 + self.num_extra)

    @property
    def num_extra(self) -> int:
        """Number of blocks that the tokens of a step may take beside those after every `snapshot_every`, for a state: where
        the request begins, where it leaves a cached prefix, and where its prompt ends."""
        return 3 if self.kind == "state" else 0


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Sizes of the ranks' slot tables, caches and steps.

    Args:
        num_ranks: data-parallel ranks, each with its own slots and blocks.
        max_num_seqs: slots on one rank.
        max_num_batched_tokens: token budget of one step on one rank. Also bounds the number of running
            requests, because each of them gets at least one token a step.
        max_model_len: prompt and output tokens of one request at most.
        block_size: tokens in a block, the same in every cache except those of states.
        num_blocks: blocks of each cache on one rank, including block 0, the null block, which is never
            allocated: one number for all caches, or one for each, in the order of the `CacheSpec`s.
        max_queued_requests: requests that may wait.
        eos_token_ids: end-of-sequence ids; any of them ends an output.
        vocab_size: token ids are in [0, vocab_size).
        enable_prefix_caching: keep blocks of finished requests for later requests with the same prefix.
        prefix_secret: secret of the block hashes; whoever knows it could construct colliding prompts.
        chunked_prefill_size: prefill tokens of one step on a rank that also decodes, which bounds the
            latency of decodes; None: `max_num_batched_tokens`.
        max_queued_requests_per_tenant: requests of one tenant that may wait; None:
            `max_queued_requests`.
        tenant_quotas: shares and limits of tenants, by name.
        default_tenant_quota: those of each other tenant; None: weight 1 and no limits.
        original_max_position_embeddings: tokens of the model's original context, if ranks compute
            *long* requests, which need more, differently (LongRoPE): a long and a short request share no
            blocks. None: no request is long.

    Raises:
        ValueError: names the field and the values it allows.
    """

    num_ranks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    block_size: int
    num_blocks: int | tuple[int, ...]
    max_queued_requests: int
    eos_token_ids: tuple[int, ...]
    vocab_size: int
    enable_prefix_caching: bool = True
    prefix_secret: int = 0
    chunked_prefill_size: int | None = None
    max_queued_requests_per_tenant: int | None = None
    tenant_quotas: Mapping[str, TenantQuota] = field(default_factory=dict)
    default_tenant_quota: TenantQuota | None = None
    original_max_position_embeddings: int | None = None

    def __post_init__(self) -> None:
        for name, low in (
            ("num_ranks", 1),
            ("max_num_seqs", 1),
            ("max_num_batched_tokens", 1),
            ("max_model_len", 2),
            ("block_size", 1),
            ("max_queued_requests", 1),
            ("vocab_size", 1),
        ):
            value = getattr(self, name)
            if not is_int(value) or value < low:
                raise ValueError(f"{name} must be an integer >= {low}, got {value!r}")
        for name in ("chunked_prefill_size", "max_queued_requests_per_tenant", "original_max_position_embeddings"):
            value = getattr(self, name)
            if value is not None and (not is_int(value) or value < 1):
                raise ValueError(f"{name} must be an integer >= 1 or None, got {value!r}")
        each = self.num_blocks if isinstance(self.num_blocks, tuple) else (self.num_blocks,)
        if not each or not all(is_int(value) and value >= 2 for value in each):
            raise ValueError(
                f"num_blocks must be an integer >= 2, or a tuple of one for each cache, got {self.num_blocks!r}"
            )

    def blocks_for(self, num_tokens: int) -> int:
        """Return the number of blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def num_usable_blocks(self, num_caches: int) -> list[int]:
        """Return the number of blocks of each cache on one rank, without the null block."""
        num = self.num_blocks
        return [each - 1 for each in (num if isinstance(num, tuple) else (num,) * num_caches)]


def check_cache_specs(cache_specs: tuple[CacheSpec, ...], config: SchedulerConfig) -> None:
    """Raise ValueError for no caches, duplicate names, or a field that does not fit the cache's kind."""
    names, num_blocks = [spec.name for spec in cache_specs], config.num_blocks
    if not names or len(set(names)) < len(names):
        raise ValueError(f"cache_specs must have at least one cache, each with its own name, got {names}")
    if isinstance(num_blocks, tuple) and len(num_blocks) != len(names):
        raise ValueError(f"num_blocks must be one number, or one for each of the caches {names}, got {num_blocks}")
    chunk = math.lcm(*(spec.chunk_size or 1 for spec in cache_specs))
    for spec in cache_specs:
        prefix = f"cache {spec.name!r} is of kind {spec.kind!r}"
        if spec.kind not in get_args(CacheKind):
            raise ValueError(f"{prefix}; the scheduler supports these kinds: {', '.join(get_args(CacheKind))}")
        if spec.kind == "window" and (spec.window is None or spec.window < 1):
            raise ValueError(f"{prefix}; window must be an integer >= 1, got {spec.window!r}")
        if spec.kind != "window" and spec.window is not None:
            raise ValueError(f"{prefix}; window must be None, got {spec.window!r}")
        every = spec.snapshot_every
        if spec.kind == "state" and (every is None or every < 1 or every % math.lcm(chunk, config.block_size)):
            raise ValueError(
                f"{prefix}; snapshot_every must be a multiple of block_size {config.block_size} and of the chunk size, "
                f"together {math.lcm(chunk, config.block_size)}, got {every!r}"
            )
        if spec.kind != "state" and every is not None:
            raise ValueError(f"{prefix}; snapshot_every must be None, got {every!r}")
        if spec.kind == "state" and spec.tokens_per_block(config.block_size) % chunk:
            raise ValueError(f"{prefix}; chunk_size must be that of the chunk cache, {chunk}, got {spec.chunk_size!r}")
        sized = {"chunk": (True,), "state": (True, False)}.get(spec.kind, (False,))
        if (spec.chunk_size is not None) not in sized or (spec.chunk_size is not None and spec.chunk_size < 1):
            allowed = "an integer >= 1" if spec.kind == "chunk" else "None"
            allowed = "an integer >= 1 or None" if spec.kind == "state" else allowed
            raise ValueError(f"{prefix}; chunk_size must be {allowed}, got {spec.chunk_size!r}")
