"""Several KV cache groups on a GPU: tables on the device, steps that run ahead, the kernel that looks rows up."""

import torch
from helpers import cache_model
from helpers.cache_model import SIZES, SPECS, CacheModel

from expertwire.engine.runner.model_runner import ModelRunner
from expertwire.kernels import registry
from expertwire.kernels.gpu.device import describe
from expertwire.kernels.gpu.prepare_inputs import prepare_inputs
from expertwire.kernels.ops.prepare_inputs import reference


def test_every_cache_has_blocks_of_its_own():
    num_blocks = tuple(4 + spec.most_blocks(SIZES["block_size"], SIZES["max_model_len"], 16) for spec in SPECS)
    model = CacheModel(registry.triton(describe("cpu")))
    caches = model.allocate(num_blocks=num_blocks, **SIZES)
    runner = ModelRunner(model=model, caches=caches, num_ranks=1, max_num_seqs=4, **SIZES)
    runner.warm_up(max_num_batched_tokens=3, max_num_seqs=2)
    stats = cache_model.serve(runner, num_blocks, depth=2, num_requests=6)
    assert stats["num_copies"] > 0


def test_rows_are_looked_up_in_every_cache():
    generator = torch.Generator().manual_seed(1)
    tokens_SL = torch.randint(9, 99, (3, 40), generator=generator, dtype=torch.int32)
    blocks_CSW = torch.randint(1, 50, (2, 3, 10), generator=generator, dtype=torch.int32)
    slot_T = torch.randint(0, 3, (150,), generator=generator, dtype=torch.int32)
    position_T = torch.randint(0, 40, (150,), generator=generator, dtype=torch.int32)
    slot_T[[3, 149]] = -1
    arguments = slot_T, position_T, tokens_SL, blocks_CSW, 4
    for found, expected in zip(prepare_inputs(*arguments), reference(*arguments), strict=True):
        assert found.dtype == expected.dtype == torch.int64
        assert torch.equal(found, expected)
    nobody_T = slot_T < 0
    token_T, found_T, mapping_CT = prepare_inputs(*arguments)
    slot_T, position_T = slot_T.long(), position_T.long()
    torch.testing.assert_close(found_T, position_T)
    assert torch.equal(token_T, tokens_SL[slot_T, position_T].long().masked_fill(nobody_T, 0))
    expected_CT = blocks_CSW[:, slot_T, position_T // 4].long() * 4 + position_T % 4
    assert torch.equal(mapping_CT, expected_CT.masked_fill(nobody_T, -1))
