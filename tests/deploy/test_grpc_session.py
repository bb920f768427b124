"""`Session`: many requests in one call, against the real frontend, controller and scheduler, and ranks without a model."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
from collections import defaultdict
from pathlib import Path

import grpc
import pytest

import expertwire
from expertwire.deploy import runtime
from expertwire.deploy.grpc import session
from expertwire.deploy.grpc.server import Server
from expertwire.deploy.proto import expertwire_v1_pb2 as pb
from expertwire.deploy.proto import expertwire_v1_pb2_grpc as pb_grpc
from expertwire.engine.config.engine_config import EngineConfig
from expertwire.engine.engine import Engine
from expertwire.engine.frontend.frontend import Frontend

DEMO = str(Path(expertwire.__file__).with_name("demo_model"))
CODES = {code.value[0]: code.name for code in grpc.StatusCode}


@pytest.fixture(scope="module")
def engine():
    config = EngineConfig(model=DEMO, load_format="mock", ep_size=2, max_num_seqs=8)
    with Engine(config, runtime.make_launcher(config)) as engine:
        yield engine


def scenario(function):
    """Makes an async test with a `Run` argument into a pytest function."""

    def test(engine):
        asyncio.run(asyncio.wait_for(_run(function, engine), 60))

    test.__doc__ = function.__doc__
    return test


class Run:
    """A server over a frontend of its own, and a client's channel."""

    def __init__(self, frontend, channel):
        self.frontend, self.channel = frontend, channel
        self.stub = pb_grpc.InferenceStub(channel)

    def session(self, **options):
        return Client(self.stub.Session(), options)

    async def until_idle(self):
        while self.frontend.num_open:
            await asyncio.sleep(0.005)

    async def stats(self):
        return dict((await self.stub.GetStats(pb.GetStatsRequest())).values)


async def _run(function, engine):
    server, stop = Server("127.0.0.1", 0), asyncio.Event()
    with contextlib.closing(Frontend(engine.connect(), runtime.Tokenizer.open(DEMO))) as frontend:
        serving = asyncio.ensure_future(server.serve(frontend, stop=stop, drain_timeout_s=5.0))
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
                await function(Run(frontend, channel))
            stop.set()
            await serving
        finally:
            serving.cancel()


class Client:
    """The client's end of a session: what came, by key and branch."""

    def __init__(self, call, options):
        self.call, self.options = call, pb.SessionOptions(**options)
        self.is_first = True
        self.tokens, self.texts = defaultdict(list), defaultdict(str)
        self.finish, self.details = {}, defaultdict(list)
        self.ends = {}
        self.sizes = []  # tokens of each message

    async def send(self, *requests, **fields):
        """Send requests, each (key, GenerateRequest, seconds until its deadline if it has one), and other fields."""
        submits = [
            pb.SubmitRequest(key=key, request=request, deadline_s=deadline[0] if deadline else None)
            for key, request, *deadline in requests
        ]
        message = pb.SessionRequest(**fields)
        message.requests.extend(submits)
        if self.is_first:
            message.options.CopyFrom(self.options)
            self.is_first = False
        await self.call.write(message)

    async def read(self):
        """Read a message; False at the end."""
        message = await self.call.read()
        if message is grpc.aio.EOF:
            return False
        keys = list(zip(message.keys, message.branches, strict=True))
        at = 0
        for place, (entry, count) in enumerate(zip(keys, message.num_tokens, strict=True)):
            self.tokens[entry] += message.token_ids[at : at + count]
            at += count
            if message.texts:
                self.texts[entry] += message.texts[place]
            if message.finish_reasons[place]:
                assert entry not in self.finish
                self.finish[entry] = message.finish_reasons[place]
        assert at == len(message.token_ids)
        for details in message.details:
            self.details[keys[details.entry]].append(details)
        for end in message.ends:
            assert end.key not in self.ends
            self.ends[end.key] = end
        self.sizes.append(at)
        return True

    async def read_until(self, condition):
        while not condition():
            assert await self.read(), "the session has ended"

    async def finish_all(self):
        """Say that no request follows, and read until the call ends."""
        await self.call.done_writing()
        while await self.read():
            pass

    def error(self, key):
        return CODES[self.ends[key].code], self.ends[key].message


