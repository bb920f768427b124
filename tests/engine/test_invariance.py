"""Where the experts lie does not change a bit of a request that runs alone: EP 1, 2 and 4 give equal log-probabilities."""

import numpy as np
import parity
import pytest
import tiny_checkpoints as tiny

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
        kv_cache_bytes=20_000_000,
        **options,
    ) as llm:
        for length in lengths:
            [output] = llm.generate([tiny.prompt(length, seed=length)], params, use_tqdm=False)
            [completion] = output.outputs
            entries = [*output.prompt_logprobs[1:], *completion.logprobs]
            values = np.array([entry.logprob for at in entries for entry in at.values()], np.float32)
            seen.append((list(completion.token_ids), [list(at) for at in entries], values.tobytes()))
    return seen


def check(variant, dtype, lengths, settings):
    first = observe(variant, dtype, lengths, **settings[0])
    for options in settings[1:]:
        for length, before, after in zip(lengths, first, observe(variant, dtype, lengths, **options), strict=True):
            assert before == after, f"{variant}, {dtype}, {length} tokens: {options} differs from {settings[0]}"


def test_representative():
    ranks = [{"ep_size": 1}, {"ep_size": 2, "redundant_experts": 2}, {"ep_size": 4}]
    check("qwen3_moe", "bfloat16", [1, 2, 17, 65, 200], ranks)


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", ["mixtral", "qwen3_moe, weights as they are", "qwen3"])
def test_twenty_prompts(variant, dtype):
    lengths = [1, 2, 3, 7, 8, 15, 16, 17, 24, 31, 33, 48, 63, 64, 65, 100, 130, 199, 256, 300]
    check(variant, dtype, lengths, [{"ep_size": 1}, {"ep_size": 2}, {"ep_size": 4}])
