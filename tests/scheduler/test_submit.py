import numpy as np
import pytest
from helpers.sim_ranks import CACHES, SimCluster, make_config, make_request

from expertwire.scheduler.config import CacheSpec
from expertwire.scheduler.request import Request
from expertwire.scheduler.sampling_params import SamplingParams
from expertwire.scheduler.scheduler import Scheduler


def submit(prompt, config=None, **params):
    request = Request(key=7, prompt=np.array(prompt, np.int32), params=SamplingParams(**params), seed=0)
    return Scheduler(config or make_config(), CACHES).submit(request, now=0.0)


@pytest.mark.parametrize(
    ("prompt", "params", "config", "words"),
    [
        ([], {}, {}, ["prompt", "at least 1", "0"]),
        ([2] * 32, {}, {}, ["prompt", "32 tokens", "at most 31", "max_model_len = 32"]),
        (
            [2] * 5,
            {"max_tokens": 5},
            {"num_blocks": 3},
            ["prompt", "5 tokens", "max_tokens", "3 cache blocks", "9 tokens"],
        ),
    ],
)
def test_impossible_request_is_rejected_with_the_limits(prompt, params, config, words):
    rejection = submit(prompt, make_config(**config), **params)
    assert (rejection.key, rejection.code) == (7, "INVALID_ARGUMENT")
    for word in words:
        assert word in rejection.message, rejection.message


@pytest.mark.parametrize("token", [-1, 50])
def test_token_outside_the_vocabulary_is_an_assertion(token):
    with pytest.raises(AssertionError, match="request 7"):
        submit([2, token])


@pytest.mark.parametrize(
    ("prompt", "params", "config"),
    [
        ([2] * 31, {}, {}),
        ([0, 49], {"stop_token_ids": [0, 49], "logit_bias": {49: 1.0}, "logprobs": 50}, {}),
        ([2] * 5, {"max_tokens": 4}, {"num_blocks": 3}),  # 8 tokens to compute: the last one never is
        ([2], {"max_tokens": 10**12, "min_tokens": 10**12, "top_k": 10**12, "temperature": 1e300}, {}),
    ],
)
def test_limits_are_inclusive(prompt, params, config):
    assert submit(prompt, make_config(**config), **params) is None


def test_a_full_queue_says_try_later_and_accepts_again():
    cluster = SimCluster(make_config(num_ranks=1, max_num_seqs=1, max_queued_requests=2))
    cluster.submit(make_request(0), make_request(1))
    rejection = cluster.scheduler.submit(make_request(2), 0.0)
    assert (rejection.key, rejection.code) == (2, "RESOURCE_EXHAUSTED")
    assert "max_queued_requests = 2" in rejection.message
    cluster.step()
    cluster.submit(make_request(2))
    cluster.drain()
    assert set(cluster.finish) == {0, 1, 2}


@pytest.mark.parametrize(
    "field", ["num_ranks", "max_num_seqs", "max_num_batched_tokens", "max_model_len", "block_size", "num_blocks"]
)
@pytest.mark.parametrize("value", [0, -3, 1.5, True])
def test_config_names_the_wrong_field(field, value):
    with pytest.raises(ValueError, match=f"{field} must be an integer >= "):
        make_config(**{field: value})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "odd"}, "these kinds: full, window, latent, index, chunk, state"),
        ({"kind": "latent", "window": 8}, "window must be None, got 8"),
        ({"kind": "full", "snapshot_every": 8}, "snapshot_every must be None, got 8"),
        ({"kind": "chunk"}, "chunk_size must be an integer >= 1, got None"),
        ({"kind": "full", "chunk_size": 4}, "chunk_size must be None, got 4"),
        ({"kind": "state"}, "of the chunk size, together 4, got None"),
        ({"kind": "state", "snapshot_every": 6}, "of the chunk size, together 4, got 6"),
        ({"kind": "state", "snapshot_every": 8, "chunk_size": 0}, "chunk_size must be an integer >= 1 or None, got 0"),
    ],
)
def test_a_cache_whose_fields_do_not_fit_is_refused(fields, message):
    spec = CacheSpec(name="odd", bytes_per_token=4, writers=(0,), readers=(0,), **fields)
    with pytest.raises(ValueError, match=f"cache 'odd' is of kind '{fields['kind']}'; .*{message}"):
        Scheduler(make_config(), (*CACHES, spec))


@pytest.mark.parametrize("specs", [(), (CACHES[0], CACHES[0])])
def test_caches_need_distinct_names(specs):
    with pytest.raises(ValueError, match="cache_specs"):
        Scheduler(make_config(), specs)
