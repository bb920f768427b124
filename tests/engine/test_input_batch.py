"""Several named caches on one rank of the CPU, from the scheduler's plans to what a model sees in them."""

import pytest
import torch
from helpers import cache_model
from helpers.cache_model import SIZES, SPECS, CacheModel

from expertwire.engine.runner.model_runner import ModelRunner
from expertwire.kernels import registry
from expertwire.kernels.cpu import prepare_inputs
from expertwire.kernels.ops import sampling
from expertwire.kernels.ops.prepare_inputs import reference

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


def test_rows_are_looked_up_as_by_the_reference():
    generator = torch.Generator().manual_seed(1)
    token_ids = torch.randint(9, 99, (3, 40), generator=generator, dtype=torch.int32)
    block_tables = torch.randint(1, 50, (2, 3, 10), generator=generator, dtype=torch.int32)
    slot_T = torch.randint(0, 3, (150,), generator=generator, dtype=torch.int32)
    position_T = torch.randint(0, 40, (150,), generator=generator, dtype=torch.int32)
    arguments = slot_T, position_T, token_ids, block_tables, 4
    for found, expected in zip(prepare_inputs.prepare_inputs(*arguments), reference(*arguments), strict=True):
        assert found.dtype == expected.dtype == torch.int64
        assert torch.equal(found, expected)
        assert found.is_contiguous()  # attention is compiled apart for groups whose mapping is not


def test_biases_are_added_and_bans_win_over_everything():
    logits_OV = torch.tensor([[1.0, 2.0, float("inf")], [4.0, 5.0, 6.0]])
    rows, tokens = torch.tensor([[0, 0, 1], [1, 2, 0]], dtype=torch.int32)
    sampling.add_to_logits(logits_OV, rows, tokens, torch.tensor([0.5, -torch.inf, 2.0]))
    assert logits_OV.tolist() == [[1.0, 2.5, -torch.inf], [6.0, 5.0, 6.0]]
