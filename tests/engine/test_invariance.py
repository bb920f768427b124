"""Bit invariance: equal bits of a request in any batch, in any chunks, wherever the experts lie and whatever is cached."""

import numpy as np
import pytest
import torch
from helpers import parity
from helpers import tiny_checkpoints as tiny
from helpers.rank_model import RankModel

from expertwire import LLM, SamplingParams

NUM_OUTPUT = 16


def observe(variant, dtype, lengths, **options):
    """Everything that the engine says of prompts that run one after another."""
    params = SamplingParams(temperature=0, max_tokens=NUM_OUTPUT, ignore_eos=True, logprobs=64, prompt_logprobs=64)
    seen = []
    with LLM(
        parity.checkpoint(variant),
        dtype=dtype,
        launcher="local",
        threads_per_rank=1,
        kv_cache_memory_bytes=20_000_000,
        **options,
    ) as llm:
        for length in lengths:
            [output] = llm.generate([tiny.prompt(length, seed=length)], params, use_tqdm=False)
            seen.append(parity.bits(output))
    return seen


def check(variant, dtype, lengths, settings):
    first = observe(variant, dtype, lengths, **settings[0])
    for options in settings[1:]:
        for length, before, after in zip(lengths, first, observe(variant, dtype, lengths, **options), strict=True):
            assert before == after, f"{variant}, {dtype}, {length} tokens: {options} differs from {settings[0]}"


def test_representative():
    ranks = [{"ep_size": 1}, {"ep_size": 2, "num_redundant_experts": 2}, {"ep_size": 4}]
    check("qwen3_moe", "bfloat16", [1, 2, 17, 65, 200], ranks)


DTYPES = ["float32", "bfloat16"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 3])
def test_a_prompt_in_chunks(dtype, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)  # with more than two, products are the library's
    try:
        model = RankModel(parity.checkpoint("qwen3_moe"), dtype)
        prompt = tiny.prompt(90, seed=4)
        whole = model.logits(prompt)
        for chunk in (1, 7, 33):
            assert np.array_equal(model.logits(prompt, chunk), whole), f"{chunk} tokens at a time"
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_company_chunks_ranks_and_cache(dtype):
    lengths = [1, 2, 17, 40, 65, 150, 200]
    alone = observe("qwen3_moe", dtype, lengths, enable_prefix_caching=False)
    params = SamplingParams(temperature=0, max_tokens=NUM_OUTPUT, ignore_eos=True, logprobs=64)
    prompts = [tiny.prompt(length, seed=length) for length in lengths]
    options = {"dtype": dtype, "launcher": "local", "threads_per_rank": 1, "kv_cache_memory_bytes": 20_000_000}
    with LLM(parity.checkpoint("qwen3_moe"), ep_size=2, chunked_prefill_size=48, **options) as llm:
        for attempt in ("cold", "cached"):
            outputs = llm.generate(prompts, params, use_tqdm=False)
            # Who has a prefix is a guess: one in some hundred short ones is not found.
            num_cached = sum(output.num_cached_tokens for output in outputs)
            assert num_cached == 0 if attempt == "cold" else num_cached > 0.9 * sum(lengths) - 16 * len(lengths)
            for length, (tokens, entries, values), output in zip(lengths, alone, outputs, strict=True):
                [completion] = output.outputs
                assert list(completion.token_ids) == tokens, f"{length} tokens, {attempt}"
                assert [list(at) for at in completion.logprobs] == entries[length - 1 :]
                found = np.array([entry.logprob for at in completion.logprobs for entry in at.values()], np.float32)
                assert values.endswith(found.tobytes()), f"{length} tokens, {attempt}"


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", ["mixtral", "qwen3_moe, weights as they are", "qwen3"])
def test_twenty_prompts(variant, dtype):
    lengths = [1, 2, 3, 7, 8, 15, 16, 17, 24, 31, 33, 48, 63, 64, 65, 100, 130, 199, 256, 300]
    check(variant, dtype, lengths, [{"ep_size": 1}, {"ep_size": 2}, {"ep_size": 4}])
