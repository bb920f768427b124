"""Requests with a strategy over gRPC, on an engine without a model: results, streams, ends of all kinds, statistics."""

from __future__ import annotations

import asyncio
import dataclasses

import grpc
import pytest
from helpers.conservation import conserved_tokens
from helpers.strategy_server import (
    DEMO,
    ENDLESS,
    FREE,
    HANGING,
    OPTIONS,
    PROMPT,
    STRATEGIES_TRIED,
    idle,
    most_tokens_even,
    named,
    outputs_of,
    serving,
    until,
)

import expertwire
from expertwire.deploy.grpc import group_loop
from expertwire.deploy.grpc.async_client import AsyncClient
from expertwire.deploy.grpc.client import Client, ServerError
from expertwire.deploy.grpc.client_messages import make_request
from expertwire.deploy.grpc.strategy_messages import from_strategy, to_options
from expertwire.deploy.proto import expertwire_v1_pb2 as pb
from expertwire.deploy.proto import expertwire_v1_pb2_grpc as pb_grpc
from expertwire.engine.frontend import group_branches, strategy_parts
from expertwire.strategies import (
    BestOfN,
    Bin,
    Budget,
)
from expertwire.strategies.registry import ANSWERS, STRATEGIES


@pytest.fixture(scope="module")
def server():
    with serving() as running:
        yield running


@pytest.fixture
def client(server):
    with Client(server["address"]) as client:
        yield client


@pytest.fixture(params=["at once", "aside"])
def computed(request, monkeypatch):
    """Compute small parts of strategies at once, or all of them beside the loop."""
    if request.param == "aside":
        monkeypatch.setattr(strategy_parts, "_SMALL", -1)


def error_of(client, strategy, **arguments):
    with pytest.raises(ServerError) as caught:
        list(client.generate(PROMPT, strategy=strategy, **{**FREE, **arguments}))
    return caught.value


def test_results_are_those_of_the_offline_api(client, computed):
    with expertwire.LLM(DEMO, **OPTIONS) as llm:
        params = expertwire.SamplingParams(seed=7, logprobs=1, **FREE)
        offline = {
            name: llm.generate([PROMPT], params, strategy=strategy, use_tqdm=False)[0]
            for name, strategy in STRATEGIES_TRIED.items()
        }
    for name, strategy in STRATEGIES_TRIED.items():
        wanted = offline[name]
        generation = client.generate(PROMPT, strategy=named(strategy), seed=7, logprobs=1, **FREE)
        chunks = list(generation)
        [best] = wanted.outputs
        assert {chunk.branch for chunk in chunks} == {best.index}
        assert [token for chunk in chunks for token in chunk.token_ids] == best.token_ids
        assert "".join(chunk.text for chunk in chunks) == best.text
        entries = [entry for chunk in chunks for entry in chunk.logprobs]
        assert [entry.keys() for entry in entries] == [entry.keys() for entry in best.logprobs]
        group = generation.group
        assert (group.selected, group.answer, group.reason) == (
            wanted.group.selected,
            wanted.group.answer,
            wanted.group.reason,
        )
        assert group.weights == wanted.group.weights
        for mine, other in zip(group.branches, wanted.group.branches, strict=True):
            assert (mine.index, mine.parent, mine.fate, mine.answer, mine.score) == (
                other.index,
                other.parent,
                other.fate,
                other.answer,
                other.score,
            )
        usage, tokens = generation.usage, wanted.group.tokens
        assert usage.kept_tokens + usage.pruned_tokens == usage.completion_tokens
        if name == "best":  # elsewhere it depends on the messages how much a pruned branch has
            assert (usage.kept_tokens, usage.pruned_tokens) == (tokens.kept, tokens.pruned)
        assert (usage.prompt_tokens, usage.seed) == (3, 7)
        assert 0 < usage.time_to_first_token_s <= usage.total_time_s


def test_all_branches_are_streamed_to_who_asks(client):
    strategy = {"strategy": "best_of_n", "n": 3, "verifier": "even"}
    generation = client.generate(PROMPT, strategy=strategy, all_branches=True, seed=1, **FREE)
    found = outputs_of(generation)
    assert sorted(found) == [0, 1, 2]
    assert [(len(tokens), reason) for tokens, _, reason in found.values()] == [(12, "length")] * 3
    assert [branch.num_tokens for branch in generation.group.branches] == [12] * 3
    alone = client.generate(PROMPT, seed=1, n=3, **FREE)
    assert outputs_of(alone) == found
    assert alone.group is None


