"""How many blocks each of a model's caches gets on a rank, of one budget of bytes.

G caches.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from expertwire.engine.config.engine_config import EngineConfig
from expertwire.scheduler.config import CacheSpec

_KINDS = {"full", "window", "latent", "index"}
_ALL = 2**60  # blocks: there is a use for all that one can have


class CacheTooSmall(ValueError):
    """The KV cache does not hold one request of the asked length."""


@dataclass(frozen=True, kw_only=True)
class CacheSizes:
    """Of one rank.

    Attributes:
        num_blocks: of each cache, with the null block.
        num_bytes: of each cache.
        num_tokens: that fit, of all requests together; a cache of a window may hold fewer.
        max_model_len: of one request.
    """

    num_blocks: tuple[int, ...]
    num_bytes: tuple[int, ...]
    num_tokens: int
    max_model_len: int


def cache_sizes(
    config: EngineConfig, specs: Sequence[CacheSpec], max_model_len: int, free_bytes: int = 0
) -> CacheSizes:
    """As many tokens as fit. Beside caches that keep everything, one of a window gets no more blocks than it has use for.

    The budget is `kv_cache_memory_bytes`, or what `max_num_seqs` requests of `max_model_len` need, but at most `free_bytes`.

    Raises:
        CacheTooSmall: not even one request of the asked length fits.
    """
    kinds = [spec.kind for spec in specs]
    assert set(kinds) <= _KINDS, f"caches of kinds {kinds}; ranks keep {sorted(_KINDS)}"
    size = config.block_size
    bytes_G = [size * spec.bytes_per_token for spec in specs]
    needed_G = [spec.most_blocks(size, max_model_len, config.step_tokens) for spec in specs]
    useful_G = [_useful(spec, config, max_model_len) for spec in specs]
    if min(useful_G) < _ALL <= max(useful_G):
        least_G = [
            min(useful, needed) if useful < _ALL else _ALL for useful, needed in zip(useful_G, needed_G, strict=True)
        ]
    else:
        useful_G = least_G = [_ALL] * len(specs)
    budget = config.kv_cache_memory_bytes
    if budget is None:
        budget = min(_total(config.max_num_seqs * -(-max_model_len // size), bytes_G, useful_G), free_bytes)
    for most_G in (useful_G, least_G):
        num_G = _fill(budget, bytes_G, most_G)
        if fits := all(num >= needed for num, needed in zip(num_G, needed_G, strict=True)):
            break
    num_tokens = max(num_G) * size
    if not fits and (config.max_model_len is not None or max(num_G) < 2):
        needed = sum(num * nbytes for num, nbytes in zip(needed_G, bytes_G, strict=True))
        raise CacheTooSmall(
            f"the KV cache of one rank ({budget} bytes) holds {num_tokens} tokens; max_model_len = {max_model_len} needs "
            f"{needed} bytes; raise kv_cache_memory_bytes or lower max_model_len"
        )
    return CacheSizes(
        num_blocks=tuple(num + 1 for num in num_G),
        num_bytes=tuple((num + 1) * nbytes for num, nbytes in zip(num_G, bytes_G, strict=True)),
        num_tokens=num_tokens,
        max_model_len=max_model_len if fits else num_tokens,
    )


def _useful(spec: CacheSpec, config: EngineConfig, max_model_len: int) -> int:
    """Blocks of a cache that are of use: `_ALL`, or, of a window, twice what the requests that run hold at once: room to admit
    others, and what slid out stays for prefixes a while."""
    if spec.window is None:
        return _ALL
    each = spec.most_blocks(config.block_size, max_model_len, max_num_batched_tokens=1)
    return 2 * (config.max_num_seqs * each + -(-config.step_tokens // config.block_size))


def _fill(budget: int, bytes_G: Sequence[int], most_G: Sequence[int]) -> list[int]:
    """Blocks of each cache: as many as of any other, but `most_G` at most."""
    end = budget // sum(nbytes for nbytes, most in zip(bytes_G, most_G, strict=True) if most == _ALL) + 1
    num = bisect_right(range(end), budget, key=lambda num: _total(num, bytes_G, most_G)) - 1
    return [min(num, most) for most in most_G]


def _total(num: int, bytes_G: Sequence[int], most_G: Sequence[int]) -> int:
    """Bytes of `num` blocks of each cache, but `most_G` at most."""
    return sum(nbytes * min(num, most) for nbytes, most in zip(bytes_G, most_G, strict=True))
