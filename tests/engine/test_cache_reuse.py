"""The prefix cache, preemption and planning ahead change what is computed, not what is answered."""

from itertools import pairwise

import numpy as np
import pytest
from helpers import parity
from helpers import tiny_checkpoints as tiny

from expertwire import LLM, SamplingParams
from expertwire.engine.models.registry import read_model_config

BLOCK = 16


def serve(**options):
    return LLM(parity.checkpoint("qwen3_moe"), launcher="local", threads_per_rank=1, block_size=BLOCK, **options)


def greedy(llm, prompts, num_tokens):
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    return llm.generate(prompts, params, use_tqdm=False)


def talk(llm, num_sessions=3, num_turns=3):
    """Sessions that begin alike; every turn goes on from the last one's answer: (prompts, answers, cached tokens) by turn."""
    texts = [tiny.prompt(40, seed=1) + tiny.prompt(9 + session, seed=10 + session) for session in range(num_sessions)]
    turns = []
    for turn in range(num_turns):
        outputs = greedy(llm, texts, 13)
        answers = [list(output.outputs[0].token_ids) for output in outputs]
        turns.append((texts, answers, [output.num_cached_tokens for output in outputs]))
        new = [tiny.prompt(7, seed=100 * turn + session) for session in range(num_sessions)]
        texts = [text + answer + more for text, answer, more in zip(texts, answers, new, strict=True)]
    return turns


def test_a_conversation_is_computed_once():
    with serve(kv_cache_memory_bytes=20_000_000) as llm:
        turns = talk(llm)
        counts = llm.stats()
    with serve(kv_cache_memory_bytes=20_000_000, enable_prefix_caching=False) as llm:
        assert [(texts, answers) for texts, answers, _ in talk(llm)] == [
            (texts, answers) for texts, answers, _ in turns
        ]
        assert llm.stats()["cached_tokens"] == 0
    # The first turn shares the 40 tokens that all sessions begin with; whoever comes first has to compute them.
    assert sorted(turns[0][2]) == [0, 32, 32]
    for (texts, answers, _), (_, _, cached) in pairwise(turns):
        # Of an answer's last token nothing has been computed.
        known = [len(text) + len(answer) - 1 for text, answer in zip(texts, answers, strict=True)]
        assert cached == [length // BLOCK * BLOCK for length in known]
    assert counts["cached_tokens"] == sum(sum(cached) for _, _, cached in turns)
    assert counts["prompt_tokens"] == sum(len(text) for texts, _, _ in turns for text in texts)


def test_salt_and_tenant_keep_prefixes_apart():
    prompt = tiny.prompt(50, seed=3)
    params = SamplingParams(temperature=0, max_tokens=2)
    with serve(kv_cache_memory_bytes=20_000_000) as llm:

        def cached(**options):
            return llm.generate([prompt], params, use_tqdm=False, **options)[0].num_cached_tokens

        assert [cached(), cached()] == [0, 48]
        assert [cached(tenant="a"), cached(tenant="a"), cached(tenant="b")] == [0, 48, 0]
        assert [cached(cache_salt="x"), cached(cache_salt="x"), cached(cache_salt="x", tenant="a")] == [0, 48, 0]


@pytest.mark.slow
@pytest.mark.parametrize("ep_size", [1, 2])
def test_a_pool_that_is_too_small_gives_the_same_tokens(ep_size):
    prompts = [tiny.prompt(20 + 3 * i, seed=i) for i in range(12)]
    answers, preemptions = [], []
    for blocks in (400, 17):
        with serve(kv_cache_memory_bytes=blocks * block_bytes(), max_model_len=200, ep_size=ep_size) as llm:
            outputs = greedy(llm, prompts, 60)
            answers.append([list(output.outputs[0].token_ids) for output in outputs])
            preemptions.append(llm.stats()["preemptions"])
    assert answers[0] == answers[1]
    assert preemptions[0] == 0
    assert preemptions[1] > 0


def block_bytes():
    config = read_model_config(str(parity.checkpoint("qwen3_moe")))
    return BLOCK * sum(spec.bytes_per_token for spec in config.cache_specs())


def test_prompt_logprobs_do_not_change_with_the_cache():
    prompt = tiny.prompt(60, seed=5)
    params = SamplingParams(temperature=0, max_tokens=3, prompt_logprobs=2)
    with serve(kv_cache_memory_bytes=20_000_000) as llm:
        first, again = (llm.generate([prompt], params, use_tqdm=False)[0] for _ in range(2))
    assert again.num_cached_tokens == 0
    for before, after in zip(first.prompt_logprobs[1:], again.prompt_logprobs[1:], strict=True):
        assert list(before) == list(after)
        values = [[entry.logprob for entry in at.values()] for at in (before, after)]
        np.testing.assert_allclose(*values, atol=1e-5)
