"""Number of blocks of each KV cache group on a rank, within one budget of bytes.

C KV cache groups.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from expertwire.engine.config.engine_config import EngineConfig
from expertwire.scheduler.config import CacheSpec

_ALL = 2**60  # blocks: more than any rank can have


class CacheTooSmall(ValueError):
    """The KV cache does not hold one request of the asked length."""


@dataclass(frozen=True, kw_only=True)
class CacheSizes:
    """Sizes of the KV cache groups of one rank.

    Attributes:
        num_blocks: blocks of each group, with the null block.
        num_bytes: bytes of each group.
        num_tokens: tokens that fit, of all requests together; a sliding-window group may hold fewer.
        max_model_len: most tokens of one request.
    """

    num_blocks: tuple[int, ...]
    num_bytes: tuple[int, ...]
    num_tokens: int
    max_model_len: int


def cache_sizes(
    config: EngineConfig, specs: Sequence[CacheSpec], max_model_len: int, free_bytes: int = 0
) -> CacheSizes:
    """Return the sizes that hold as many tokens as fit. Beside groups with full attention, a sliding-window group gets no more
    blocks than it can use.

    The budget is `kv_cache_memory_bytes`, or what `max_num_seqs` requests of `max_model_len` need, but at most `free_bytes`.
    Recurrent states and their chunks take what the running requests hold, and `snapshot_share` of the budget for snapshots; in
    all at most half of it, so that fewer requests than `max_num_seqs` may run.

    Raises:
        CacheTooSmall: not even one request of the asked length fits.
    """
    size = config.block_size
    bytes_C = [spec.bytes_per_block(size) for spec in specs]
    needed_C = [spec.most_blocks(size, max_model_len, config.step_tokens) for spec in specs]
    useful_C = [_useful(spec, config, max_model_len) for spec in specs]
    if min(useful_C) < _ALL <= max(useful_C):
        least_C = [
            min(useful, needed) if useful < _ALL else _ALL for useful, needed in zip(useful_C, needed_C, strict=True)
        ]
    else:
        useful_C = least_C = [_ALL] * len(specs)
    budget = config.kv_cache_memory_bytes
    if budget is None:
        budget = min(_wanted(config, specs, max_model_len, useful_C), free_bytes)
    states_C = _states(config, specs, bytes_C, needed_C, budget)
    for most_C in (useful_C, least_C):
        num_C = _fill(budget, bytes_C, most_C, states_C)
        if fits := all(num >= needed for num, needed in zip(num_C, needed_C, strict=True)):
            break
    num_tokens = max(num for num, states in zip(num_C, states_C, strict=True) if not states) * size
    if not fits and (config.max_model_len is not None or num_tokens < 2 * size):
        needed = sum(num * nbytes for num, nbytes in zip(needed_C, bytes_C, strict=True))
        raise CacheTooSmall(
            f"the KV cache of one rank ({budget} bytes) holds {num_tokens} tokens; max_model_len = {max_model_len} needs "
            f"{needed} bytes; raise kv_cache_memory_bytes or lower max_model_len"
        )
    return CacheSizes(
        num_blocks=tuple(num + 1 for num in num_C),
        num_bytes=tuple((num + 1) * nbytes for num, nbytes in zip(num_C, bytes_C, strict=True)),
        num_tokens=num_tokens,
        max_model_len=max_model_len if fits else num_tokens,
    )


def _useful(spec: CacheSpec, config: EngineConfig, max_model_len: int) -> int:
    """Return how many blocks a group can use: `_ALL`, or, with a sliding window, twice what the running requests hold at once:
    others can be admitted, and blocks that slid out stay in the prefix cache for a while."""
    if spec.window is None:
        return _ALL
    each = spec.most_blocks(config.block_size, max_model_len, max_num_batched_tokens=1)
    return 2 * (config.max_num_seqs * each + -(-config.step_tokens // config.block_size))


def _wanted(config: EngineConfig, specs: Sequence[CacheSpec], max_model_len: int, useful_C: Sequence[int]) -> int:
    """Return the bytes that `max_num_seqs` requests of the asked length need."""
    size, num_seqs = config.block_size, config.max_num_seqs
    blocks, paged, recurrent = num_seqs * -(-max_model_len // size), 0, 0
    for spec, useful in zip(specs, useful_C, strict=True):
        if spec.kind == "state":
            state = spec.bytes_per_block(size)
            held = num_seqs * (state + state // 8) + _states_of_step(config, spec) * state
            recurrent += max(held, spec.most_blocks(size, max_model_len, config.step_tokens) * state)
        elif spec.kind == "chunk":
            recurrent += num_seqs * spec.bytes_per_block(size)
        else:
            paged += min(blocks, useful) * spec.bytes_per_block(size)
    if not recurrent:
        return paged
    # Beside the snapshots' share; recurrent states and they take half at most.
    share = _snapshot_share(config)
    return math.ceil(max((paged + recurrent) / (1 - share), recurrent / max(0.5 - share, 0.05)))


def _snapshot_share(config: EngineConfig) -> float:
    return config.snapshot_share if config.enable_prefix_caching else 0.0


def _states_of_step(config: EngineConfig, spec: CacheSpec) -> int:
    """Return the most states that the tokens of a step begin."""
    return -(-config.step_tokens // config.snapshot_every) + 1 + spec.num_extra


def _states(
    config: EngineConfig, specs: Sequence[CacheSpec], bytes_C: Sequence[int], needed_C: Sequence[int], budget: int
) -> list[int]:
    """Return the blocks of each group of recurrent states and of their chunks, 0 of the others.

    A running request has one of each. Some enter an interval in the same step and have two states, one in eight is the guess.
    """
    bytes_of = {spec.kind: nbytes for spec, nbytes in zip(specs, bytes_C, strict=True)}
    if "state" not in bytes_of:
        return [0] * len(specs)
    state, chunk = bytes_of["state"], bytes_of.get("chunk", 0)
    snapshots = int(_snapshot_share(config) * budget) // state
    of_step = next(_states_of_step(config, spec) for spec in specs if spec.kind == "state")
    left = budget // 2 - (snapshots + of_step) * state
    running = max(1, min(config.max_num_seqs, left // (state + state // 8 + chunk)))
    num_of = {"state": running + running // 8 + of_step + snapshots, "chunk": running}
    return [
        max(needed, num_of[spec.kind]) if spec.kind in num_of else 0
        for spec, needed in zip(specs, needed_C, strict=True)
    ]


def _fill(budget: int, bytes_C: Sequence[int], most_C: Sequence[int], states_C: Sequence[int]) -> list[int]:
    """Return the blocks of each group: the states, and of the others as many as of any, but `most_C` at most."""
    budget -= sum(nbytes * states for nbytes, states in zip(bytes_C, states_C, strict=True))
    most_C = [0 if states else most for most, states in zip(most_C, states_C, strict=True)]
    end = max(budget, 0) // sum(nbytes for nbytes, most in zip(bytes_C, most_C, strict=True) if most == _ALL) + 1
    num = bisect_right(range(end), budget, key=lambda num: _total(num, bytes_C, most_C)) - 1
    return [states or max(min(num, most), 0) for most, states in zip(most_C, states_C, strict=True)]


def _total(num: int, bytes_C: Sequence[int], most_C: Sequence[int]) -> int:
    """Return the bytes of `num` blocks of each group, but `most_C` at most."""
    return sum(nbytes * min(num, most) for nbytes, most in zip(bytes_C, most_C, strict=True))