def request(text="What is 1 + 1?", **sampling):
    values = {"max_tokens": 20, "seed": 7, "ignore_eos": True, **sampling}
    return pb.GenerateRequest(text=text, sampling_params=pb.SamplingParams(**values))


REQUESTS = {
    1: request(seed=1, max_tokens=50),
    2: request(seed=2, n=3, ignore_eos=False, max_tokens=200),
    3: request("A much longer prompt, in order to be another one.", seed=3, logprobs=2, prompt_logprobs=1),
    4: request(seed=1, stop=[" ", "e"], max_tokens=200),
    5: request(seed=5, stop_token_ids=[20, 21, 22, 23, 24, 25], max_tokens=200),
    6: request(seed=6, expert_load=True),
}


async def generated(run, message):
    """The answer of `Generate`, as `Client` keeps it."""
    tokens, texts, finish, details, usage = (
        defaultdict(list),
        defaultdict(str),
        {},
        defaultdict(pb.SessionDetails),
        None,
    )
    async for part in run.stub.Generate(message):
        details[0].prompt_logprobs.extend(part.prompt_logprobs)
        for chunk in part.chunks:
            tokens[chunk.branch] += chunk.token_ids
            texts[chunk.branch] += chunk.text
            details[chunk.branch].MergeFrom(pb.SessionDetails(logprobs=chunk.logprobs, expert_load=chunk.expert_load))
            if chunk.WhichOneof("stop_reason") == "stop_string":
                details[chunk.branch].stop_string = chunk.stop_string
            elif chunk.WhichOneof("stop_reason"):
                details[chunk.branch].stop_token_id = chunk.stop_token_id
            if chunk.finish_reason:
                finish[chunk.branch] = chunk.finish_reason
        if part.HasField("usage"):
            usage = part.usage
    return tokens, texts, finish, details, usage


def joined(parts):
    """The details of one branch, joined."""
    whole = pb.SessionDetails()
    for part in parts:
        whole.MergeFrom(part)
    whole.entry = 0
    return whole


def without_times(usage):
    return pb.Usage(prompt_tokens=usage.prompt_tokens, completion_tokens=usage.completion_tokens, seed=usage.seed)


@scenario
async def test_it_answers_what_generate_does(run):
    client = run.session()
    await client.send(*REQUESTS.items())
    await client.finish_all()
    assert sorted(client.ends) == sorted(REQUESTS)
    for key, message in REQUESTS.items():
        tokens, texts, finish, details, usage = await generated(run, message)
        for branch in range(message.sampling_params.n or 1):
            entry = key, branch
            assert client.tokens[entry] == tokens[branch]
            assert client.texts[entry] == texts[branch]
            assert client.finish[entry] == finish[branch]
            assert joined(client.details[entry]) == details[branch]
        assert without_times(client.ends[key].usage) == without_times(usage)
        assert not client.ends[key].code


@scenario
async def test_the_effort_of_a_chat_sets_the_budget(run):
    """The template of the demo model does not read it."""
    given, submit = [], run.frontend.submit
    run.frontend.submit = lambda tokens, params, *more, **fields: (
        given.append(params) or submit(tokens, params, *more, **fields)
    )
    chat = pb.Chat(messages='[{"role": "user", "content": "SUM 1 2"}]', reasoning_effort="medium")
    client = run.session()
    own = [pb.SamplingParams(max_tokens=30), pb.SamplingParams(max_tokens=30, thinking_budget=4)]
    await client.send(*enumerate((pb.GenerateRequest(chat=chat, sampling_params=each) for each in own), 1))
    await client.finish_all()
    assert not any(end.code for end in client.ends.values())
    assert sorted(params.thinking_budget for params in given) == [4, 15]


