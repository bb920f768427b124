"""The gRPC server against a frontend without an engine: streams, errors, slow and vanishing clients, failure, drain."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import socket

import grpc
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.json_format import MessageToDict
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from helpers import fake_frontend

from expertwire.deploy.grpc.server import SERVICE, Server
from expertwire.deploy.proto import expertwire_v1_pb2 as pb
from expertwire.deploy.proto import expertwire_v1_pb2_grpc as pb_grpc
from expertwire.engine.frontend.api import Logprob, RequestError, RequestOptions

STATS = {"num_running": 2, "running": [1, 1], "blocks_used": {"kv": [0, 5]}, "expert_load": [[1, 2, 3], [4, 5, 6]]}


class Running:
    """A server, its frontend and a client's channel."""

    def __init__(self, server, frontend, channel, stop, serving):
        self.server, self.frontend, self.channel, self.stop, self.serving = server, frontend, channel, stop, serving
        self.stub = pb_grpc.InferenceStub(channel)

    def generate(self, text="abc", *, request_id="", timeout=None, **sampling):
        request = pb.GenerateRequest(text=text, request_id=request_id, sampling_params=pb.SamplingParams(**sampling))
        return self.stub.Generate(request, timeout=timeout)

    async def submitted(self, count=1):
        """Wait until the frontend has got so many requests."""
        await until(lambda: len(self.frontend.submitted) >= count)

    async def health(self):
        stub = health_pb2_grpc.HealthStub(self.channel)
        answers = [await stub.Check(health_pb2.HealthCheckRequest(service=name)) for name in ("", SERVICE)]
        assert answers[0] == answers[1]
        return health_pb2.HealthCheckResponse.ServingStatus.Name(answers[0].status)


def scenario(**options):
    """Makes an async test with a `Running` argument into a pytest function."""

    def decorate(function):
        def test():
            asyncio.run(asyncio.wait_for(_run(function, **{"drain_timeout_s": 5.0, **options}), 60))

        test.__name__, test.__doc__ = function.__name__, function.__doc__
        return test

    return decorate


async def _run(function, **options):
    server, frontend, stop = Server("127.0.0.1", 0), fake_frontend.FakeFrontend(), asyncio.Event()
    frontend.stats_values = STATS
    serve = server.serve(frontend, stop=stop, **options)
    serving = asyncio.ensure_future(serve)
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            await function(Running(server, frontend, channel, stop, serving))
        stop.set()
        await serving
    finally:
        serving.cancel()


async def until(condition):
    while not condition():
        await asyncio.sleep(0.005)


async def collect(call):
    """All messages of a stream."""
    return [message async for message in call]


