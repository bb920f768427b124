"""Cascades over gRPC: what clients get, what is logged, and what is left after aborts. The engines have no model."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time
from pathlib import Path

import pytest

import expertwire
from expertwire.deploy.cascades import open_cascades
from expertwire.deploy.grpc.client import Client, ServerError
from expertwire.deploy.grpc.config import ServerConfig
from expertwire.engine.frontend.chat import Chat
from expertwire.strategies.cascade import Cascade, Router
from expertwire.strategies.cascade_log import reason_at
from expertwire.strategies.cascade_policy import cascade_to_json
from expertwire.strategies.decision_log import read_records

DEMO = Path(expertwire.__file__).with_name("demo_model")
MODELS = f"small={DEMO.with_name('demo_model_small')},large={DEMO}"
KEEP = Cascade(small="small", large="large", version="1", random_share=0.0)
POLICIES = {
    "keep": KEEP,
    "doubt": dataclasses.replace(KEEP, confidence_threshold=0.0),
    "route": dataclasses.replace(KEEP, router=Router(("numbers",), (0.0,), (1.0,), (-1.0,), 2.5), router_threshold=0.5),
    "draft": dataclasses.replace(KEEP, confidence_threshold=0.0, draft_tolerance=1e3, window=8),
    "both": dataclasses.replace(KEEP, confidence_threshold=0.0, random_share=1.0),
    "judge": dataclasses.replace(KEEP, verifier="has_five", verifier_threshold=0.5),
    "fail": dataclasses.replace(KEEP, verifier="fails", verifier_threshold=0.5),
}
VERIFIERS = """
from expertwire.strategies.verifiers import CountedScore

def has_five(candidates):
    return [CountedScore(float("5" in each.prompt and each.complete), num_tokens=9) for each in candidates]

