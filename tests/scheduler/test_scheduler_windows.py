"""Sliding-window caches: blocks outside are freed, and prefixes are found by their last blocks."""

import pytest
from helpers.sim_ranks import WINDOWED, SimCluster, check, make_config, make_request, serve

from expertwire.scheduler.config import CacheSpec
from expertwire.scheduler.scheduler import Scheduler

WINDOW = 6
ONLY_WINDOW = WINDOWED[1:]
SIZES = {"num_ranks": 1, "max_model_len": 128, "max_num_batched_tokens": 8, "num_blocks": 65}


def blocks_of(cluster, name):
    (used,) = cluster.scheduler.stats()["blocks_used"][name]
    return used


@pytest.mark.parametrize("overlap", [False, True])
def test_a_long_request_holds_few_blocks_of_a_window(overlap):
    cluster = SimCluster(make_config(**SIZES), specs=WINDOWED, overlap=overlap)
    cluster.submit(make_request(0, 60, max_tokens=60, ignore_eos=True))
    prefill, decode = [], []
    while not cluster.scheduler.idle:
        cluster.step()
        (prefill if not cluster.tokens[0] else decode).append(blocks_of(cluster, "window"))
    assert max(prefill) == 4  # of 5 tokens before and 8 of a chunk, which begin at a block's start
    assert max(decode[2:]) == 3  # 6 tokens touch 3 blocks
    assert len(cluster.tokens[0]) == 60


def test_blocks_outside_the_window_are_freed():
    cluster = SimCluster(make_config(**SIZES), specs=WINDOWED)
    cluster.submit(make_request(0, 8, max_tokens=16, ignore_eos=True))
    cluster.step()
    for position in range(8, 23):  # of the token that is computed, which sees itself and 5 before it
        cluster.step()
        assert blocks_of(cluster, "window") == position // 4 - (position - 5) // 4 + 1
        assert blocks_of(cluster, "first") == position // 4 + 1


def test_a_request_longer_than_the_pool_fits_if_all_caches_are_windows():
    cluster = SimCluster(make_config(**{**SIZES, "num_blocks": 7}), specs=ONLY_WINDOW)
    assert serve(cluster, 0, 60, max_tokens=60) == 0
    full = SimCluster(make_config(**{**SIZES, "num_blocks": 7}), specs=WINDOWED)
    assert full.scheduler.submit(make_request(0, 60), 0.0).code == "INVALID_ARGUMENT"


