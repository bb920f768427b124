"""Weights that are not finite: the requests that meet them end with an error, and others keep every bit."""

import functools
import shutil

import numpy as np
import pytest
from helpers import tiny_checkpoints as tiny
from safetensors.torch import load_file, save_file

from expertwire import SamplingParams
from expertwire.engine.config.engine_config import EngineConfig
from expertwire.engine.engine import Engine
from expertwire.engine.frontend.frontend import Frontend
from expertwire.engine.launcher import LocalLauncher

NUM_TOKENS = 12
PARAMS = {"max_tokens": NUM_TOKENS, "ignore_eos": True, "logprobs": 3, "expert_load": True, "seed": 5}
# Greedy and drawn ones, with penalties and with a ban, longer and shorter than a block and than a step.
REQUESTS = [
    (tiny.prompt(length, seed=length), SamplingParams(**{**PARAMS, **more}))
    for length, more in [
        (1, {"temperature": 0.0}),
        (2, {"temperature": 0.7, "top_p": 0.8}),
        (3, {"temperature": 0.0, "repetition_penalty": 1.3}),
        (5, {"min_tokens": 3, "stop_token_ids": [9]}),
        (40, {"temperature": 0.0}),
        (75, {"top_k": 7}),
    ]
]


def broken(kind, folder, change):
    """A copy of the checkpoint in which `change` has written NaN."""
    shutil.copytree(tiny.cached(kind), folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


class Served:
    """An engine and its answers."""

    def __init__(self, model, ep_size):
        config = EngineConfig(
            model=str(model),
            dtype="float32",
            threads_per_rank=1,
            ep_size=ep_size,
            max_num_batched_tokens=64,
            max_model_len=128,
            kv_cache_memory_bytes=1_500_000,
        )
        self._engine = Engine(config, LocalLauncher())

    def __enter__(self):
        self._engine.__enter__()
        self.frontend = Frontend(self._engine.connect(), None)
        return self

    def __exit__(self, *error):
        self.frontend.close()
        self._engine.__exit__(*error)

    def answer(self, requests=REQUESTS):
        """Tokens, log-probabilities and expert load of each request, or its error; all at once."""
        ids = [self.frontend.submit(self.frontend.encode(prompt, params), params) for prompt, params in requests]
        tokens, prompts, rest = {i: [] for i in ids}, {}, {}
        while self.frontend.num_open:
            for update in self.frontend.poll(10.0):
                if update.error is not None:
                    rest[update.request_id] = update.error
                    continue
                if update.prompt_logprobs is not None:
                    prompts[update.request_id] = update.prompt_logprobs
                logprobs = update.logprobs or [None] * len(update.token_ids)
                tokens[update.request_id] += zip(update.token_ids, logprobs, strict=True)
                if update.finish_reason:
                    rest[update.request_id] = np.array(update.expert_load or [])
        return [(tokens[i], rest[i], prompts.get(i)) for i in ids]


def is_error(answer):
    return isinstance(answer[1], tuple)


def check(model, ep_size, clean, failing, capfd, layer):
    """The engine of a broken model answers all but the requests `failing` as `clean` does, again and again."""
    with Served(model, ep_size) as served:
        for _ in range(3):
            answers = served.answer()
            for i, (answer, expected) in enumerate(zip(answers, clean, strict=True)):
                if i in failing:
                    assert is_error(answer), i
                    assert answer[0] == expected[0][: len(answer[0])]
                    assert answer[1].code == "INTERNAL"
                    position = len(REQUESTS[i][0]) + len(answer[0])
                    assert f"the token at position {position} are not finite" in answer[1].message
                else:
                    assert not is_error(answer), (i, answer[1])
                    assert (answer[0], answer[2]) == (expected[0], expected[2])
        stats = served.frontend.stats()
        assert stats["non_finite"] == 3 * len(failing)
        assert not any(sum(used) for used in stats["blocks_used"].values())
    said = capfd.readouterr().err
    assert "are not finite; for the token at position" in said
    assert f"the first layer with such numbers in its cache is {layer}" in said


CASES = [*(pytest.param("mixtral", ranks, marks=pytest.mark.slow) for ranks in (1, 2)), ("qwen3_moe", 2)]


@functools.cache
def clean(kind):
    """Return the answers of an unchanged model; they are the same on any number of ranks."""
    with Served(tiny.cached(kind), 1) as served:
        return served.answer()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "ep_size"), CASES)
def test_an_embedding_that_is_nan(kind, ep_size, tmp_path, capfd):
    computed = [
        {*prompt, *(token for token, _ in answer[0][:-1])}
        for (prompt, _), answer in zip(REQUESTS, clean(kind), strict=True)
    ]
    token = next(t for t in REQUESTS[4][0] if not any(t in tokens for tokens in computed[:3]))
    failing = [i for i, tokens in enumerate(computed) if token in tokens]

    def change(weights):
        weights["model.embed_tokens.weight"][token] = float("nan")

    check(broken(kind, tmp_path / "broken", change), ep_size, clean(kind), failing, capfd, layer=0)


@pytest.mark.parametrize(("kind", "ep_size"), CASES)
def test_an_expert_that_is_nan(kind, ep_size, tmp_path, capfd):
    load = np.array([answer[1] for answer in clean(kind)])  # [requests, layers, experts]
    spared = np.where(load[:, :-1].sum(axis=(1, 2), keepdims=True) > 0, load[:, :-1] == 0, False).sum(axis=0)
    spared[load.sum(axis=0)[:-1] == 0] = 0  # nobody meets it
    layer, expert = np.unravel_index(spared.argmax(), spared.shape)
    failing = np.flatnonzero(load[:, layer, expert]).tolist()
    assert 0 < len(failing) < len(REQUESTS)

    def change(weights):
        names = [name for name in weights if f"layers.{layer}." in name and f"experts.{expert}." in name]
        assert len(names) == 3
        weights[names[0]][0, 0] = float("nan")

    check(broken(kind, tmp_path / "broken", change), ep_size, clean(kind), failing, capfd, layer=layer + 1)


def test_log_probabilities_that_are_nan(tmp_path):
    """A ban hides such a logit from the sampler, and from nobody who asks for log-probabilities."""
    prompt = tiny.prompt(20, seed=1)

    def change(weights):
        weights["lm_head.weight"][0] = float("nan")

    banned = {"max_tokens": 2, "temperature": 0.0, "min_tokens": 2, "stop_token_ids": [0]}
    asked = [SamplingParams(**banned, **more) for more in ({"prompt_logprobs": 2}, {}, {"logprobs": 0})]
    with Served(broken("mixtral", tmp_path / "broken", change), 1) as served:
        answers = served.answer([(prompt, params) for params in asked])
        assert served.frontend.stats()["non_finite"] == 2
    assert answers[0][1].message == "the logits for the token at position 1 are not finite (NaN or infinite), on rank 0"
    assert len(answers[1][0]) == 2, "the token with such a logit is banned, and nobody asked for more"
    assert (
        answers[2][1].message == "the logits for the token at position 20 are not finite (NaN or infinite), on rank 0"
    )
