"""Caches of a sliding window: what has slid out is free again, and prefixes are found by their ends."""

import pytest
from sim_ranks import WINDOWED, SimCluster, expected_output, make_config, make_request

from expertwire.scheduler.plan import CacheSpec
from expertwire.scheduler.scheduler import Scheduler

WINDOW = 6
ONLY_WINDOW = WINDOWED[1:]
SIZES = {"num_ranks": 1, "max_model_len": 128, "max_num_tokens": 8, "num_blocks": 65}


def serve(cluster, key, length, **values):
    request = make_request(key, length, **{"shared": 1000, "max_tokens": 1, "ignore_eos": True, **values})
    cluster.submit(request)
    cluster.drain()
    assert (cluster.tokens[key], cluster.finish[key]) == expected_output(request, cluster.config)
    return cluster.num_cached[key]


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


def test_exactly_what_no_token_sees_any_more_is_given_back():
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
    config = make_config(**{**SIZES, "num_blocks": 12, "max_running": 4})
    cluster = SimCluster(config, specs=ONLY_WINDOW, overlap=True)
    requests = [make_request(key, 1 + 13 * key % 50, shared=24, max_tokens=1 + 7 * key % 40) for key in range(20)]
    cluster.submit(*requests)
    cluster.drain()
    for request in requests:
        assert (cluster.tokens[request.key], cluster.finish[request.key]) == expected_output(request, config)


def test_room_is_kept_for_what_follows_a_long_prefix():
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
