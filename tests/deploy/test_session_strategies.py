"""Requests with a strategy in a `Session`: the results of `Generate`, beside plain requests, and ends of all kinds."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest
from helpers.strategy_server import (
    ENDLESS,
    FREE,
    HANGING,
    PROMPT,
    STRATEGIES_TRIED,
    counted,
    idle,
    named,
    outputs_of,
    serving,
    until,
)

from expertwire.deploy.grpc import session
from expertwire.deploy.grpc.async_client import AsyncClient
from expertwire.deploy.grpc.client import Client

BOTH = {"strategy": "best_of_n", "n": 3, "verifier": "even"}


@pytest.fixture(scope="module")
def server():
    with serving() as running:
        yield running


@pytest.fixture
def client(server):
    with Client(server["address"]) as client:
        yield client


def generated(client, **arguments):
    """Return what `Generate` gives: outputs by branch, and the call."""
    generation = client.generate(PROMPT, **arguments)
    return outputs_of(generation), generation


def taken(session):
    """Return what comes of a session's requests, by key, as `outputs_of` says it."""
    chunks = {}
    for request, chunk in session:
        chunks.setdefault(request.key, [])
        if chunk is not None:
            chunks[request.key].append(chunk)
    return {key: outputs_of(some) for key, some in chunks.items()}


def group_of(request):
    """The group's result without what depends on the messages: how much a pruned branch has."""
    group = request.group
    branches = [(each.index, each.parent, each.fate, each.answer, each.score) for each in group.branches]
    return group.selected, group.answer, group.weights, group.reason, branches


def without_times(usage, name):
    same = {"prompt_tokens", "seed", "cached_prompt_tokens", "reasoning_tokens"}
    same |= {"completion_tokens", "kept_tokens", "pruned_tokens", "verifier_tokens"} if name == "best" else set()
    return {field: value for field, value in dataclasses.asdict(usage).items() if field in same}


def test_results_are_those_of_generate(client):
    plain = {"seed": 7, "logprobs": 1, "prompt_logprobs": 1, **FREE}
    wanted = {name: generated(client, strategy=named(each), **plain) for name, each in STRATEGIES_TRIED.items()}
    wanted["all"] = generated(client, strategy=BOTH, all_branches=True, **plain)
    wanted["none"] = generated(client, n=2, **plain)
    with client.session() as session:
        asked = {name: session.submit(PROMPT, strategy=named(each), **plain) for name, each in STRATEGIES_TRIED.items()}
        asked["all"] = session.submit(PROMPT, strategy=BOTH, all_branches=True, **plain)
        asked["none"] = session.submit(PROMPT, n=2, **plain)
        found = taken(session)
    for name, request in asked.items():
        outputs, generation = wanted[name]
        assert found[request.key] == outputs
        assert request.prompt_logprobs == generation.prompt_logprobs
        assert len(request.prompt_logprobs) == len(PROMPT)
        assert without_times(request.usage, name) == without_times(generation.usage, name)
        if name == "none":
            assert request.group is generation.group is None
        else:
            assert group_of(request) == group_of(generation)


def test_many_results_of_branches_come_in_parts(client, monkeypatch):
    monkeypatch.setattr("expertwire.deploy.grpc.group_stream._MESSAGE_BRANCHES", 2)
    monkeypatch.setattr(session, "MESSAGE_SIZE", 1)  # tokens and results in a message
    arguments = {"strategy": "first_k_finish:n=7,k=7,answer=whole_text", "seed": 1, **FREE}
    _, generation = generated(client, **arguments)
    with client.session() as calls:
        requests = [calls.submit(PROMPT, **arguments) for _ in range(3)]
        taken(calls)
    for request in requests:
        assert [branch.index for branch in request.group.branches] == list(range(7))
        assert group_of(request) == group_of(generation)


def test_token_ids_only(client):
    outputs, generation = generated(client, strategy=BOTH, seed=2, **FREE)
    with client.session(token_ids_only=True) as session:
        with_group, plain = session.submit(PROMPT, strategy=BOTH, seed=2, **FREE), session.submit(PROMPT, **FREE)
        found = taken(session)
    assert found[with_group.key] == {branch: (tokens, "", reason) for branch, (tokens, _, reason) in outputs.items()}
    assert group_of(with_group) == group_of(generation)
    assert len(found[plain.key][0][0]) == FREE["max_tokens"]


