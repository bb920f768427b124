"""A model with a cache of everything and one of a window, through the engine: pools that are too small for all, and prefixes that
are found again, give transformers' greedy tokens."""

import numpy as np
import pytest
from helpers import architectures
from helpers import tiny_checkpoints as tiny
from helpers.slow import slow_but

from expertwire import LLM, SamplingParams

NAME, BLOCK, WINDOW = "gpt_oss_mxfp4", 8, 24
LENGTHS, NUM_NEW = (300, 170, 175, 165), 60
BYTES = 440_000  # 51 blocks of the first, and 28 of the window's


def greedy(llm, prompts):
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=NUM_NEW, ignore_eos=True), use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs], [output.num_cached_tokens for output in outputs]


def assert_greedy(prompt, answer):
    """Each token is transformers' best one behind those before it."""
    best = architectures.reference_logits(NAME, prompt + answer).argmax(1)
    assert np.array_equal(best[len(prompt) - 1 : -1], answer)


@pytest.mark.parametrize("ep_size", slow_but([1], [1, 2]))
def test_small_pools(ep_size):
    prompts = [tiny.prompt(length, seed=length) for length in LENGTHS]
    options = {"block_size": BLOCK, "max_num_batched_tokens": 32, "max_num_seqs": 2, "max_model_len": 400}
    folder = str(architectures.folder(NAME))
    with LLM(
        folder, launcher="local", threads_per_rank=1, ep_size=ep_size, kv_cache_memory_bytes=BYTES, **options
    ) as llm:
        blocks = llm.model_info.cache_blocks
        # Without giving blocks back, the window's cache would not even hold the first request.
        assert blocks[f"window {WINDOW}"] * BLOCK < LENGTHS[0] + NUM_NEW
        answers, _ = greedy(llm, prompts)
        for prompt, answer in zip(prompts, answers, strict=True):
            assert_greedy(prompt, answer)
        assert llm.stats()["preemptions"] > 0

        longer = prompts[-1] + answers[-1]
        greedy(llm, [longer])
        [answer], [cached] = greedy(llm, [longer])
        # Of the window's cache the prefix needs only the tail.
        assert WINDOW < cached < len(longer)
        assert_greedy(longer, answer)
        assert all(not any(used) for used in llm.stats()["blocks_used"].values())
