"""The numerics mode "fast": other bits, the same model; and what does not differ stays as it is."""

import numpy as np
import pytest
from helpers import architectures
from helpers import tiny_checkpoints as tiny
from helpers.rank_model import RankModel

from expertwire import LLM, SamplingParams

# One of each: compressed queries or not, a window of rotation scaling, queries that grow.
LATENT = ("deepseek_v2_lite", "deepseek_v3", "mistral4")
TOLERANCE = 1e-3


@pytest.mark.parametrize("name", LATENT)
def test_logits(name):
    folder = architectures.folder(name)
    invariant, fast = RankModel(folder), RankModel(folder, fast=True)
    for length in (1, 17, 70, 300):
        ids = tiny.prompt(length, seed=length)
        expected, whole = invariant.logits(ids), fast.logits(ids)
        assert np.abs(whole - expected).max() <= TOLERANCE
        if length > 1:
            assert not np.array_equal(whole, expected), "the expanded form was not taken"
        # Of the later chunks a query meets too many keys.
        assert np.abs(fast.logits(ids, 7) - expected).max() <= TOLERANCE


def test_models_without_latent_attention_keep_their_bits():
    folder = architectures.folder("qwen3_moe")
    ids = tiny.prompt(70, seed=1)
    assert np.array_equal(RankModel(folder, fast=True).logits(ids), RankModel(folder).logits(ids))


def test_the_engine_answers_alike():
    folder = str(architectures.folder("deepseek_v3"))
    prompts = [tiny.prompt(length, seed=length) for length in (1, 5, 40, 130)]
    params = SamplingParams(max_tokens=8, temperature=0.0)
    answers = []
    for numerics in ("invariant", "fast"):
        with LLM(
            folder, dtype="float32", ep_size=2, numerics=numerics, max_num_batched_tokens=64, threads_per_rank=1
        ) as llm:
            answers.append([output.outputs[0].token_ids for output in llm.generate(prompts, params)])
    assert answers[0] == answers[1]
