"""Every family gives the logits and the tokens that transformers gives: representatives of `test_models_full.py`."""

import numpy as np
import pytest
import torch
from helpers import parity
from helpers import tiny_checkpoints as tiny
from helpers.rank_model import RankModel

from expertwire import LLM

OPTIONS = {"dtype": "float32", "threads_per_rank": 1, "launcher": "local", "kv_cache_memory_bytes": 20_000_000}


@pytest.fixture
def threads():
    """Sets how many run: with several other kernels do than with one."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("variant", "num", "lengths"),
    [*((variant, 1, parity.LENGTHS) for variant in parity.VARIANTS), ("mixtral", 3, (17,)), ("qwen3_moe", 3, (1, 63))],
)
def test_logits_of_every_position(variant, num, lengths, threads):
    threads(num)
    folder = parity.checkpoint(variant)
    model = RankModel(folder)
    for length in lengths:
        ids = parity.case(variant, length).ids
        right = tiny.reference_logits(folder, ids)
        for chunk in (None, 32, 1) if length in (63, 130) else (None, 32):
            np.testing.assert_allclose(
                model.logits(ids, chunk), right, rtol=0, atol=1e-3, err_msg=f"{length} tokens, chunks of {chunk}"
            )


@pytest.mark.parametrize(
    ("variant", "lengths", "together", "options"),
    [
        ("mixtral", (17, 130), True, {"ep_size": 2, "max_num_batched_tokens": 32}),
        pytest.param("mixtral, 2 experts", (2, 63), True, {"ep_size": 3}, marks=pytest.mark.slow),
        ("qwen3_moe, weights as they are", (16, 300), False, {"ep_size": 2, "num_redundant_experts": 3}),
        ("qwen3", (1, 63), True, {"ep_size": 1, "max_num_batched_tokens": 32}),
    ],
)
def test_tokens_and_logprobs(variant, lengths, together, options):
    with LLM(parity.checkpoint(variant), **OPTIONS, **options) as llm:
        tally = parity.compare(llm, [parity.case(variant, length) for length in lengths], together=together)
    assert not tally.failures
    assert tally.excused <= 1


@pytest.mark.slow
@pytest.mark.parametrize("ep_size", [1, 3])
def test_the_reference_decodes_the_same(ep_size):
    """`parity.case` takes the reference's tokens from its own cached decoding; so they are compared at length once."""
    case = parity.case("qwen3_moe", 15)
    whole = parity.reference_logprobs(parity.checkpoint("qwen3_moe"), case.ids + case.greedy[:-1])
    assert whole[len(case.ids) - 1 :].argmax(-1).tolist() == case.greedy
    with LLM(parity.checkpoint("qwen3_moe"), **OPTIONS, ep_size=ep_size, max_num_batched_tokens=8) as llm:
        assert not parity.compare(llm, [case], together=False).failures