@scenario
async def test_ids_only_are_the_same_tokens_without_text(run):
    client = run.session(token_ids_only=True)
    await client.send(*((key, message) for key, message in REQUESTS.items() if not message.sampling_params.stop))
    await client.finish_all()
    for key in client.ends:
        tokens, _, finish, details, usage = await generated(run, REQUESTS[key])
        for branch in range(REQUESTS[key].sampling_params.n or 1):
            assert client.tokens[key, branch] == tokens[branch]
            assert client.finish[key, branch] == finish[branch]
            assert joined(client.details[key, branch]) == details[branch]
        assert without_times(client.ends[key].usage) == without_times(usage)
    assert not client.texts
    assert len(client.ends) == 5


@scenario
async def test_errors_end_one_request_and_others_go_on(run):
    client = run.session(token_ids_only=True)
    good = request(max_tokens=30)
    wrong = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1]), sampling_params=pb.SamplingParams(temperature=-1))
    with_id = request(max_tokens=1000)
    with_id.request_id = "twice"
    await client.send((1, good), (2, wrong), (3, request(stop=["x"])), (4, with_id), (5, with_id), abort_keys=[4])
    await client.finish_all()
    assert client.error(2)[0] == "INVALID_ARGUMENT"
    assert "temperature" in client.error(2)[1]
    assert client.error(3) == (
        "INVALID_ARGUMENT",
        "stop must be empty in a session with token_ids_only, which makes no text; use stop_token_ids",
    )
    assert client.error(5) == ("ALREADY_EXISTS", "a request with the id 'twice' is running")
    assert (len(client.tokens[1, 0]), client.finish[1, 0]) == (30, pb.FINISH_REASON_LENGTH)
    assert client.ends[1].usage.completion_tokens == 30
    assert client.finish[4, 0] == pb.FINISH_REASON_ABORT


@scenario
async def test_requests_of_later_messages_and_keys_that_are_free_again(run):
    client = run.session()
    await client.send((1, request(max_tokens=3)))
    await client.read_until(lambda: 1 in client.ends)
    del client.ends[1], client.finish[1, 0]
    await client.send((1, request(max_tokens=4)), (2, request(max_tokens=5)))
    await client.finish_all()
    assert (len(client.tokens[1, 0]), len(client.tokens[2, 0])) == (3 + 4, 5)


@pytest.mark.parametrize("ids_only", [False, True])
def test_credits_hold_up_their_request_alone(engine, ids_only):
    scenario(functools.partial(credits_hold_up, ids_only=ids_only))(engine)


async def credits_hold_up(run, ids_only):
    client = run.session(window_tokens=16, token_ids_only=ids_only)
    await client.send((1, request(max_tokens=100, n=2)), (2, request(max_tokens=50)))
    await client.read_until(lambda: all(len(client.tokens[entry]) == 16 for entry in ((1, 0), (1, 1), (2, 0))))
    for granted in range(10, 40, 10):
        await client.send(credit_keys=[2], credit_tokens=[10])
        await client.read_until(lambda granted=granted: len(client.tokens[2, 0]) == 16 + granted)
    await client.send(credit_keys=[2], credit_tokens=[1000])
    await client.read_until(lambda: 2 in client.ends)
    assert len(client.tokens[2, 0]) == 50
    assert len(client.tokens[1, 0]) == len(client.tokens[1, 1]) == 16
    assert (await run.stats())["held"] == 2
    await client.send(credit_keys=[1, 77], credit_tokens=[84, 1])
    await client.finish_all()
    assert len(client.tokens[1, 0]) == len(client.tokens[1, 1]) == 100


