"""Sampling parameters, through the engine, against their definitions applied to the reference's logits."""

import numpy as np
import pytest
from helpers import parity
from helpers import tiny_checkpoints as tiny

from expertwire import LLM, SamplingParams
from expertwire.kernels.ops.sampling import uniform

FOLDER = tiny.cached("qwen3_moe")
VOCAB = 320
OPTIONS = {"dtype": "float32", "threads_per_rank": 1, "launcher": "local", "kv_cache_memory_bytes": 20_000_000}


@pytest.fixture(scope="module")
def llm():
    with LLM(FOLDER, **OPTIONS, ep_size=2, max_num_batched_tokens=40) as llm:
        yield llm


@pytest.fixture(scope="module")
def eos(llm):
    ids = llm.model_info.eos_token_ids
    assert len(ids) == 2
    return ids


def probabilities(logits, params):
    """Return the probabilities of raw float64 logits of one row, after temperature, top-k, top-p and min-p."""
    p = np.exp((logits - logits.max()) / params.temperature)
    order = np.argsort(-p, kind="stable")
    if params.top_k > 0:
        p[order[params.top_k :]] = 0
    p /= p.sum()
    p[order[int(np.searchsorted(np.cumsum(p[order]), params.top_p)) + 1 :]] = 0
    p[p < params.min_p * p.max()] = 0
    return p / p.sum()


def next_token(logits, params, prompt, output, branch, eos):
    """The token after `output`, by hand."""
    logits = logits.astype(np.float64)
    for token in {*prompt, *output}:
        logits[token] *= 1 / params.repetition_penalty if logits[token] > 0 else params.repetition_penalty
    for token in set(output):
        logits[token] -= params.presence_penalty + params.frequency_penalty * output.count(token)
    for token, bias in params.logit_bias.items():
        logits[token] += bias
    if len(output) < params.min_tokens:
        logits[[*params.stop_token_ids, *(() if params.ignore_eos else eos)]] = -np.inf
    if params.temperature == 0:
        return int(logits.argmax())
    position = len(prompt) + len(output)
    [number] = uniform(*(np.array([value]) for value in (params.seed, branch, position)))
    return int(np.searchsorted(np.cumsum(probabilities(logits, params)), number, side="right"))


def check(prompt, params, output, eos):
    """Every branch of a request: each token, and why it ended."""
    assert len(output.outputs) == params.n
    for branch, completion in enumerate(output.outputs):
        tokens = list(completion.token_ids)
        logits = tiny.reference_logits(FOLDER, prompt + tokens)[len(prompt) - 1 :]
        stops = {*params.stop_token_ids, *(() if params.ignore_eos else eos)}
        for i, token in enumerate(tokens):
            right = next_token(logits[i], params, prompt, tokens[:i], branch, eos)
            assert token == right, f"branch {branch}, output {i} of {tokens}: expected {right}"
            assert token not in stops or i == len(tokens) - 1
        stopped = tokens[-1] in stops
        assert completion.finish_reason == ("stop" if stopped else "length")
        assert stopped or len(tokens) == params.max_tokens
        assert len(tokens) >= params.min_tokens


BASE = {"max_tokens": 24, "seed": 11}
REQUESTS = {
    "plain": {},
    "greedy": {"temperature": 0},
    "hot": {"temperature": 2.5},
    "tiny temperature": {"temperature": 1e-45},
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.1},
    "all filters": {"temperature": 1.5, "top_k": 40, "top_p": 0.9, "min_p": 0.02},
    "repetition": {"temperature": 0, "repetition_penalty": 1.8, "max_tokens": 40},
    "reward of repetition": {"repetition_penalty": 0.6},
    "presence": {"temperature": 0, "presence_penalty": 2.0, "max_tokens": 40},
    "frequency": {"temperature": 0.3, "frequency_penalty": 1.5, "max_tokens": 40},
    "negative penalties": {"presence_penalty": -2.0, "frequency_penalty": -0.5},
    "bias": {"temperature": 0, "logit_bias": {5: 8.0, 6: 7.5, 319: 9.0, 0: -100.0}},
    "one token allowed": {"logit_bias": {77: 100.0}},
    "stop ids": {"temperature": 1.5, "stop_token_ids": list(range(60))},
    "stop ids later": {"temperature": 1.5, "stop_token_ids": list(range(150)), "min_tokens": 9},
    "forced end": {"logit_bias": {297: 40.0, 299: 40.0}},
    "forced end later": {"logit_bias": {297: 40.0, 299: 40.0}, "min_tokens": 5},
    "forced end ignored": {"logit_bias": {297: 12.0, 299: 12.0}, "ignore_eos": True, "min_tokens": 5},
    "one token": {"max_tokens": 1},
    "branches": {"n": 4},
    "everything": {
        "n": 3,
        "temperature": 0.9,
        "top_k": 50,
        "top_p": 0.95,
        "min_p": 0.01,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.3,
        "frequency_penalty": 0.2,
        "logit_bias": {9: 3.0, 10: -5.0},
        "min_tokens": 6,
        "stop_token_ids": [1, 2, 3],
    },
}


