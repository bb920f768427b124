"""Sessions of both Python clients against a real server on an engine without a model."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import pytest

import expertwire
from expertwire.deploy import runtime
from expertwire.deploy.grpc import client_session, session
from expertwire.deploy.grpc.async_client import AsyncClient
from expertwire.deploy.grpc.client import Client, ServerError
from expertwire.deploy.grpc.server import Server
from expertwire.deploy.proto import expertwire_v1_pb2 as pb
from expertwire.engine.config.engine_config import EngineConfig
from expertwire.engine.engine import Engine
from expertwire.engine.frontend.frontend import Frontend

DEMO = str(Path(expertwire.__file__).with_name("demo_model"))
PROMPTS = [[5, 6, 7], [8, 9], list(range(3, 60))]


@pytest.fixture(scope="module")
def engine():
    config = EngineConfig(model=DEMO, load_format="mock", ep_size=1, max_num_seqs=8)
    with Engine(config, runtime.make_launcher(config)) as engine:
        yield engine


class SyncAsAsync:
    """A sync session with the interface of one for asyncio: every call is made in a thread."""

    def __init__(self, client, options):
        self.session = client.session(**options)
        self.submit, self.abort, self.grant = self.session.submit, self.session.abort, self.session.grant

    async def __aiter__(self):
        updates = iter(self.session)
        while (update := await asyncio.to_thread(next, updates, None)) is not None:
            yield update

    async def close(self):
        self.session.close()


@pytest.fixture(params=["sync", "async"])
def run(request, engine):
    """Runs `scenario(open_session, frontend)` beside a server."""

    async def serve(scenario, retries):
        server, stop = Server("127.0.0.1", 0), asyncio.Event()
        address = f"127.0.0.1:{server.port}"
        with contextlib.closing(Frontend(engine.connect(), runtime.Tokenizer.open(DEMO))) as frontend:
            serving = asyncio.ensure_future(server.serve(frontend, stop=stop, drain_timeout_s=5.0))
            sessions = []
            client = (
                AsyncClient(address, retries=retries) if request.param == "async" else Client(address, retries=retries)
            )

            def open_session(**options):
                make = client.session(**options) if request.param == "async" else SyncAsAsync(client, options)
                sessions.append(make)
                return make

            try:
                await scenario(open_session, frontend)
                for each in sessions:
                    await each.close()
                while frontend.num_open:  # what still ran was aborted
                    await asyncio.sleep(0.01)
            finally:
                closing = client.close()
                if closing is not None:
                    await closing
                stop.set()
                await serving

    return lambda scenario, retries=0: asyncio.run(asyncio.wait_for(serve(scenario, retries), 60))


async def collect(opened):
    """Return tokens and text by key and branch, and the requests that have ended."""
    tokens, texts, ended = {}, {}, []
    async for request, chunk in opened:
        if chunk is None:
            ended.append(request)
            continue
        at = request.key, chunk.branch
        tokens.setdefault(at, []).extend(chunk.token_ids)
        texts[at] = texts.get(at, "") + chunk.text
    return tokens, texts, ended


def test_requests_of_a_session_are_those_of_generate(run):
    async def scenario(open_session, frontend):
        opened = open_session()
        asked = {"max_tokens": 6, "seed": 3, "ignore_eos": True, "n": 2, "logprobs": 1, "prompt_logprobs": 1}
        requests = [opened.submit(prompt, **asked) for prompt in PROMPTS]
        tokens, texts, ended = await collect(opened)
        assert {request.key for request in ended} == {request.key for request in requests}
        assert tokens.keys() == {(request.key, branch) for request in requests for branch in range(2)}
        assert all(len(each) == 6 for each in tokens.values())
        for request, prompt in zip(requests, PROMPTS, strict=True):
            assert (request.is_done, request.error) == (True, None)
            assert (request.usage.prompt_tokens, request.usage.completion_tokens) == (len(prompt), 12)
            assert len(request.prompt_logprobs) == len(prompt)
        assert texts[1, 0] == frontend.tokenizer.decode(tokens[1, 0])
        # A session goes on after its requests have ended.
        again = opened.submit(PROMPTS[0], **asked)
        more, _, _ = await collect(opened)
        assert [more[again.key, branch] for branch in range(2)] == [tokens[1, branch] for branch in range(2)]

    run(scenario)


def test_chunks_have_what_they_have_elsewhere(run):
    async def scenario(open_session, frontend):
        opened = open_session()
        opened.submit("Once", max_tokens=4, seed=1, ignore_eos=True, logprobs=2)
        chunks = [chunk async for _, chunk in opened if chunk is not None]
        assert sum(len(chunk.logprobs) for chunk in chunks) == 4
        assert [chunk.finish_reason for chunk in chunks][-1] == "length"
        text = "".join(chunk.text for chunk in chunks)
        opened.submit("Once", max_tokens=4, seed=1, ignore_eos=True, stop=[text[1:3]])
        last = [chunk async for _, chunk in opened if chunk is not None][-1]
        assert (last.finish_reason, last.stop_reason) == ("stop", text[1:3])

    run(scenario)


def test_errors_are_those_of_their_request(run):
    async def scenario(open_session, frontend):
        opened = open_session(token_ids_only=True)
        wrong = opened.submit([10**6], max_tokens=4)
        right = opened.submit([5], max_tokens=4, ignore_eos=True)
        tokens, texts, _ = await collect(opened)
        assert (wrong.error.code, wrong.usage, right.error) == ("INVALID_ARGUMENT", None, None)
        assert len(tokens[right.key, 0]) == 4
        assert texts[right.key, 0] == ""
        with pytest.raises(ValueError, match="nonsense"):
            opened.submit([5], nonsense=1)
        late = opened.submit([5], timeout_s=0.2, max_tokens=100_000_000, ignore_eos=True)
        await collect(opened)
        assert late.error.code in ("DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "INVALID_ARGUMENT")

    run(scenario)


def test_credits_and_aborts(run):
    async def scenario(open_session, frontend):
        opened = open_session(window_tokens=16)
        held, other = (opened.submit([5], max_tokens=400, ignore_eos=True) for _ in range(2))
        got = {held.key: 0, other.key: 0}
        async for request, chunk in opened:
            if chunk is not None:
                got[request.key] += len(chunk.token_ids)
                if request is other:
                    opened.grant(other, len(chunk.token_ids))
            else:
                break
        assert (request, got) == (other, {held.key: 16, other.key: 400})
        opened.grant(held, 4)
        async for _, chunk in opened:
            got[held.key] += len(chunk.token_ids)
            if got[held.key] == 20:
                break
        opened.abort(held)
        reasons = [chunk.finish_reason async for _, chunk in opened if chunk is not None]
        assert reasons == ["abort"]
        assert held.is_done and held.usage.completion_tokens == 20

    run(scenario)


@pytest.mark.parametrize("retries", [0, 4])
def test_a_refused_request_is_tried_again(run, monkeypatch, retries):
    monkeypatch.setattr(session, "MAX_REQUESTS", 2)

    async def scenario(open_session, frontend):
        opened = open_session()
        requests = [opened.submit([5], max_tokens=8, ignore_eos=True) for _ in range(6)]
        tokens, _, ended = await collect(opened)
        assert len(ended) == 6
        refused = [request for request in requests if request.error is not None]
        assert {request.error.code for request in refused} <= {"RESOURCE_EXHAUSTED"}
        assert bool(refused) == (retries == 0)
        assert tokens.keys() == {(request.key, 0) for request in requests if request.error is None}

    run(scenario, retries)


def test_a_session_that_fails_raises(run):
    async def scenario(open_session, frontend):
        opened = open_session(window_tokens=3)
        opened.submit([5], max_tokens=8)
        for _ in range(2):
            with pytest.raises(ServerError, match="INVALID_ARGUMENT: window_tokens must be 0 or at least 16, got 3"):
                await collect(opened)

    run(scenario)


def test_a_wait_that_is_given_up_loses_nothing(run):
    async def scenario(open_session, frontend):
        opened = open_session(window_tokens=16)
        request = opened.submit([5], max_tokens=32, ignore_eos=True)
        got = 0
        async for _, chunk in opened:
            got += len(chunk.token_ids)
            if got == 16:
                break
        if isinstance(opened, client_session.AsyncClientSession):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(anext(aiter(opened)), 0.1)
        opened.grant(request, 16)
        tokens, _, _ = await collect(opened)
        assert got + len(tokens[request.key, 0]) == 32

    run(scenario)


def test_a_session_that_is_closed_ends_who_waits(run):
    async def scenario(open_session, frontend):
        opened = open_session(window_tokens=16)
        opened.submit([5], max_tokens=32, ignore_eos=True)
        waiting = asyncio.create_task(collect(opened))
        while not frontend.num_open:
            await asyncio.sleep(0.01)
        await opened.close()
        with pytest.raises(ServerError, match="CANCELLED"):
            await waiting

    run(scenario)


def end(code, **fields):
    return pb.SessionEnd(key=1, code=code, message="m", **fields)


def test_the_time_before_another_try():
    make = lambda timeout_s=None: client_session.SubmittedRequest(pb.SubmitRequest(key=1), timeout_s)  # noqa: E731
    busy, gone = 8, 14  # RESOURCE_EXHAUSTED, UNAVAILABLE
    assert make().end(end(busy, retry_after_s=7.5), retries=1) == 7.5
    request = make()
    waits = [request.end(end(busy), retries=3) for _ in range(4)]
    assert [round(wait / 0.2) in allowed for wait, allowed in zip(waits[:3], ({1}, {2}, {3, 4, 5}), strict=True)] == [
        True
    ] * 3
    assert waits[3] is None
    assert request.error.code == "RESOURCE_EXHAUSTED"
    assert make().end(end(gone), retries=3) is None
    late = make(timeout_s=5.0)
    assert late.end(end(busy, retry_after_s=7.5), retries=1) is None
    assert late.error.retry_after_s == 7.5
    begun = make()
    begun.add_entry(pb.Chunk(token_ids=[1]), pb.SessionDetails())
    assert begun.end(end(busy, retry_after_s=0.1), retries=1) is None


def test_small_messages_are_joined_and_large_ones_are_not():
    state = client_session._State(pb.SessionOptions(), 0)
    for count in [10] * 100 + [60_000] * 2 + [10]:
        state.waiting.append(state.submit([5] * count, None, {}).message())
    sizes = []
    while state.waiting:
        sizes.append(state.next_message().ByteSize())
    assert len(sizes) == 3
    assert max(sizes) < 128 << 10
