"""LongRoPE (Phi-3, Phi-4-mini) in an engine, by request: short ones and long ones, and both at once, beside transformers."""

import functools

import numpy as np
import pytest
import torch
from helpers import architectures, parity
from helpers import tiny_checkpoints as tiny
from helpers.rank_model import RankModel

from expertwire import LLM, SamplingParams

NAME, ORIGINAL = "phi4_mini", 16
NEAR_TIE, TOLERANCE = 2e-3, 1e-3
# Lengths of prompts and outputs. Of a short request at most `ORIGINAL` tokens are computed: all but the last one.
SHORT = [(1, 16), (3, 5), (9, 8), (15, 2), (16, 1), (12, 3)]
LONG = [(17, 1), (40, 12), (17, 20), (100, 4)]
CROSSING = [(9, 9), (5, 30), (16, 2)]  # prompts that fit, with outputs that do not


def engine(**options):
    sizes = {"block_size": 4, "max_model_len": 128, "kv_cache_memory_bytes": 4_000_000, "max_num_seqs": 16}
    numerics = {"dtype": "float32", "launcher": "local", "threads_per_rank": 1}
    return LLM(str(architectures.folder(NAME)), **numerics, **sizes | options)


@pytest.fixture(scope="module")
def llm():
    """An engine for all tests that need no options."""
    with engine() as served:
        yield served


def params(num, **changes):
    return SamplingParams(**{"temperature": 0, "ignore_eos": True, "max_tokens": num, **changes})


@functools.cache
def case(length, num):
    """A prompt, and transformers' next tokens: every sequence is computed anew, so that its length chooses the list."""
    for draw in range(100):
        ids = tiny.prompt(length, seed=1000 * length + draw)
        right, closest = architectures.reference_greedy(NAME, ids, num)
        if closest > NEAR_TIE:
            return ids, right
    raise AssertionError(f"no prompt of {length} tokens keeps away from ties")


@functools.cache
def long_case(length, num):
    """A prompt, and the next tokens of a model that is told from the beginning that the request is long."""
    ids = tiny.prompt(length, seed=length)
    return ids, RankModel(architectures.folder(NAME)).greedy(ids, num)


def tokens(outputs):
    return [list(output.outputs[0].token_ids) for output in outputs]


BATCHES = {"short": SHORT, "long": LONG, "mixed": [size for pair in zip(SHORT, LONG, strict=False) for size in pair]}


def check_batches(llm):
    for sizes in BATCHES.values():
        cases = [case(*size) for size in sizes]
        asked = [params(num) for _, num in sizes]
        found = llm.generate([ids for ids, _ in cases], asked, use_tqdm=False)
        assert tokens(found) == [right for _, right in cases]


def test_batches_answer_as_transformers(llm):
    check_batches(llm)


@pytest.mark.parametrize("options", [{"chunked_prefill_size": 5}, {"ep_size": 2}], ids=["chunks", "two ranks"])
def test_batches_answer_so_in_chunks_and_on_two_ranks(options):
    with engine(**options) as served:
        check_batches(served)


def test_one_that_may_cross_is_long_from_the_beginning(llm):
    cases = [long_case(*size) for size in CROSSING]
    found = llm.generate([ids for ids, _ in cases], [params(num) for _, num in CROSSING], use_tqdm=False)
    assert tokens(found) == [right for _, right in cases]
    short = [architectures.reference_greedy(NAME, ids, 1)[0] for ids, _ in cases]
    assert any(right[:1] != other for (_, right), other in zip(cases, short, strict=True)), "the lists say the same"


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 10, 16])
def test_without_max_tokens_it_changes_to_the_long_list_where_transformers_does(length):
    num = 40 - length
    ids, _ = case(length, num)
    model = architectures.model(NAME)
    with torch.no_grad():
        right = model.generate(torch.tensor([ids]), max_new_tokens=num, min_new_tokens=num, do_sample=False)
    with engine(max_model_len=40) as llm:
        outputs = llm.generate([ids, tiny.prompt(20)], params(None), use_tqdm=False)
        assert outputs[0].outputs[0].finish_reason == "length"
        assert ids + tokens(outputs)[0] == right[0].tolist()


def test_logprobs_are_those_of_the_list(llm):
    for length, num in [(12, 3), (12, 30), (16, 1), (30, 5)]:
        ids = tiny.prompt(length, seed=length)
        asked = params(num, logprobs=5, prompt_logprobs=5)
        [output] = llm.generate([ids], asked, use_tqdm=False)
        text = ids + tokens([output])[0]
        # Transformers chooses by the whole text; the last token is not computed.
        right = torch.from_numpy(architectures.reference_logits(NAME, text[:-1])).log_softmax(-1).numpy()
        entries = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
        for position, at in enumerate(entries):
            found = np.array([entry.logprob for entry in at.values()])
            assert np.abs(found - right[position][list(at)]).max() <= TOLERANCE, f"{length} + {num}, at {position}"


def test_only_blocks_of_the_same_list_are_hit(llm):
    ids = tiny.prompt(13, seed=500)  # of no other test
    seen = []
    for num in (4, 9, 4, 9):
        [output] = llm.generate([ids], params(num, logprobs=20), use_tqdm=False)
        seen.append((output.num_cached_tokens, output.outputs[0].logprobs))
    assert [cached for cached, _ in seen] == [0, 0, 12, 12]
    assert seen[0][1] == seen[2][1] and seen[1][1] == seen[3][1], "other bits with a cached prefix"
    assert seen[0][1][0] != seen[1][1][0], "the lists say the same"


@pytest.mark.slow
def test_company_changes_no_bit():
    sizes = [*SHORT, *LONG, *CROSSING, (10, None), (16, None)]
    prompts = [tiny.prompt(length, seed=length) for length, _ in sizes]
    asked = [params(num, logprobs=20, prompt_logprobs=20) for _, num in sizes]
    with engine(max_model_len=112, enable_prefix_caching=False) as llm:
        alone = [
            parity.bits(llm.generate([ids], each, use_tqdm=False)[0]) for ids, each in zip(prompts, asked, strict=True)
        ]
    with engine(max_model_len=112, chunked_prefill_size=7, ep_size=2) as llm:
        for _ in range(2):
            together = llm.generate(prompts, asked, use_tqdm=False)
            assert [parity.bits(output) for output in together] == alone


def test_branches_are_of_one_kind(llm):
    ids, right = case(9, 8)
    [short] = llm.generate([ids], params(8, n=3), use_tqdm=False)
    [long] = llm.generate([ids], params(9, n=3), use_tqdm=False)
    assert [list(branch.token_ids) for branch in short.outputs] == [right] * 3
    expected = RankModel(architectures.folder(NAME)).greedy(ids, 9)
    assert [list(branch.token_ids) for branch in long.outputs] == [expected] * 3