def requests():
    """Prompts of different lengths, most longer than what a step takes on, and their parameters."""
    prompts = [tiny.prompt(3 + 7 * i, seed=i) for i in range(len(REQUESTS))]
    return prompts, [SamplingParams(**{**BASE, **options}) for options in REQUESTS.values()]


@pytest.fixture(scope="module")
def batched(llm):
    prompts, params = requests()
    return dict(zip(REQUESTS, llm.generate(prompts, params, use_tqdm=False), strict=True))


@pytest.mark.parametrize("name", REQUESTS)
def test_by_hand(batched, eos, name):
    prompts, params = requests()
    index = list(REQUESTS).index(name)
    check(prompts[index], params[index], batched[name], eos)


def test_the_requests_show_what_they_should(batched, eos):
    """The comparison above would pass if, say, no output ever met a stop id."""

    def outputs(name):
        return [list(completion.token_ids) for completion in batched[name].outputs]

    assert set(eos) == {297, 299}
    assert len({tuple(tokens) for tokens in outputs("branches")}) == 4
    assert outputs("one token allowed") == [[77] * 24]
    [early], [later] = outputs("stop ids"), outputs("stop ids later")
    assert len(early) < 9 <= len(later) < 24
    assert [len(tokens) for tokens in outputs("forced end")] == [1]
    assert [len(tokens) for tokens in outputs("forced end later")] == [6]
    [ignored] = outputs("forced end ignored")
    assert len(ignored) == 24
    assert set(ignored) & set(eos)
    assert outputs("tiny temperature")[0]


def test_the_same_seed_gives_the_same_tokens_alone_and_on_other_ranks(batched):
    prompts, params = requests()
    with LLM(FOLDER, **OPTIONS, ep_size=1) as llm:
        for prompt, param, name in zip(prompts, params, REQUESTS, strict=True):
            [alone] = llm.generate([prompt], param, use_tqdm=False)
            for completion, other in zip(alone.outputs, batched[name].outputs, strict=True):
                assert completion.token_ids == other.token_ids, name


def test_seeds_matter(llm):
    ids = tiny.prompt(20)
    params = [SamplingParams(max_tokens=8, seed=seed) for seed in (1, 1, 2, -(2**63), 2**63 - 1)]
    tokens = [tuple(o.outputs[0].token_ids) for o in llm.generate([ids] * 5, params, use_tqdm=False)]
    assert tokens[0] == tokens[1]
    assert len(set(tokens)) == 4


def test_first_tokens_follow_the_distribution(llm):
    ids = tiny.prompt(12, seed=3)
    params = [
        SamplingParams(n=256, max_tokens=1, temperature=1.2, top_p=0.85, seed=seed, ignore_eos=True)
        for seed in range(4)
    ]
    outputs = llm.generate([ids] * len(params), params, use_tqdm=False)
    tokens = [completion.token_ids[0] for output in outputs for completion in output.outputs]
    expected = len(tokens) * probabilities(tiny.reference_logits(FOLDER, ids)[-1].astype(np.float64), params[0])
    counts = np.bincount(tokens, minlength=VOCAB)
    assert not counts[expected == 0].any()
    likely = expected >= 5  # the others are one cell
    cells = [(counts[likely], expected[likely]), (counts[~likely].sum(), expected[~likely].sum() + 1e-9)]
    chi_square = sum(((seen - right) ** 2 / right).sum() for seen, right in cells)
    freedom = int(likely.sum())
    assert chi_square < freedom + 4.75 * (2 * freedom) ** 0.5 + 15