def test_asyncio_clients_have_it_too(server):
    async def run():
        async with AsyncClient(server["address"]) as client, client.session() as session:
            request = session.submit(PROMPT, strategy=BOTH, seed=2, **FREE)
            chunks = [chunk async for _, chunk in session if chunk is not None]
            return request, outputs_of(chunks)

    request, found = asyncio.run(run())
    with Client(server["address"]) as client:
        outputs, generation = generated(client, strategy=BOTH, seed=2, **FREE)
    assert found == outputs
    assert group_of(request) == group_of(generation)


@pytest.mark.parametrize("way", ["abort", "abort by name", "deadline", "close"])
def test_whatever_ends_a_group_frees_all_it_has(client, way):
    before = counted(client)
    strategy = {"strategy": "first_k_finish", "n": 6}
    with client.session() as session:
        deadline_s = 0.5 if way == "deadline" else None
        arguments = {"strategy": strategy, "all_branches": True, "request_id": way, "timeout_s": deadline_s}
        request = session.submit(PROMPT, **arguments, **ENDLESS)
        other = session.submit(PROMPT, max_tokens=300, ignore_eos=True)
        until(lambda: client.stats()["num_running"] == 7)
        if way == "abort":
            session.abort(request)
        elif way == "abort by name":
            client.abort(way)
        if way != "close":
            found = taken(session)
            assert len(found[other.key][0][0]) == 300
    if way.startswith("abort"):
        assert {reason for _, _, reason in found[request.key].values()} == {"abort"}
        assert (request.group.selected, request.group.reason) == ([], "the request was aborted")
        assert request.usage.pruned_tokens == request.usage.completion_tokens > 0
    elif way == "deadline":
        assert request.error.code == "DEADLINE_EXCEEDED"
    until(lambda: idle(client))
    after = counted(client)
    # `counted` knows groups, so the plain request's tokens are missing on its side.
    plain = 300 if way != "close" else after[1] - before[1] - (after[0] - before[0])
    assert after[0] - before[0] + plain == after[1] - before[1] > plain


def test_errors_end_their_request_alone(client):
    HANGING.is_called.clear()
    with client.session() as session:
        failing = session.submit(PROMPT, strategy={**BOTH, "verifier": "failing"}, **FREE)
        wrong = session.submit(PROMPT, strategy={**BOTH, "verifier": "nobody"}, **FREE)
        both = session.submit(PROMPT, strategy=BOTH, n=2, **FREE)
        stuck = session.submit(PROMPT, strategy={**BOTH, "verifier": "hanging"}, request_id="stuck", **FREE)
        right = session.submit(PROMPT, strategy=BOTH, **FREE)
        assert HANGING.is_called.wait(30)
        again = session.submit(PROMPT, strategy=BOTH, request_id="stuck", **FREE)
        for request, chunk in session:
            if request is again and chunk is None:
                session.abort(stuck)
        HANGING.may_return.set()
    assert (failing.error.code, wrong.error.code, again.error.code) == (
        "INTERNAL", "INVALID_ARGUMENT", "ALREADY_EXISTS",
    )  # fmt: skip
    assert "no result" in failing.error.message
    assert "verifier must be one of: even, failing, hanging; got 'nobody'" in wrong.error.message
    assert "n must be 1 with a strategy" in both.error.message
    assert right.error is stuck.error is None
    assert stuck.group.reason == "the request was aborted"
    until(lambda: idle(client))


def test_credits_and_strategies_do_not_mix(client):
    with client.session(window_tokens=16) as session:
        request = session.submit(PROMPT, strategy=BOTH, **FREE)
        plain = session.submit(PROMPT, **FREE)
        taken(session)
    assert request.error.code == "INVALID_ARGUMENT"
    assert request.error.message.startswith("strategy must be unset, and model no cascade")
    assert plain.error is None
