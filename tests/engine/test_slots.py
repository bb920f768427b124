"""Several named caches on one rank of the CPU, from the scheduler's plans to what a model sees in them."""

import pytest
from helpers import cache_model
from helpers.cache_model import SIZES, SPECS, CacheModel

from expertwire.engine.runner.model_runner import ModelRunner
from expertwire.kernels import registry

NEEDED = tuple(1 + spec.most_blocks(SIZES["block_size"], SIZES["max_model_len"], 16) for spec in SPECS)


def make_runner(num_blocks, max_num_seqs=4):
    model = CacheModel(registry.plain())
    caches = model.allocate(num_blocks=num_blocks, **SIZES)
    return ModelRunner(model=model, caches=caches, num_ranks=1, max_num_seqs=max_num_seqs, **SIZES)


def test_every_cache_has_blocks_of_its_own():
    num_blocks = tuple(num + 40 for num in NEEDED)
    stats = cache_model.serve(make_runner(num_blocks), num_blocks)
    assert stats["preemptions"] == 0
    assert stats["cached_tokens"] > 0
    assert stats["num_copies"] > 0


@pytest.mark.parametrize("scarce", range(len(SPECS)))
def test_any_cache_may_be_the_scarce_one(scarce):
    num_blocks = tuple(num + (0 if index == scarce else 40) for index, num in enumerate(NEEDED))
    cache_model.serve(make_runner(num_blocks), num_blocks)
