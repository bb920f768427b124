"""The draft that a cascade hands over: what the large model keeps of it, what the client gets, and what is counted."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import expertwire
from expertwire.deploy.demo_task import make_problem
from expertwire.engine.frontend.api import Logprob
from expertwire.engine.frontend.cascade_drafts import num_accepted
from expertwire.strategies.cascade import Cascade, Router
from expertwire.strategies.cascade_log import record_from_json

SamplingParams = expertwire.SamplingParams
DEMO = Path(expertwire.__file__).with_name("demo_model")
PROMPTS = [make_problem("SUM", size, seed, "test").prompt for size in range(4, 8) for seed in range(6)]
DOUBT = Cascade(
    small="small", large="large", version="1", random_share=0.0, confidence_threshold=-0.7, large_token_cost=8.0
)
GREEDY = SamplingParams(temperature=0, logprobs=2)
ALL = 1e3  # a tolerance that keeps everything


@pytest.fixture(scope="module")
def models():
    with (
        expertwire.LLM(DEMO.with_name("demo_model_small"), max_model_len=256, threads_per_rank=1) as small,
        expertwire.LLM(DEMO, max_model_len=256, threads_per_rank=1) as large,
    ):
        yield {"small": small, "large": large}


def generate(models, params, tolerance, prompts=PROMPTS, **changes):
    policy = dataclasses.replace(DOUBT, draft_tolerance=tolerance, **changes)
    with expertwire.CascadeLLM(policy, models) as cascade:
        return cascade.generate(prompts, params, use_tqdm=False)


def fields(output):
    [got] = output.outputs
    return got.token_ids, got.text, got.finish_reason, got.logprobs


def test_without_tolerance_a_greedy_output_is_the_large_models_own(models):
    alone = {name: llm.generate(PROMPTS, GREEDY, use_tqdm=False) for name, llm in models.items()}
    outputs = generate(models, GREEDY, 0.0)
    drafts = []
    for index, output in enumerate(outputs):
        assert fields(output) == fields(alone[output.model][index])
        if output.reason == "kept":
            continue
        small, large = output.record.legs
        assert (small.draft_tokens, large.draft_tokens) == (0, small.tokens)
        assert large.tokens == len(output.outputs[0].token_ids) - large.accepted_tokens + 1  # the check samples one
        assert large.cost == 8.0 * (large.prompt_tokens + large.draft_tokens + large.tokens)
        drafts.append((large.draft_tokens, large.accepted_tokens))
    assert 0 < len(drafts) < len(outputs)
    assert 0 < sum(kept for _, kept in drafts) < sum(given for given, _ in drafts)


@pytest.mark.parametrize("logprobs", [None, 0, 3])
def test_a_tolerance_without_end_continues_the_whole_draft(models, logprobs):
    params = SamplingParams(temperature=0.7, seed=5, logprobs=logprobs)
    small = models["small"].generate(PROMPTS, params, use_tqdm=False)
    outputs = generate(models, params, ALL)
    escalated = [(index, output) for index, output in enumerate(outputs) if output.reason == "confidence"]
    assert escalated
    for index, output in escalated:
        tokens, text, reason, entries = fields(output)
        leg = output.record.legs[1]
        assert leg.accepted_tokens == leg.draft_tokens
        assert tokens[: leg.draft_tokens] == small[index].outputs[0].token_ids[: leg.draft_tokens]
        # Behind the draft it is the large model's own: draws are a function of seed and position.
        known = output.prompt_token_ids + tokens[: leg.draft_tokens]
        whole = dataclasses.replace(params, prompt_logprobs=logprobs)
        [rest] = models["large"].generate([known], whole, use_tqdm=False)
        own = rest.outputs[0]
        assert (tokens[leg.draft_tokens :], reason) == (own.token_ids, own.finish_reason)
        assert text.endswith(own.text)
        if logprobs is not None:
            assert entries == rest.prompt_logprobs[len(output.prompt_token_ids) :] + own.logprobs


def test_the_engines_count_what_is_counted_for_the_requests(models):
    def sampled():
        """Return the tokens sampled for requests by each engine, without those that came after an abort."""
        return [
            stats["tokens_sampled"] - stats["tokens_dropped"] - stats["groups"].get("tokens_late", 0)
            for stats in (llm.stats() for llm in models.values())
        ]

    before, counts = sampled(), models["small"].stats()["groups"]
    outputs = generate(models, GREEDY, 1.0)
    legs = [leg for output in outputs for leg in output.record.legs]
    expected = [
        then + sum(leg.tokens for leg in legs if leg.model == name) for name, then in zip(models, before, strict=True)
    ]
    deadline = time.monotonic() + 10
    while sampled() != expected and time.monotonic() < deadline:  # steps in flight
        time.sleep(0.02)
    assert sampled() == expected
    groups = models["small"].stats()["groups"]
    for name, field in (("cascade_tokens_draft", "draft_tokens"), ("cascade_tokens_accepted", "accepted_tokens")):
        assert groups[name] - counts.get(name, 0) == sum(getattr(leg, field) for leg in legs) > 0
    record = next(output.record for output in outputs if output.reason == "confidence")
    assert record.draft_tolerance == 1.0
    assert record_from_json(record.to_json()) == record


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0, stop=["answer"]), SamplingParams(temperature=0, repetition_penalty=1.1),
        SamplingParams(temperature=0, logit_bias={5: 1.0}), SamplingParams(temperature=0, min_tokens=30),
        SamplingParams(temperature=0, expert_load=True),
    ],
)  # fmt: skip
def test_requests_with_rules_of_their_own_start_from_the_prompt(models, params):
    own = models["large"].generate(PROMPTS, params, use_tqdm=False)
    outputs = generate(models, params, ALL, confidence_threshold=0.0)
    for output, alone in zip(outputs, own, strict=True):
        assert output.record.legs[1].draft_tokens == 0
        assert fields(output) == fields(alone)


def test_only_what_the_small_model_has_written_is_a_draft(models):
    router = Router(("numbers",), (0.0,), (1.0,), (-1.0,), 0.0)
    for changes in ({"router": router, "router_threshold": 0.9}, {"random_share": 1.0}):
        outputs = generate(models, GREEDY, ALL, **changes)
        assert all(leg.draft_tokens == 0 for output in outputs for leg in output.record.legs)
    # A draft leaves room for a token of the large model.
    short = dataclasses.replace(GREEDY, max_tokens=4)
    for output in generate(models, short, ALL, confidence_threshold=-1e-9, window=3):
        assert len(output.outputs[0].token_ids) == 4
        assert all(leg.draft_tokens < 4 for leg in output.record.legs)


def test_an_output_that_the_verifier_rejects_is_a_draft_without_its_end(models):
    policy = dataclasses.replace(
        DOUBT, confidence_threshold=None, verifier="none", verifier_threshold=0.5, draft_tolerance=ALL
    )
    with expertwire.CascadeLLM(policy, models, verifier=lambda candidates: [0.0] * len(candidates)) as cascade:
        outputs = cascade.generate(PROMPTS, GREEDY, use_tqdm=False)
    for output in outputs:
        small, large = output.record.legs
        assert output.reason == "verifier"
        assert large.draft_tokens == small.tokens - 1


def entries(*rows):
    """Log-probabilities at a position: (token, logprob, rank), the draft's first."""
    return {token: Logprob(logprob, rank, None) for token, logprob, rank in rows}


def test_tokens_are_kept_up_to_the_first_that_is_too_unlikely():
    best = entries((7, -0.1, 1), (8, -3.0, 2))
    second = entries((8, -1.5, 2), (7, -0.5, 1))
    tied = entries((7, -0.7, 1), (8, -0.7, 2))
    for tolerance, kept in ((0.0, 1), (0.9, 1), (1.1, 3)):
        assert num_accepted([7, 8, 7], [best, second, best], tolerance) == kept
    assert num_accepted([7, 7], [best, tied], 0.0) == 1  # which of the two it would choose is not known
    assert num_accepted([7, 7], [best, tied], 0.1) == 2
    assert num_accepted([], [], 0.0) == 0


def test_drafts_need_equal_tokenizers(models):
    policy = dataclasses.replace(DOUBT, draft_tolerance=0.5)
    without = {"small": models["small"], "large": SimpleNamespace(tokenizer=None)}
    with pytest.raises(ValueError, match=r"draft_tolerance must be None where tokenizers differ.*got 0\.5"):
        expertwire.CascadeLLM(policy, without)
    expertwire.CascadeLLM(DOUBT, without).close()