@scenario
async def test_a_client_that_does_not_read_holds_up_its_requests_alone(run):
    slow, quick = run.session(), run.session()
    await slow.send((1, request(max_tokens=1900)))
    await quick.send((1, request(max_tokens=500)))
    await quick.finish_all()
    assert len(quick.tokens[1, 0]) == 500
    await slow.finish_all()
    assert len(slow.tokens[1, 0]) == 1900


@pytest.mark.parametrize("ids_only", [False, True])
def test_a_lost_client_ends_its_requests(engine, ids_only):
    scenario(functools.partial(lost_client, ids_only=ids_only))(engine)


async def lost_client(run, ids_only):
    client = run.session(window_tokens=16, token_ids_only=ids_only)
    await client.send(*((key, request(max_tokens=1000)) for key in range(20)))
    await client.read_until(lambda: len(client.tokens) == 20)
    assert run.frontend.num_open == 20
    client.call.cancel()
    await run.until_idle()
    while (stats := await run.stats())["held"] or stats["num_running"]:
        await asyncio.sleep(0.01)


@scenario
async def test_deadline(run):
    client = run.session(window_tokens=16)
    await client.send((1, request(max_tokens=1000), 0.2), (2, request(max_tokens=16)))
    await client.finish_all()
    assert client.error(1) == ("DEADLINE_EXCEEDED", "the request did not end within deadline_s = 0.2")
    assert not client.ends[2].code


@scenario
async def test_deadlines_that_are_no_time(run):
    """Not a number, which compares with no other, would put timers of the whole front out of their order."""
    loop, delays = asyncio.get_running_loop(), []
    call_later = loop.call_later
    loop.call_later = lambda delay, *args, **kwargs: delays.append(delay) or call_later(delay, *args, **kwargs)
    client = run.session()
    deadlines = [math.nan, -math.nan, math.inf, -1.0, 1e9]
    await client.send(*((key, request(max_tokens=2), deadline_s) for key, deadline_s in enumerate(deadlines)))
    await client.finish_all()
    for key, deadline_s in enumerate(deadlines[:4]):
        expected = f"deadline_s must be a finite number of seconds >= 0, got {deadline_s!r}"
        assert client.error(key) == ("INVALID_ARGUMENT", expected)
    assert not client.ends[4].code
    assert 1e9 in delays
    assert not any(map(math.isnan, delays))


@scenario
async def test_too_many_requests(run):
    client = run.session(window_tokens=16)
    many = session.MAX_BRANCHES // 256
    await client.send(*((key, request(n=256, max_tokens=1000)) for key in range(many + 1)))
    await client.read_until(lambda: many in client.ends)
    code, message = client.error(many)
    assert code == "RESOURCE_EXHAUSTED"
    assert message == (
        f"the session has {many} requests with {session.MAX_BRANCHES} branches; at most {session.MAX_REQUESTS} with "
        f"{session.MAX_BRANCHES} run at once"
    )
    client.call.cancel()
    await run.until_idle()


@pytest.mark.parametrize(
    ("options", "messages", "text"),
    [
        ({"window_tokens": 3}, [{}], "window_tokens must be 0 or at least 16, got 3"),
        ({}, [{"credit_keys": [1]}], "credit_keys and credit_tokens must have as many entries, got 1 and 0"),
        (
            {},
            [{"credit_keys": [1], "credit_tokens": [1]}],
            "credit_keys must be empty in a session without window_tokens",
        ),
        ({}, [{}, {"options": pb.SessionOptions()}], "options must be in the first message of the call only"),
        (
            {"window_tokens": 16},
            [{"requests": [pb.SubmitRequest(key=9, request=request(max_tokens=99))] * 2}],
            "key 9 is that of a request that runs",
        ),
    ],
)
def test_a_wrong_message_ends_the_session(engine, options, messages, text):
    @scenario
    async def case(run):
        client = run.session(**options)
        for fields in messages:
            await client.send(**fields)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.finish_all()
        assert (caught.value.code().name, caught.value.details()) == ("INVALID_ARGUMENT", text)
        await run.until_idle()

    case(engine)