@pytest.mark.parametrize("specs", [WINDOWED, ONLY_WINDOW], ids=["with a full cache", "alone"])
@pytest.mark.parametrize("length", [5, 8, 9, 20, 41])
def test_a_prefix_is_found_by_the_blocks_that_the_next_token_sees(length, specs):
    cluster = SimCluster(make_config(**SIZES), specs=specs)
    assert [serve(cluster, key, length) for key in (0, 1)] == [0, (length - 1) // 4 * 4]
    cluster.submit(make_request(2, length, shared=length, max_tokens=1))
    cluster.step()
    seen = length - 1 - max((length - 1) // 4 * 4 - 5, 0) // 4 * 4
    assert blocks_of(cluster, "window") == seen // 4 + 1


def test_a_shorter_prefix_of_which_the_window_is_gone_is_not_found():
    # 6 blocks: of 60 tokens the last ones are left; then the first 20 are no prefix to begin with.
    cluster = SimCluster(make_config(**{**SIZES, "num_blocks": 7}), specs=ONLY_WINDOW)
    serve(cluster, 0, 60)
    assert serve(cluster, 1, 60) == 56
    assert serve(cluster, 2, 20) == 0
    both = SimCluster(make_config(**SIZES), specs=WINDOWED)
    serve(both, 0, 60)
    assert serve(both, 1, 20) == 16, "there are blocks enough to keep what has slid out"


def test_many_requests_in_a_pool_of_windows():
    config = make_config(**{**SIZES, "num_blocks": 12, "max_num_seqs": 4})
    cluster = SimCluster(config, specs=ONLY_WINDOW, overlap=True)
    requests = [make_request(key, 1 + 13 * key % 50, shared=24, max_tokens=1 + 7 * key % 40) for key in range(20)]
    cluster.submit(*requests)
    cluster.drain()
    for request in requests:
        check(cluster, request)


def test_blocks_are_budgeted_for_the_rest_after_a_long_prefix():
    # Of 6 blocks, 2 or 3 are a running request's; a long prefix needs 2 more than the 2 that it has in common with others.
    config = make_config(**{**SIZES, "num_blocks": 7})
    cluster = SimCluster(config, specs=ONLY_WINDOW)
    serve(cluster, 0, 60)
    cluster.submit(make_request(1, 8, max_tokens=30, ignore_eos=True))
    for _ in range(4):
        cluster.step()
    cluster.submit(make_request(2, 60, shared=60, max_tokens=9, ignore_eos=True))
    cluster.submit(make_request(3, 60, shared=60, max_tokens=9, ignore_eos=True))
    cluster.drain()
    assert cluster.finish.keys() == {0, 1, 2, 3}


@pytest.mark.parametrize("window", [None, 0, -1])
def test_a_window_needs_a_size(window):
    spec = CacheSpec(name="odd", kind="window", bytes_per_token=4, writers=(0,), readers=(0,), window=window)
    with pytest.raises(ValueError, match="'odd' is of kind 'window'; window must be an integer >= 1"):
        Scheduler(make_config(), (spec,))


# A window of 6 tokens and chunks of 8: one request holds up to 5 blocks, and 3 while it decodes.
SMALL_WINDOW = {**SIZES, "num_blocks": (129, 7), "max_num_seqs": 6}


def serve_many(config, specs, overlap, count=24):
    """Serve requests and check their outputs; return the numbers running by step, and the cluster."""
    cluster = SimCluster(config, specs=specs, overlap=overlap)
    requests = [make_request(key, 1 + 13 * key % 50, shared=24, max_tokens=1 + 7 * key % 40) for key in range(count)]
    cluster.submit(*requests)
    cluster.drain()
    for request in requests:
        check(cluster, request)
    assert not any(sum(used) for used in cluster.scheduler.stats()["blocks_used"].values())
    return cluster


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("num_blocks", [(129, 6), (129, 7), (129, 12), (33, 6), (33, 129)], ids=str)
def test_a_small_cache_beside_a_large_one(num_blocks, overlap):
    config = make_config(**{**SMALL_WINDOW, "num_blocks": num_blocks})
    cluster = serve_many(config, WINDOWED, overlap)
    assert cluster.scheduler.stats()["blocks"] == {"first": num_blocks[0] - 1, "window": num_blocks[1] - 1}


def test_scarce_cache_decides_about_preemption():
    """Three decodes of 3 blocks do not fit into 6; the full cache always has room."""
    cluster = SimCluster(make_config(**SMALL_WINDOW), specs=WINDOWED)
    for key in range(3):
        cluster.submit(make_request(key, 1, max_tokens=20, ignore_eos=True))
    most = 0
    while not cluster.scheduler.idle:
        cluster.step()
        most = max(most, blocks_of(cluster, "window"))
        assert blocks_of(cluster, "first") <= 3 * 6
    assert most == 6
    assert cluster.scheduler.stats()["preemptions"] > 0
    roomy = SimCluster(make_config(**{**SMALL_WINDOW, "num_blocks": (129, 16)}), specs=WINDOWED)
    for key in range(3):
        roomy.submit(make_request(key, 1, max_tokens=20, ignore_eos=True))
    roomy.drain()
    assert roomy.scheduler.stats()["preemptions"] == 0


def test_full_small_cache_stops_admission():
    cluster = SimCluster(make_config(**{**SMALL_WINDOW, "num_blocks": (129, 6)}), specs=WINDOWED)
    cluster.submit(
        make_request(0, 40, max_tokens=30, ignore_eos=True), make_request(1, 40, max_tokens=30, ignore_eos=True)
    )
    cluster.step()
    assert (cluster.scheduler.num_running, cluster.scheduler.num_waiting) == (1, 1)
    cluster.drain()
    assert cluster.scheduler.stats()["preemptions"] == 0


def test_a_prefix_lasts_as_long_as_its_end_does_in_the_small_cache():
    cluster = SimCluster(make_config(**SMALL_WINDOW), specs=WINDOWED)
    serve(cluster, 0, 40)
    assert serve(cluster, 1, 40) == 36
    for key in (2, 3):
        serve(cluster, key, 40, shared=0)  # others take the window's blocks; the full cache still has all
    assert serve(cluster, 4, 40) == 0


def test_each_cache_is_as_large_as_the_sizes_say():
    with pytest.raises(ValueError, match=r"one for each of the caches \['first', 'window'\], got \(9, 9, 9\)"):
        Scheduler(make_config(num_blocks=(9, 9, 9)), WINDOWED)
    for wrong in ((9, 1), (9, True), ()):
        with pytest.raises(ValueError, match="num_blocks must be an integer >= 2, or a tuple of one for each cache"):
            make_config(num_blocks=wrong)
