"""Numbers of blocks that the caches get of one budget."""

import pytest

from expertwire.engine.config.engine_config import EngineConfig
from expertwire.engine.kv_cache.cache_sizes import CacheTooSmall, cache_sizes
from expertwire.scheduler.config import CacheSpec

BLOCK = 16


def spec(kind, bytes_per_token, window=None):
    name = f"{kind} {window}" if window else kind
    return CacheSpec(name=name, kind=kind, bytes_per_token=bytes_per_token, writers=(0,), readers=(0,), window=window)


FULL, WINDOW = spec("full", 100), spec("window", 60, 128)


def config(**changes):
    values = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "block_size": BLOCK}
    return EngineConfig(model="m", **{**values, **changes})


def total(sizes, specs):
    """Bytes without the null blocks."""
    return sum((num - 1) * BLOCK * spec.bytes_per_token for num, spec in zip(sizes.num_blocks, specs, strict=True))


@pytest.mark.parametrize("budget", [300_000, 1_234_567, 20_000_000])
@pytest.mark.parametrize(
    "specs",
    [
        (FULL,),
        (FULL, WINDOW),
        (spec("latent", 70), spec("index", 9), WINDOW, spec("window", 10, 500)),
        (WINDOW, spec("window", 30, 64)),
    ],
)
def test_as_many_tokens_as_fit(specs, budget):
    sizes = cache_sizes(config(kv_cache_memory_bytes=budget, max_model_len=1024), specs, 1024)
    keep_all = [num for num, spec in zip(sizes.num_blocks, specs, strict=True) if spec.window is None]
    assert set(keep_all or sizes.num_blocks) == {sizes.num_tokens // BLOCK + 1}
    assert max(sizes.num_blocks) == sizes.num_tokens // BLOCK + 1
    one_more = BLOCK * sum(spec.bytes_per_token for spec in specs)
    assert budget - one_more < total(sizes, specs) <= budget
    assert sizes.num_bytes == tuple(
        num * BLOCK * spec.bytes_per_token for num, spec in zip(sizes.num_blocks, specs, strict=True)
    )
    assert sizes.max_model_len == 1024


def test_a_window_gets_what_running_requests_can_use():
    sizes = cache_sizes(config(kv_cache_memory_bytes=20_000_000), (FULL, WINDOW), 8192)
    full, window = sizes.num_blocks
    # 128 tokens begin anywhere in a block, and so does the next one: 10 blocks of each request, and the 4 of a step.
    assert window == 2 * (4 * 10 + 4) + 1
    assert full == (20_000_000 - 88 * 60 * BLOCK) // (100 * BLOCK) + 1
    many = cache_sizes(config(kv_cache_memory_bytes=20_000_000, max_num_seqs=10_000), (FULL, WINDOW), 8192)
    assert len(set(many.num_blocks)) == 1, "never more than the full one"


def test_without_a_size_it_is_what_requests_need_or_what_is_free():
    full = cache_sizes(config(), (FULL, WINDOW), 1024, free_bytes=10**9)
    assert full.num_blocks == (4 * 1024 // BLOCK + 1, 89)
    less = cache_sizes(config(), (FULL, WINDOW), 1024, free_bytes=300_000)
    assert total(less, (FULL, WINDOW)) <= 300_000 < total(less, (FULL, WINDOW)) + BLOCK * 160


def test_a_window_gives_way_to_one_long_request():
    one = 64 * 100 * BLOCK + WINDOW.most_blocks(BLOCK, 1024, 64) * 60 * BLOCK
    sizes = cache_sizes(config(kv_cache_memory_bytes=one, max_model_len=1024), (FULL, WINDOW), 1024)
    assert sizes.num_blocks == (65, WINDOW.most_blocks(BLOCK, 1024, 64) + 1)
    with pytest.raises(
        CacheTooSmall, match=rf"\({one - 1} bytes\) holds 1008 tokens; max_model_len = 1024 needs {one} bytes"
    ):
        cache_sizes(config(kv_cache_memory_bytes=one - 1, max_model_len=1024), (FULL, WINDOW), 1024)


def test_requests_are_no_longer_than_what_fits_unless_that_was_asked_for():
    assert cache_sizes(config(kv_cache_memory_bytes=100_000), (FULL,), 8192).max_model_len == 62 * BLOCK
    windows = cache_sizes(config(kv_cache_memory_bytes=100_000), (WINDOW,), 8192)
    assert windows.max_model_len == 8192, "a window holds a request of any length"
    with pytest.raises(CacheTooSmall, match="holds 16 tokens; max_model_len = 8192 needs"):
        cache_sizes(config(kv_cache_memory_bytes=2000), (FULL,), 8192)


@pytest.mark.parametrize("max_num_seqs", [1, 4, 64])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.45])
@pytest.mark.parametrize("max_model_len", [1024, 65_536])
def test_what_a_hybrid_needs_is_enough_for_all_its_requests(max_num_seqs, share, max_model_len):
    names = {"writers": (0,), "readers": (0,)}
    specs = (
        spec("full", 100),
        CacheSpec(name="chunk", kind="chunk", bytes_per_token=50, chunk_size=64, **names),
        CacheSpec(name="state", kind="state", bytes_per_token=90_000, snapshot_every=512, **names),
    )
    given = config(
        max_num_seqs=max_num_seqs, snapshot_share=share, max_model_len=max_model_len, max_num_batched_tokens=2048
    )
    full, chunk, state = cache_sizes(given, specs, max_model_len, free_bytes=10**12).num_blocks
    assert full >= max_num_seqs * max_model_len // BLOCK + 1
    assert chunk == max_num_seqs + 1
    assert state > max_num_seqs