async def status(awaitable):
    """The code's name and the message of the error that a call ends in."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await awaitable
    return caught.value.code().name, caught.value.details()


def text_of(messages, branch=0):
    return "".join(chunk.text for message in messages for chunk in message.chunks if chunk.branch == branch)


@scenario()
async def test_stream_of_two_branches(run):
    call = run.generate("hello", request_id="mine", n=2, temperature=0.0, seed=3)
    await run.submitted()
    for branch, text, fields in (
        (0, "ab", {}),
        (1, "x", {}),
        (0, "c", {"finish_reason": "stop", "stop_reason": "##"}),
        (1, "yz", {}),
        (1, "", {"token_ids": (42,), "finish_reason": "stop", "stop_reason": 42}),
    ):
        run.frontend.push(0, branch, text, **fields)
        await asyncio.sleep(0.01)
    messages = await collect(call)
    assert [message.request_id for message in messages] == ["mine"] + [""] * (len(messages) - 1)
    assert (text_of(messages), text_of(messages, 1)) == ("abc", "xyz")
    chunks = [chunk for message in messages for chunk in message.chunks]
    assert [i for chunk in chunks if chunk.branch == 1 for i in chunk.token_ids] == [120 - 100, 21, 22, 42]
    last = [[chunk for chunk in chunks if chunk.branch == branch][-1] for branch in (0, 1)]
    assert [chunk.finish_reason for chunk in last] == [pb.FINISH_REASON_STOP] * 2
    assert (last[0].stop_string, last[1].stop_token_id) == ("##", 42)
    [usage] = [message.usage for message in messages if message.HasField("usage")]
    assert 0 < usage.time_to_first_token_s <= usage.total_time_s
    usage.ClearField("time_to_first_token_s")
    usage.ClearField("total_time_s")
    assert usage == pb.Usage(prompt_tokens=5, completion_tokens=7, seed=77)
    assert messages[-1].HasField("usage")
    assert run.frontend.aborted == []


@scenario()
async def test_log_probabilities(run):
    call = run.generate("hi", logprobs=1, prompt_logprobs=0, max_tokens=2)
    await run.submitted()
    prompt_logprobs = [None, {5: Logprob(-0.5, 3, "i")}]
    logprobs = ({97: Logprob(-2.0, 9, "a"), 98: Logprob(-1.0, 1, "b")},)
    run.frontend.push(0, text="a", logprobs=logprobs, prompt_logprobs=prompt_logprobs, finish_reason="length")
    (message,) = await collect(call)
    assert [[entry.token_id for entry in position.tokens] for position in message.prompt_logprobs] == [[], [5]]
    (position,) = message.chunks[0].logprobs
    assert [(entry.token_id, entry.logprob, entry.rank, entry.decoded_token) for entry in position.tokens] == [
        (97, -2.0, 9, "a"),
        (98, -1.0, 1, "b"),
    ]


@scenario()
async def test_unset_fields_take_the_model_s_defaults(run):
    defaults = {"temperature": 0.6, "top_k": 20}
    run.frontend.model_info = dataclasses.replace(run.frontend.model_info, default_sampling_params=defaults)
    call = run.generate(top_k=-1)
    await run.submitted()
    ((_, params),) = run.frontend.submitted
    assert (params.temperature, params.top_k, params.top_p) == (0.6, -1, 1.0)
    told = (await run.stub.GetModelInfo(pb.GetModelInfoRequest())).default_sampling_params
    assert {field.name: value for field, value in told.ListFields()} == defaults
    call.cancel()


@scenario()
async def test_unset_fields_take_our_defaults_and_zeros_are_values(run):
    calls = [run.generate(), run.generate(temperature=0.0, min_p=0.0, seed=0, ignore_eos=False, logprobs=0)]
    await run.submitted(2)
    default, zeros = sorted((params for _, params in run.frontend.submitted), key=lambda params: -params.temperature)
    assert (default.temperature, default.max_tokens, default.top_k, default.seed, default.logprobs) == (
        1,
        None,
        -1,
        None,
        None,
    )
    assert (zeros.temperature, zeros.seed, zeros.logprobs, zeros.skip_special_tokens) == (0, 0, 0, True)
    for call in calls:
        call.cancel()


@scenario()
async def test_token_ids_and_every_sampling_field_arrive(run):
    values = {
        "temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "max_tokens": 9, "min_tokens": 2, "seed": -4,
        "stop": ["a", "b"], "stop_token_ids": [7], "ignore_eos": True, "repetition_penalty": 1.1,
        "presence_penalty": 0.2, "frequency_penalty": -0.3, "logit_bias": {4: -1.5}, "logprobs": 2,
        "prompt_logprobs": 3, "n": 2, "skip_special_tokens": False, "expert_load": True,
        "thinking_budget": 7, "thinking_grace": 2, "min_thinking_tokens": 3,
    }  # fmt: skip
    assert set(values) == set(pb.SamplingParams.DESCRIPTOR.fields_by_name)
    request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5, 6]), sampling_params=pb.SamplingParams(**values))
    call = run.stub.Generate(request)
    await run.submitted()
    ((prompt, params),) = run.frontend.submitted
    assert prompt == [5, 6]
    expected = {**values, "stop": ("a", "b"), "stop_token_ids": (7,)}
    assert params.to_dict() == expected  # so every field of SamplingParams is in the .proto
    call.cancel()


@scenario()
async def test_options_and_the_deadline_arrive(run):
    request = pb.GenerateRequest(text="a", priority=-7, tenant="acme", cache_salt="s")
    calls = [run.stub.Generate(request, timeout=1000), run.generate()]
    await run.submitted(2)
    with_deadline, plain = sorted(run.frontend.options, key=lambda options: options.priority)
    assert 900 < with_deadline.deadline_s < 1011, "gRPC rounds it up to three digits"
    assert with_deadline == RequestOptions(
        priority=-7, tenant="acme", cache_salt="s", deadline_s=with_deadline.deadline_s
    )
    assert plain == RequestOptions()
    for call in calls:
        call.cancel()


@scenario()
async def test_a_rejection_may_say_when_to_try_again(run):
    calls = [run.generate(), run.generate()]
    await run.submitted(2)
    for number, retry_after_s in enumerate((1.2345, None)):
        run.frontend.push(number, error=RequestError("RESOURCE_EXHAUSTED", "later", retry_after_s), token_ids=())
    found = set()
    for call in calls:
        assert await status(collect(call)) == ("RESOURCE_EXHAUSTED", "later")
        found.add(dict(await call.trailing_metadata()).get("grpc-retry-pushback-ms"))
    assert found == {"1235", None}


@scenario()
async def test_cached_tokens_are_in_the_usage(run):
    call = run.generate("hello", n=2)
    await run.submitted()
    run.frontend.push(0, 1, "a", finish_reason="stop")
    run.frontend.push(0, 0, "a", finish_reason="stop", num_cached_tokens=4)
    assert (await collect(call))[-1].usage.cached_prompt_tokens == 4


@scenario()
async def test_bad_requests_name_the_field_and_what_it_allows(run):
    for request, words in (
        (pb.GenerateRequest(), ["prompt", "text", "token_ids"]),
        (pb.GenerateRequest(text=""), ["prompt", "at least one token"]),
        (pb.GenerateRequest(token_ids=pb.TokenIds()), ["prompt", "at least one token"]),
        (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[100])), ["prompt", "[0, 100)"]),
        (pb.GenerateRequest(chat=pb.Chat()), ["messages", "non-empty list", "[]"]),
        (pb.GenerateRequest(chat=pb.Chat(messages="[{")), ["messages", "JSON text"]),
        (pb.GenerateRequest(chat=pb.Chat(messages="[" * 200_000)), ["messages", "JSON text", "recursion"]),
        (pb.GenerateRequest(chat=pb.Chat(messages='[{"role": 5}]')), ["'role'"]),
        (pb.GenerateRequest(chat=pb.Chat(messages='[{"role": "user"}]', tools="5")), ["tools", "JSON schemas", "5"]),
        (
            pb.GenerateRequest(chat=pb.Chat(messages='[{"role": "user"}]', chat_template_kwargs="[]")),
            ["chat_template_kwargs", "dictionary", "[]"],
        ),
        (pb.GenerateRequest(text="a" * 1000), ["prompt", "1000", "max_model_len"]),
        (pb.GenerateRequest(text="a", request_id="x" * 300), ["request_id", "256"]),
        (pb.GenerateRequest(text="a", tenant="x" * 129), ["tenant", "at most 128", "129"]),
        (pb.GenerateRequest(text="a", cache_salt="x" * 129), ["cache_salt", "at most 128", "129"]),
        (pb.GenerateRequest(text="a", sampling_params=pb.SamplingParams(temperature=-1)), ["temperature", ">= 0"]),
        (pb.GenerateRequest(text="a", sampling_params=pb.SamplingParams(top_p=0)), ["top_p", "(0, 1]"]),
        (pb.GenerateRequest(text="a", sampling_params=pb.SamplingParams(max_tokens=0)), ["max_tokens", ">= 1"]),
        (pb.GenerateRequest(text="a", sampling_params=pb.SamplingParams(n=0)), ["n must", "[1, 256]"]),
        (pb.GenerateRequest(text="a", sampling_params=pb.SamplingParams(stop=[""])), ["stop", "non-empty"]),
        (pb.GenerateRequest(text="a", sampling_params=pb.SamplingParams(logit_bias={1: 1e9})), ["logit_bias", "100"]),
    ):
        code, message = await status(collect(run.stub.Generate(request)))
        assert code == "INVALID_ARGUMENT"
        assert all(word in message for word in words), message
    assert run.frontend.submitted == []


@scenario()
async def test_rejections_keep_their_code(run):
    call = run.generate()
    await run.submitted()
    run.frontend.push(0, error=RequestError("RESOURCE_EXHAUSTED", "4096 requests wait; try again later"), token_ids=())
    assert await status(collect(call)) == ("RESOURCE_EXHAUSTED", "4096 requests wait; try again later")


@scenario()
async def test_a_cancelled_call_aborts_at_once(run):
    call = run.generate()
    await run.submitted()
    run.frontend.push(0, text="a")
    assert text_of([await anext(call.__aiter__())]) == "a"
    call.cancel()
    await until(lambda: run.frontend.aborted == [0])


@scenario()
async def test_a_lost_connection_aborts_all_its_requests(run):
    async with grpc.aio.insecure_channel(f"127.0.0.1:{run.server.port}") as channel:
        stub = pb_grpc.InferenceStub(channel)
        calls = [stub.Generate(pb.GenerateRequest(text="abc")) for _ in range(3)]
        await run.submitted(3)
    await until(lambda: sorted(run.frontend.aborted) == [0, 1, 2])
    del calls


@scenario()
async def test_a_deadline_aborts(run):
    call = run.generate(timeout=0.2)
    assert (await status(collect(call)))[0] == "DEADLINE_EXCEEDED"
    await until(lambda: run.frontend.aborted == [0])


@scenario()
async def test_abort_by_id(run):
    calls = [run.generate(request_id="one", n=2)]
    await run.submitted()
    calls.append(run.generate(request_id="two"))
    await run.submitted(2)
    run.frontend.push(0, 0, "a")
    await run.stub.Abort(pb.AbortRequest(request_id="one"))
    messages = await collect(calls[0])
    chunks = [chunk for message in messages for chunk in message.chunks]
    aborted = {chunk.branch for chunk in chunks if chunk.finish_reason == pb.FINISH_REASON_ABORT}
    assert (text_of(messages), aborted, messages[-1].usage.completion_tokens) == ("a", {0, 1}, 1)
    run.frontend.push(1, text="b", finish_reason="stop")
    assert text_of(await collect(calls[1])) == "b"
    await run.stub.Abort(pb.AbortRequest(request_id="one"))  # not an error: it may just have ended


@scenario()
async def test_the_server_chooses_an_id_that_abort_takes(run):
    call = run.generate()
    await run.submitted()
    run.frontend.push(0, text="a")
    first = await anext(call.__aiter__())
    await run.stub.Abort(pb.AbortRequest(request_id=first.request_id))
    assert (await collect(call))[-1].HasField("usage")


@scenario()
async def test_an_id_is_taken_while_its_request_runs(run):
    first = run.generate(request_id="same")
    await run.submitted()
    code, message = await status(collect(run.generate(request_id="same")))
    assert code == "ALREADY_EXISTS" and "'same'" in message
    run.frontend.push(0, text="a", finish_reason="stop")
    await collect(first)
    again = run.generate(request_id="same")
    await run.submitted(2)
    run.frontend.push(1, text="b", finish_reason="stop")
    assert text_of(await collect(again)) == "b"


@scenario()
async def test_a_slow_client_gets_few_large_messages_and_blocks_nobody(run):
    slow = run.generate(max_tokens=500_000, ignore_eos=True)
    await run.submitted()
    run.frontend.push(0, text="a" * 100)
    await anext(slow.__aiter__())
    # Nobody reads the slow stream meanwhile: what the transport does not take is joined.
    for _ in range(2000):
        run.frontend.push(0, text="b" * 100)
        await asyncio.sleep(0)
    quick = run.generate()
    await run.submitted(2)
    run.frontend.push(1, text="quick", finish_reason="stop")
    assert text_of(await collect(quick)) == "quick"
    run.frontend.push(0, text="c", finish_reason="length")
    messages = await collect(slow)
    assert text_of(messages) == "b" * 200_000 + "c"
    assert messages[-1].usage.completion_tokens == 200_101
    assert len(messages) < 1500


@scenario(stall_s=0.5)
async def test_a_client_that_does_not_read_is_cut_off(run):
    call = run.generate(ignore_eos=True, max_tokens=10**6)
    await run.submitted()
    run.frontend.push(0, text="a")
    await anext(call.__aiter__())
    while not run.frontend.aborted:  # the transport takes some megabytes first
        run.frontend.push(0, text="b" * 65_536)
        await asyncio.sleep(0.001)
    code, message = await status(collect(call))
    assert code == "RESOURCE_EXHAUSTED" and "read nothing for 0.5 s" in message


@scenario()
async def test_long_prompt_log_probabilities_come_in_messages_that_clients_take(run):
    call = run.generate("a" * 900, prompt_logprobs=64)
    await run.submitted()
    entry = {i: Logprob(-1.0, i + 1, "\u00e4" * 20) for i in range(65)}
    run.frontend.push(0, text="a", prompt_logprobs=[None, *[entry] * 899], finish_reason="length")
    messages = await collect(call)
    assert sum(len(message.prompt_logprobs) for message in messages) == 900
    assert max(message.ByteSize() for message in messages) < 4 << 20
    assert len(messages) > 1


@scenario()
async def test_a_failed_engine_ends_streams_and_the_health_check_tells(run):
    assert await run.health() == "SERVING"
    calls = [run.generate(), run.generate()]
    await run.submitted(2)
    run.frontend.push(0, text="a")
    run.frontend.fail("the engine failed at rank 2: worker process 7 was killed by SIGKILL", 2)
    for call in calls:
        code, message = await status(collect(call))
        assert code == "UNAVAILABLE" and "rank 2" in message
    for call in (
        collect(run.generate()),
        run.stub.GetStats(pb.GetStatsRequest()),
        run.stub.Abort(pb.AbortRequest(request_id="x")),
        run.stub.GetModelInfo(pb.GetModelInfoRequest()),
    ):
        code, message = await status(call)
        assert code == "UNAVAILABLE" and "rank 2" in message
    assert await run.health() == "NOT_SERVING"
    assert not run.serving.done()
    run.stop.set()
    assert "rank 2" in await run.serving


@scenario()
async def test_a_failure_without_open_requests_is_noticed(run):
    run.frontend.fail("the engine failed at rank 0: it was tired", 0)
    while await run.health() == "SERVING":
        await asyncio.sleep(0.01)


@scenario()
async def test_drain_finishes_what_runs_and_refuses_the_rest(run):
    call = run.generate()
    await run.submitted()
    run.stop.set()
    while await run.health() == "SERVING":
        await asyncio.sleep(0.01)
    code, message = await status(collect(run.generate()))
    assert code == "UNAVAILABLE" and "draining" in message
    run.frontend.push(0, text="done", finish_reason="stop")
    assert text_of(await collect(call)) == "done"
    assert await run.serving == ""
    assert run.frontend.aborted == []


@scenario(drain_timeout_s=0.1)
async def test_drain_ends_what_does_not_finish_in_time(run):
    call = run.generate()
    await run.submitted()
    run.frontend.push(0, text="a")
    run.stop.set()
    assert text_of([await anext(call.__aiter__())]) == "a"
    code, message = await status(collect(call))
    assert code == "UNAVAILABLE" and "0.1 s" in message
    await run.serving
    assert run.frontend.aborted == [0]


@scenario()
async def test_model_info_and_statistics(run):
    info = await run.stub.GetModelInfo(pb.GetModelInfoRequest())
    assert (info.name, info.max_model_len, list(info.eos_token_ids), info.ep_size) == ("fake", 1000, [2, 3], 3)
    assert info.version and "models" not in str(info)
    stats = await run.stub.GetStats(pb.GetStatsRequest())
    assert MessageToDict(stats.values) == {name: value for name, value in STATS.items() if name != "expert_load"}
    assert [list(layer.tokens) for layer in stats.expert_load] == STATS["expert_load"]


@scenario()
async def test_reflection_describes_the_service(run):
    stub = reflection_pb2_grpc.ServerReflectionStub(run.channel)

    async def ask(**question):
        call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(**question)]))
        return await anext(call.__aiter__())

    answer = await ask(list_services="")
    assert {"expertwire.v1.Inference", "grpc.health.v1.Health"} <= {
        service.name for service in answer.list_services_response.service
    }
    answer = await ask(file_containing_symbol="expertwire.v1.Inference")
    described = FileDescriptorProto.FromString(answer.file_descriptor_response.file_descriptor_proto[0])
    assert described.package == "expertwire.v1"


def test_a_taken_port_is_an_error():
    async def listen(port):
        Server("127.0.0.1", port)

    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"{port}.*taken"):
            asyncio.run(listen(port))


def test_two_servers_do_not_share_a_port():
    async def listen():
        first = Server("127.0.0.1", 0)
        Server("127.0.0.1", first.port)

    with pytest.raises(ValueError, match="taken"):
        asyncio.run(listen())


@scenario()
async def test_costly_messages_are_made_one_at_a_turn_of_the_loop(run):
    calls = [run.generate(logprobs=1, max_tokens=9) for _ in range(32)]
    await run.submitted(32)
    taken, most, take = 0, 0, run.frontend.take

    def counting(*args):
        nonlocal taken
        taken += 1
        return take(*args)

    async def watch():
        nonlocal taken, most
        while True:
            most, taken = max(most, taken), 0
            await asyncio.sleep(0)

    run.frontend.take = counting
    watching = asyncio.ensure_future(watch())
    for number in range(32):
        run.frontend.push(number, text="a", finish_reason="length")
    for call in calls:
        assert text_of(await collect(call)) == "a"
    watching.cancel()
    assert most == 1