def test_pruned_branches_end_with_abort(client):
    strategy = {"strategy": "first_k_finish", "n": 4, "budget": {"tokens": 30}}
    generation = client.generate(PROMPT, strategy=strategy, all_branches=True, **ENDLESS)
    found = outputs_of(generation)
    assert [reason for _, _, reason in found.values()] == ["abort"] * 4
    assert {index: len(tokens) for index, (tokens, _, _) in found.items()} == {
        branch.index: branch.num_tokens for branch in generation.group.branches
    }
    assert {branch.fate for branch in generation.group.branches} == {"pruned"}
    assert generation.usage.completion_tokens == sum(branch.num_tokens for branch in generation.group.branches)


def test_unary_and_async_calls(server):
    async def run():
        async with AsyncClient(server["address"]) as client:
            generation = client.generate(
                "SUM 1 2 ?", strategy="majority_vote:n=4,answer.type=whole_text", seed=3, **FREE
            )
            chunks = [chunk async for chunk in generation]
        async with grpc.aio.insecure_channel(server["address"]) as channel:
            request = make_request("SUM 1 2 ?", {"strategy": "majority_vote:n=4,answer=whole_text", "seed": 3, **FREE})
            return chunks, generation, await pb_grpc.InferenceStub(channel).GenerateUnary(request)

    chunks, generation, whole = asyncio.run(run())
    assert [chunk.branch for chunk in whole.chunks] == generation.group.selected == list(whole.group.selected)
    assert whole.chunks[0].text == "".join(chunk.text for chunk in chunks)
    assert len(whole.group.branches) == len(generation.group.branches) == 4
    assert whole.usage.kept_tokens == generation.usage.kept_tokens


def test_names_of_strategies_and_verifiers_are_told(client):
    info = client.model_info()
    assert list(info["strategies"]) == sorted([*STRATEGIES, "greedy", "twice"])
    assert list(info["verifiers"]) == ["even", "failing", "hanging"]


def test_a_strategy_of_the_server_s_own(client):
    generation = client.generate(PROMPT, strategy={"strategy": "twice", "label": "mine"}, **FREE)
    assert [len(tokens) for tokens, _, _ in outputs_of(generation).values()] == [12]
    assert generation.group.reason == "the longest of mine"
    error = error_of(client, {"strategy": "twice", "size": 3})
    assert (error.code, error.message) == ("INVALID_ARGUMENT", "strategy twice has the options label, got size")


@pytest.mark.parametrize("at_once", [5, 2])
def test_a_strategy_of_the_server_s_own_that_wants_too_many_branches(client, monkeypatch, at_once):
    monkeypatch.setattr(group_branches, "MAX_BRANCHES", 4)
    monkeypatch.setattr(group_branches, "MAX_STARTED", 8)
    error = error_of(client, {"strategy": "greedy", "at_once": at_once}, max_tokens=1)
    started = 0 if at_once == 5 else 8
    assert (error.code, error.message) == (
        "FAILED_PRECONDITION",
        f"the strategy Greedy asks for {at_once} branches more, where 0 run and {started} were started; "
        "at most 4 of a request may run at once, and 8 be started in all",
    )
    assert idle(client)


@pytest.mark.parametrize("way", ["cancel", "deadline", "abort", "vanish"])
def test_whatever_ends_a_group_frees_all_it_has(server, client, way, computed):
    strategy = {"strategy": "first_k_finish", "n": 6}
    with conserved_tokens(client.stats), Client(server["address"]) as other:
        timeout_s = 0.5 if way == "deadline" else None
        arguments = {"strategy": strategy, "all_branches": True, "request_id": way, "timeout_s": timeout_s}
        generation = other.generate(PROMPT, **arguments, **ENDLESS)
        chunks = iter(generation)
        next(chunks)
        assert client.stats()["num_running"] == 6
        if way == "cancel":
            generation.close()
        elif way == "deadline":
            with pytest.raises(ServerError, match="DEADLINE_EXCEEDED"):
                list(chunks)
        elif way == "abort":
            other.abort("abort")
            assert {chunk.finish_reason for chunk in chunks if chunk.finish_reason} == {"abort"}
            assert (generation.group.selected, generation.group.reason) == ([], "the request was aborted")
            assert generation.usage.pruned_tokens == generation.usage.completion_tokens > 0
        until(lambda: idle(client))