@pytest.mark.parametrize("num_top", [0, 1, 5, 64])
def test_logprobs(llm, num_top):
    """They are of the raw logits, whatever the penalties: the sampled token first, then the top ones in order."""
    prompt = tiny.prompt(50, seed=2)
    params = SamplingParams(
        seed=5,
        temperature=1.5,
        repetition_penalty=1.5,
        logit_bias={3: 5.0},
        max_tokens=10,
        ignore_eos=True,
        logprobs=num_top,
        prompt_logprobs=num_top,
    )
    [output] = llm.generate([prompt], params, use_tqdm=False)
    tokens = list(output.outputs[0].token_ids)
    right = parity.reference_logprobs(FOLDER, prompt + tokens)
    assert output.prompt_logprobs[0] is None
    positions = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
    assert len(positions) == 59
    for position, (token, entries) in enumerate(zip(prompt[1:] + tokens, positions, strict=True)):
        assert next(iter(entries)) == token
        assert len(entries) in (max(num_top, 1), num_top + 1)
        for i, entry in entries.items():
            assert entry.logprob == pytest.approx(right[position, i], abs=1e-3)
            rank = 1 + int((right[position] > right[position, i] + 1e-3).sum())
            assert rank <= entry.rank <= 1 + int((right[position] > right[position, i] - 1e-3).sum()), (position, i)
        top = sorted(entry.rank for entry in entries.values())[:num_top]
        assert top == list(range(1, num_top + 1))


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_min_tokens_must_leave_a_token(llm, ignore_eos):
    params = SamplingParams(stop_token_ids=list(range(VOCAB)), min_tokens=3, ignore_eos=ignore_eos)
    with pytest.raises(ValueError, match="min_tokens must be 0 if stop_token_ids"):
        llm.generate([tiny.prompt(9)], params, use_tqdm=False)


def test_no_logprobs_unless_asked_for(llm):
    [output] = llm.generate([tiny.prompt(5)], SamplingParams(max_tokens=2), use_tqdm=False)
    assert output.prompt_logprobs is None
    assert output.outputs[0].logprobs is None


@pytest.mark.parametrize(
    "options",
    [
        {"stop_token_ids": list(range(1, VOCAB)), "min_tokens": 3, "ignore_eos": True},
        {"repetition_penalty": 0.01},
        {"repetition_penalty": 100, "top_p": 0.5},
        {"temperature": 1e-45, "top_k": 5},
        {"temperature": 1e30},
    ],
    ids=str,
)
def test_extreme_values_give_tokens(llm, options):
    [output] = llm.generate([tiny.prompt(9)], SamplingParams(**{"max_tokens": 6, **options}), use_tqdm=False)
    tokens = output.outputs[0].token_ids
    assert all(0 <= token < VOCAB for token in tokens)
    assert (
        len(
            llm.generate([[1, 2, 3]], SamplingParams(max_tokens=4, ignore_eos=True), use_tqdm=False)[0]
            .outputs[0]
            .token_ids
        )
        == 4
    )


class TestCosts:
    """Bounds on the cost of a request, whose messages name the numbers."""

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"stop": ["a"] * 1025}, "stop must have at most 1024 entries, got 1025"),
            ({"stop": ["a" * 40_000, "b" * 40_000]}, "stop must have at most 65536 characters in all, got 80000"),
            ({"stop": "a" * 65_537}, "stop must have at most 65536 characters in all, got 65537"),
            ({"stop_token_ids": [1] * 1025}, "stop_token_ids must have at most 1024 entries, got 1025"),
            ({"logit_bias": dict.fromkeys(range(4097), 1.0)}, "logit_bias must have at most 4096 entries, got 4097"),
        ],
    )
    def test_of_lists(self, fields, message):
        with pytest.raises(ValueError, match=message):
            SamplingParams(**fields)

    def test_of_outputs(self):
        params = SamplingParams(n=256, max_tokens=10**6, logprobs=64)
        params.check_cost(100, 1000)  # 900 tokens fit
        with pytest.raises(ValueError, match=r"at most 16777216, got 256 x 99900 x 65 = 1662336000"):
            params.check_cost(100, 100_000)

    def test_of_prompts(self):
        SamplingParams(max_tokens=1).check_cost(10**7, 10**8)
        with pytest.raises(ValueError, match=r"at most 2097152, got 100000 x 65 = 6500000"):
            SamplingParams(max_tokens=1, prompt_logprobs=64).check_cost(100_000, 10**8)