VERIFIERS = {"has_five": has_five, "fails": lambda candidates: 1 / 0}
"""


def until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return tmp_path_factory.mktemp("log") / "decisions.jsonl"


@pytest.fixture(scope="module")
def address(log):
    module = log.with_name("verifiers.py")
    module.write_text(VERIFIERS)
    options = [
        "--strategies",
        str(module),
        "--models",
        MODELS,
        "--load-format",
        "mock",
        "--mock-step-time",
        "0.005",
        "--decision-log",
        str(log),
    ]
    for name, policy in POLICIES.items():
        path = log.with_name(f"{name}.json")
        path.write_text(cascade_to_json(policy))
        options += ["--cascade", f"{name}={path}"]
    command = [sys.executable, "-m", "expertwire.deploy.cli", "serve", "--port", "0", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        assert line.startswith("serving small, large on ")
        yield line.split()[-1]
    finally:
        process.terminate()
        assert process.wait(60) == 0
        process.stdout.close()


@pytest.fixture
def client(address):
    with Client(address) as client:
        yield client


def ask(client, model, prompt="SUM 1 2 ?", **options):
    generation = client.generate(prompt, model=model, **{"max_tokens": 40, "ignore_eos": True, "seed": 3} | options)
    chunks = list(generation)
    return [token for chunk in chunks for token in chunk.token_ids], generation


@pytest.mark.parametrize(
    ("name", "prompt", "model", "reason", "legs"),
    [
        ("keep", "SUM 1 2 ?", "small", "kept", ["small"]), ("doubt", "SUM 1 2 ?", "large", "confidence", ["small", "large"]),
        ("route", "SUM 1 2 ?", "small", "kept", ["small"]), ("route", "SUM 1 2 3 ?", "large", "router", ["large"]),
        ("both", "SUM 1 2 ?", "large", "confidence", ["small", "large"]), ("keep", [5, 6], "small", "kept", ["small"]),
        ("judge", "SUM 5 2 ?", "small", "kept", ["small"]), ("judge", "SUM 1 2 ?", "large", "verifier", ["small", "large"]),
        ("fail", "SUM 5 2 ?", "large", "verifier", ["small", "large"]),
    ],
)  # fmt: skip
def test_the_output_is_the_chosen_models_own(client, log, name, prompt, model, reason, legs):
    own, _ = ask(client, model, prompt)
    tokens, generation = ask(client, name, prompt)
    result = generation.cascade
    assert tokens == own
    assert (result.model, result.reason, [leg[0] for leg in result.legs]) == (model, reason, legs)
    assert (generation.usage.completion_tokens, generation.usage.seed) == (40, 3)
    if name == "doubt":
        assert result.legs[0][1] < 40, "the small model has gone on"
        assert not result.legs[0][2]
    if name == "both":
        assert result.in_random_slice
        assert [leg[1:3] for leg in result.legs] == [(40, True)] * 2
    until(lambda: log.stat().st_size and generation.request_id in log.read_text())
    [record] = [each for each in read_records(log)[0] if each.request_id == generation.request_id]
    assert (record.chosen, record.reason, reason_at(record, record.thresholds)) == (model, reason, reason)


PROMPTS = ("SUM 5 2 ?", "SUM 1 2 ?", "SUM 1 2 3 ?")


@pytest.fixture(scope="module")
def alone(address):
    """Return what `Generate` gives, by model or cascade and prompt."""
    asked = [(name, prompt) for name in POLICIES for prompt in PROMPTS]
    with Client(address) as client:
        return {key: ask(client, *key) for key in [*asked, ("", PROMPTS[0]), ("small", PROMPTS[0])]}


@pytest.mark.parametrize("name", ["keep", "doubt", "both"])
def test_a_chat_is_rendered_for_both_models(client, name):
    chat = Chat(messages=[{"role": "user", "content": "SUM 1 2"}], reasoning_effort="low")
    found, generation = ask(client, name, chat)
    expected, of_text = ask(client, name, "SUM 1 2 ?")
    assert found == expected
    assert generation.cascade.model == of_text.cascade.model
    with pytest.raises(ServerError, match="one of none, minimal, low, medium, high"):
        ask(client, name, dataclasses.replace(chat, reasoning_effort="very"))


@pytest.mark.parametrize("of", ["", "small", "judge"])
def test_sessions_give_what_generate_gives(client, alone, log, of):
    options = {"max_tokens": 40, "ignore_eos": True, "seed": 3}
    with client.session(model=of) as session:
        asked = {
            (name, prompt): session.submit(prompt, model=name, **options) for name in POLICIES for prompt in PROMPTS
        }
        asked[of, PROMPTS[0]] = session.submit(PROMPTS[0], **options)
        other = session.submit(PROMPTS[0], model="large", **options)
        tokens = {}
        for request, chunk in session:
            tokens.setdefault(request.key, []).extend(chunk.token_ids if chunk else ())
    for (name, prompt), request in asked.items():
        own, generation = alone[name, prompt]
        assert tokens[request.key] == own
        if name in POLICIES:
            mine, theirs = request.cascade, generation.cascade
            assert (mine.model, mine.reason, mine.in_random_slice) == (
                theirs.model,
                theirs.reason,
                theirs.in_random_slice,
            )
            assert request.usage.completion_tokens == request.usage.kept_tokens == 40
            until(lambda request=request: request.request_id in log.read_text())
        else:
            assert request.cascade is None
    assert "model must be that of the session" in str(other.error)


@pytest.mark.parametrize("by_name", [True, False])
def test_a_cascade_in_a_session_can_be_aborted_and_has_a_deadline(client, by_name):
    endless = {"max_tokens": 1900, "ignore_eos": True, "model": "both"}
    with client.session() as session:
        late = session.submit("SUM 1 ?", timeout_s=0.5, **endless)
        request = session.submit("SUM 1 ?", request_id=f"session {by_name}", **endless)
        other = session.submit("SUM 1 2 ?", max_tokens=10, ignore_eos=True)
        until(lambda: client.stats("large")["num_running"] == 2)
        if by_name:
            client.abort(request.request_id)
        else:
            session.abort(request)
        reasons = {}
        for each, chunk in session:
            reasons[each.key] = chunk.finish_reason if chunk else reasons.get(each.key)
    assert (request.error, reasons[request.key], request.cascade.reason) == (None, "abort", "aborted")
    assert (late.error.code, other.error) == ("DEADLINE_EXCEEDED", None)
    for model in ("small", "large"):
        until(lambda model=model: client.stats(model)["num_running"] == 0)


@pytest.mark.parametrize(
    ("name", "prompt", "verifier"),
    [
        ("keep", "SUM 1 ?", 0),
        ("both", "SUM 1 ?", 0),
        ("draft", "SUM 1 ?", 0),
        ("judge", "SUM 5 2 ?", 9),
        ("judge", "SUM 1 2 ?", 9),
    ],
)
def test_usage_has_the_tokens_of_both_models_and_of_the_verifier(client, name, prompt, verifier):
    def sampled():
        """Return the tokens sampled for requests, without those that came after an abort."""
        stats = [client.stats(model) for model in ("small", "large")]
        late = sum(each["groups"].get("tokens_late", 0) for each in stats)
        return sum(each["tokens_sampled"] - each["tokens_dropped"] for each in stats) - late

    def counted():
        return client.stats("small")["groups"].get("cascade_tokens_verifier", 0)

    until(lambda: not any(client.stats(model)["num_running"] for model in ("small", "large")))
    before, of_verifiers = sampled(), counted()
    usage = ask(client, name, prompt)[1].usage
    until(lambda: sampled() - before == usage.kept_tokens + usage.pruned_tokens)
    assert usage.kept_tokens == usage.completion_tokens == 40
    assert usage.verifier_tokens == verifier
    until(lambda: counted() - of_verifiers >= verifier)
    assert counted() - of_verifiers == verifier


def test_the_large_model_starts_from_the_draft(client, log):
    own, _ = ask(client, "small")
    tokens, generation = ask(client, "draft", logprobs=1)
    small, large = generation.cascade.legs
    assert generation.cascade.reason == "confidence"
    assert large.accepted_tokens == large.draft_tokens == small.tokens >= 8
    assert tokens[: large.accepted_tokens] == own[: large.accepted_tokens]
    usage = generation.usage
    assert (usage.completion_tokens, usage.kept_tokens, usage.cached_prompt_tokens) == (40, 40, 0)
    assert usage.pruned_tokens == small.tokens + large.tokens - 40
    until(lambda: generation.request_id in log.read_text())
    [record] = [each for each in read_records(log)[0] if each.request_id == generation.request_id]
    assert (record.draft_tolerance, record.legs[1].accepted_tokens) == (1e3, large.accepted_tokens)


@pytest.mark.parametrize("name", ["keep", "doubt", "both", "draft"])
@pytest.mark.parametrize("by_name", [True, False])
def test_what_is_cancelled_leaves_nothing(client, name, by_name):
    before = [client.stats(model)["tokens_sampled"] for model in ("small", "large")]
    generation = client.generate(
        "SUM 1 ?", model=name, max_tokens=1500, ignore_eos=True, request_id=f"{name} {by_name}"
    )
    chunks = iter(generation)
    if name in ("doubt", "draft"):
        next(chunks)  # of the large model
    else:
        until(lambda: client.stats("small")["tokens_sampled"] > before[0] + 3)
    if by_name:
        client.abort(generation.request_id)
        assert list(chunks)[-1].finish_reason == "abort"
        assert (generation.cascade.model, generation.cascade.reason) == ("", "aborted")
    else:
        generation.close()
    for model, sampled in zip(("small", "large"), before, strict=True):
        until(lambda model=model: client.stats(model)["num_running"] == 0)
        assert client.stats(model)["tokens_sampled"] - sampled < 1400


def test_a_deadline_ends_both_legs(client):
    with pytest.raises(ServerError, match="DEADLINE_EXCEEDED"):
        list(client.generate("SUM 1 ?", model="both", max_tokens=1900, ignore_eos=True, timeout_s=1.0))
    for model in ("small", "large"):
        until(lambda model=model: client.stats(model)["num_running"] == 0)


def test_statistics_and_names(client):
    assert client.models() == dict.fromkeys(("small", "large", *POLICIES), "")
    count = "cascade_escalated_confidence"
    before = client.stats("small")["groups"].get(count, 0)
    ask(client, "doubt")
    until(lambda: client.stats("small")["groups"].get(count, 0) > before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 2}, "n must be 1 for a cascade, got 2"), ({"prompt_logprobs": 1}, "prompt_logprobs must be unset for a cascade"),
        ({"strategy": "majority_vote:n=2,answer=boxed"}, "strategy must be unset for a cascade"),
        ({"max_tokens": -1}, "max_tokens"),
    ],
)  # fmt: skip
def test_requests_that_a_cascade_cannot_take_are_refused(client, arguments, message):
    with pytest.raises(ServerError, match=message) as raised:
        ask(client, "keep", **arguments)
    assert raised.value.code == "INVALID_ARGUMENT"


def test_queries_take_no_cascade(client):
    with pytest.raises(ServerError, match="model must be no cascade here"):
        client.model_info("keep")


@pytest.mark.parametrize(
    ("changed", "options", "message"),
    [
        ({}, {"cascade": ["keep"]}, "must be NAME=FILE"), ({}, {"cascade": ["small=FILE"]}, "another name than the models"),
        ({"large": "huge"}, {"cascade": ["keep=FILE"]}, "large must be one of the models small, large, got 'huge'"),
        ({"verifier_threshold": 0.5, "verifier": "one"}, {"cascade": ["keep=FILE"]}, r"strategies gives \(exact\), got 'one'"),
        ({"verifier_threshold": 0.5}, {"cascade": ["keep=FILE"]}, r"strategies gives \(exact\), got None"),
        ({}, {"cascade": ["keep=/no/such"]}, "/no/such cannot be read"),
        ({}, {"decision_log": "x"}, "--decision-log needs --cascade"),
    ],
)  # fmt: skip
def test_options_that_are_wrong_are_refused(tmp_path, changed, options, message):
    (tmp_path / "policy").write_text(cascade_to_json(dataclasses.replace(KEEP, **changed)))
    if "cascade" in options:
        options = {"cascade": [options["cascade"][0].replace("FILE", str(tmp_path / "policy"))]}
    with pytest.raises(ValueError, match=message):
        open_cascades(
            ServerConfig(**options), ["small", "large"], {"exact": lambda candidates: [1.0] * len(candidates)}
        )