def test_a_group_that_waits_for_a_verifier_can_be_cancelled_and_has_a_deadline(server, client):
    with conserved_tokens(client.stats):
        HANGING.is_called.clear()
        strategy = {"strategy": "best_of_n", "n": 2, "verifier": "hanging"}
        generation = client.generate(PROMPT, strategy=strategy, request_id="stuck", **FREE)
        assert HANGING.is_called.wait(30)
        with pytest.raises(ServerError, match="ALREADY_EXISTS"):
            list(client.generate(PROMPT, strategy=strategy, request_id="stuck", **FREE))
        generation.close()
        late = {**strategy, "verifier_policy": {"timeout_s": 0.2, "on_failure": "zero"}}
        generation = client.generate(PROMPT, strategy=late, **FREE)
        assert list(outputs_of(generation)) == [0]
        assert [branch.score for branch in generation.group.branches] == [0.0, 0.0]
        assert "not answered in time" in generation.group.branches[0].problems[0]
        ends = {**strategy, "budget": {"seconds": 0.2}}
        generation = client.generate(PROMPT, strategy=ends, **FREE)
        assert list(outputs_of(generation)) == [0]
        HANGING.may_return.set()
    until(lambda: idle(client))


def test_failures_of_verifiers(client, computed):
    strategy = {"strategy": "best_of_n", "n": 2, "verifier": "failing"}
    with conserved_tokens(client.stats):
        error = error_of(client, strategy)
        assert error.code == "INTERNAL"
        assert "no result" in error.message
        error = error_of(client, {**strategy, "verifier_policy": {"on_failure": "error"}})
    assert (error.code, error.message) == ("INTERNAL", "the verifier has raised RuntimeError: out of order")


MISTAKES = [
    ({"strategy": "best_of_n", "verifier": "even"}, {}, "strategy best_of_n needs the options n; n must be given"),
    ({"strategy": "best_of_n", "n": 0, "verifier": "even"}, {}, "n must be an integer >= 1, got 0"),
    (
        {"strategy": "best_of_n", "n": 3, "verifier": "odd"},
        {},
        "verifier must be one of: even, failing, hanging; got 'odd'",
    ),
    ({"strategy": "magic"}, {}, "strategy must be one of adaptive_consistency, auto, "),
    ("majority_vote:n=2", {}, "strategy majority_vote needs the options n, answer; answer must be given"),
    ("majority_vote:n=2,answer.type=regex", {}, "answer needs the options pattern; pattern must be given"),
    ("majority_vote:n=2,answer=boxed", {"n": 2}, "n must be 1 with a strategy"),
]


@pytest.mark.parametrize(("strategy", "arguments", "message"), MISTAKES)
def test_mistakes_name_the_field(client, strategy, arguments, message):
    error = error_of(client, strategy, **arguments)
    assert error.code == "INVALID_ARGUMENT"
    assert error.message.startswith(message)


def test_the_output_of_a_group_is_bounded_as_that_of_a_request(server, client):
    frontend = server["frontend"]
    plain, frontend.model_info = frontend.model_info, dataclasses.replace(frontend.model_info, max_model_len=10**6)
    try:
        error = error_of(client, "first_k_finish:n=100", max_tokens=200_000)
    finally:
        frontend.model_info = plain
    assert error.code == "INVALID_ARGUMENT"
    assert error.message.startswith("n x max_tokens x (1 + logprobs) must be at most 16777216, got 100 x 200000 x 1")


def test_only_so_many_groups_run_at_once(client, monkeypatch):
    monkeypatch.setattr(group_loop, "MAX_GROUPS", 1)
    first = client.generate(PROMPT, strategy="first_k_finish:n=2", all_branches=True, **ENDLESS)
    chunks = iter(first)
    next(chunks)
    error = error_of(client, "first_k_finish:n=2")
    assert (error.code, error.retry_after_s) == ("RESOURCE_EXHAUSTED", 1.0)
    assert "at most 1 may" in error.message
    first.close()
    until(lambda: idle(client))
    assert outputs_of(client.generate(PROMPT, strategy="first_k_finish:n=2", **FREE))


