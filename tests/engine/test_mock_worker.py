"""`load_format` "mock": an engine whose ranks have no model."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

import expertwire
from expertwire.deploy.runtime import open_frontend
from expertwire.deploy.serve import _about
from expertwire.engine.config.engine_config import EngineConfig
from expertwire.engine.mock_worker import draw
from expertwire.engine.models.registry import read_model_config
from expertwire.scheduler.sampling_params import SamplingParams

DEMO = str(Path(expertwire.__file__).with_name("demo_model"))
PROMPT = list(range(10, 50))


@pytest.fixture(scope="module")
def frontend():
    config = EngineConfig(model=DEMO, load_format="mock", ep_size=2, max_num_batched_tokens=16, max_num_seqs=3)
    with open_frontend(config) as frontend:
        yield frontend


def serve(frontend, *requests):
    """The updates of each request, one a branch, when all have ended."""
    ids = [frontend.submit(frontend.encode(prompt, params), params) for prompt, params in requests]
    found = {request_id: {} for request_id in ids}
    while frontend.num_open:
        for update in frontend.poll(1.0):
            assert update.error is None, update.error
            found[update.request_id].setdefault(update.branch, []).append(update)
    return [[found[request_id][branch] for branch in sorted(found[request_id])] for request_id in ids]


def tokens_of(updates):
    return [token for update in updates for token in update.token_ids]


def test_tokens_depend_on_seed_branch_and_position_alone(frontend):
    params = SamplingParams(n=2, seed=-5, max_tokens=20, ignore_eos=True)
    others = [(PROMPT[:size], SamplingParams(seed=size, max_tokens=9, ignore_eos=True)) for size in range(1, 12)]
    [alone] = serve(frontend, (PROMPT, params))
    among, *_ = serve(frontend, (PROMPT[::-1], params), *others)
    vocab = frontend.model_info.vocab_size
    for branch in range(2):
        positions = np.arange(20) + len(PROMPT)
        expected = draw(np.full(20, -5), np.full(20, branch), positions) % np.uint64(vocab)
        assert tokens_of(alone[branch]) == tokens_of(among[branch]) == expected.tolist()
    assert tokens_of(alone[0]) != tokens_of(alone[1])


def test_text_is_that_of_the_tokens(frontend):
    [[updates]] = serve(frontend, ("What is 1 + 1?", SamplingParams(seed=1, max_tokens=30, ignore_eos=True)))
    assert "".join(update.text for update in updates) == frontend.tokenizer.decode(tokens_of(updates))
    assert updates[-1].finish_reason == "length"


def test_no_end_before_min_tokens(frontend):
    vocab = frontend.model_info.vocab_size
    stops = [token for token in range(vocab) if token != 7]
    params = SamplingParams(seed=1, max_tokens=20, min_tokens=10, stop_token_ids=stops, ignore_eos=True)
    [[updates]] = serve(frontend, (PROMPT, params))
    tokens = tokens_of(updates)
    assert tokens[:10] == [7] * 10
    assert (len(tokens), updates[-1].finish_reason) == (11, "stop")


def test_log_probabilities(frontend):
    params = SamplingParams(seed=3, max_tokens=4, logprobs=3, prompt_logprobs=2, ignore_eos=True)
    [[updates]] = serve(frontend, (PROMPT, params))
    entries = [entry for update in updates for entry in update.logprobs]
    assert [next(iter(entry)) for entry in entries] == tokens_of(updates)
    for entry in entries:
        assert [value.rank for value in entry.values()] == [1, 2, 3]
        assert [value.logprob for value in entry.values()] == pytest.approx([-math.log(2) * k for k in (1, 2, 3)])
    [prompt] = [update.prompt_logprobs for update in updates if update.prompt_logprobs]
    assert prompt[0] is None
    assert [next(iter(entry)) for entry in prompt[1:]] == PROMPT[1:]
    assert {len(entry) for entry in prompt[1:]} == {2}


def test_expert_load_counts_every_computed_token(frontend):
    model = read_model_config(DEMO, "auto", "auto")
    fresh = list(range(60, 93))
    [[updates]] = serve(frontend, (fresh, SamplingParams(seed=3, max_tokens=6, expert_load=True, ignore_eos=True)))
    computed = len(fresh) + 6 - 1 - updates[-1].num_cached_tokens
    expected = [computed * model.top_k * sparse for sparse in model.sparse_layers]
    assert np.sum(updates[-1].expert_load, axis=1).tolist() == expected
    totals = np.array(frontend.stats()["expert_load"]).sum(axis=1)
    assert (totals[list(model.sparse_layers)] > 0).all()


def test_it_says_that_there_is_no_model(frontend):
    assert frontend.model_info.device == "mock"
    assert any("NO MODEL" in line for line in _about(frontend.model_info))


def test_options():
    with pytest.raises(ValueError, match=r"mock_step_time_s must be a number of seconds in \[0, 1\], got 2"):
        EngineConfig(model="x", load_format="mock", mock_step_time_s=2)
    with pytest.raises(ValueError, match=r"mock_step_time_s 0\.5 has no effect with load_format 'auto'"):
        EngineConfig(model="x", mock_step_time_s=0.5)