def test_empty_messages_are_mistakes(server):
    with grpc.insecure_channel(server["address"]) as channel:
        stub = pb_grpc.InferenceStub(channel)
        for strategy, message in (
            (pb.Strategy(), "strategy must have one of adaptive_consistency, auto"),
            (pb.Strategy(majority_vote=pb.MajorityVote(n=2, answer=pb.Answer())), "answer must have one of boxed"),
            (pb.Strategy(custom=pb.CustomStrategy(name="twice", options="[1]")), "options must be a JSON object"),
            (
                pb.Strategy(sequential_revision=pb.SequentialRevision(revisions=1, text="a" * 5000)),
                "text must have at most 4096 characters",
            ),
            (pb.Strategy(first_k_finish=pb.FirstKFinish(n=100_000)), "n must be at most 256"),
            (
                pb.Strategy(compute_optimal=pb.ComputeOptimal(table=[pb.Bin(strategy=pb.Strategy(all_branches=True))])),
                "all_branches must be unset in a table",
            ),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                stub.GenerateUnary(pb.GenerateRequest(text="a", strategy=strategy))
            assert caught.value.code().name == "INVALID_ARGUMENT"
            assert caught.value.details().startswith(message)


def test_the_server_drains_when_its_groups_have_ended():
    with serving() as running, Client(running["address"]) as client:
        generation = client.generate(PROMPT, strategy="first_k_finish:n=2", max_tokens=300, ignore_eos=True)
        until(lambda: client.stats()["num_running"])
        running["loop"].call_soon_threadsafe(running["stop"].set)
        assert len(outputs_of(generation)) == 1
        assert generation.usage.completion_tokens >= 300


def test_messages_have_the_options_of_every_strategy():
    kinds = {field.name: field.message_type for field in pb.Strategy.DESCRIPTOR.oneofs_by_name["kind"].fields}
    assert kinds.keys() == {*STRATEGIES, "custom"}
    answers = {field.name: field.message_type for field in pb.Answer.DESCRIPTOR.fields}
    assert answers.keys() == ANSWERS.keys()
    records = {"budget": (Budget, pb.Budget.DESCRIPTOR), "bin": (Bin, pb.Bin.DESCRIPTOR)}
    classes = [(STRATEGIES[name], kinds[name]) for name in STRATEGIES]
    classes += [(ANSWERS[name], answers[name]) for name in ANSWERS]
    for kind, message in [*classes, *records.values()]:
        options = {field.name for field in dataclasses.fields(kind) if field.init}
        assert set(message.fields_by_name) == options, message.name
        assert all(field.has_presence for field in message.fields if field.name != "table"), message.name


def test_strategies_arrive_as_they_were_sent():
    for strategy in (
        named(STRATEGIES_TRIED["table"]),
        {"strategy": "beam_search", "n": 8, "width": 4, "verifier": "even", "max_steps": 3, "step_text": "\n"},
        {"strategy": "twice", "budget": {"tokens": 8}, "label": "é"},
        "majority_vote:n=2,answer=boxed,budget.tokens=0,stop_when_decided=false",
    ):
        message = pb.Strategy.FromString(from_strategy(strategy).SerializeToString())
        assert from_strategy(to_options(message)) == message
    assert to_options(message) == {
        "strategy": "majority_vote", "n": 2, "answer": {"type": "boxed"}, "budget": {"tokens": 0}, "stop_when_decided": False,
    }  # fmt: skip


def test_the_client_refuses_what_no_message_has():
    for strategy, message in (
        ({"n": 2}, "strategy must have its name"),
        ({"strategy": "best_of_n", "size": 2}, "strategy best_of_n has the options n, verifier, score"),
        ({"strategy": "best_of_n", "n": "two"}, "strategy best_of_n: n cannot be 'two'"),
        (BestOfN(2, verifier=most_tokens_even), "verifier must be a name"),
        (3, "strategy must be a strategy"),
        ({"strategy": "mine", "f": print}, "must be JSON values"),
    ):
        with pytest.raises(ValueError, match=message):
            from_strategy(strategy)
    with pytest.raises(ValueError, match="all_branches needs a strategy"):
        make_request("a", {"all_branches": True})
