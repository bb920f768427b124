"""Every call meets limits, has one message in time that can be decoded, and ends with a status with details."""

from __future__ import annotations

import asyncio
import contextlib
import gc

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status.rpc_status import aio as rpc_status
from helpers import fake_frontend

from expertwire.bench.attacks.raw_http2 import RawConnection
from expertwire.deploy.grpc import calls
from expertwire.deploy.grpc.config import Limits
from expertwire.deploy.grpc.server import SERVICE, Server
from expertwire.deploy.proto import expertwire_v1_pb2 as pb
from expertwire.deploy.proto import expertwire_v1_pb2_grpc as pb_grpc
from expertwire.engine.frontend.api import RequestError, RequestFailed

ONE_MESSAGE = {method.name: method.input_type.name for method in calls.SERVICE.methods if not method.client_streaming}


@contextlib.asynccontextmanager
async def serving(**limits):
    """A server with these limits: its frontend, and a client's channel."""
    server, frontend, stop = Server("127.0.0.1", 0, Limits(**limits)), fake_frontend.FakeFrontend(), asyncio.Event()
    task = asyncio.ensure_future(server.serve(frontend, stop=stop, drain_timeout_s=0))
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            channel.target = f"127.0.0.1:{server.port}"
            channel.overload = server._overload
            yield frontend, channel
        stop.set()
        await task
    finally:
        task.cancel()


def open_call(channel, method="Generate"):
    """A call that takes and gives bytes, and has no message yet."""
    return channel.stream_stream(f"/{SERVICE}/{method}")()


async def status_of(call):
    """The code's name, message and details of a call that ends with an error."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:
            pass
    details = []
    if (status := await rpc_status.from_call(call)) is not None:
        for packed in status.details:
            kind = error_details_pb2.DESCRIPTOR.message_types_by_name[packed.TypeName().rpartition(".")[2]].name
            detail = getattr(error_details_pb2, kind)()
            assert packed.Unpack(detail)
            details.append(detail)
    return caught.value.code().name, caught.value.details(), details


def run(coroutine):
    asyncio.run(asyncio.wait_for(coroutine, 60))


def test_messages_that_cannot_be_decoded_are_the_clients_mistake():
    async def main():
        async with serving() as (frontend, channel):
            for method, request in ONE_MESSAGE.items():
                for data in (b"\xff", b"\x0a\x05abc", b"\x0a"):
                    call = open_call(channel, method)
                    await call.write(data)
                    await call.done_writing()
                    code, message, _ = await status_of(call)
                    assert code in ("INVALID_ARGUMENT", "UNIMPLEMENTED"), (method, data, code, message)
                    if code == "INVALID_ARGUMENT":
                        assert f"decoded as expertwire.v1.{request}: " in message
            assert frontend.submitted == []

    run(main())


def test_messages_of_health_and_reflection_too():
    async def main():
        async with serving() as (_, channel):
            for path in (
                "grpc.health.v1.Health/Check",
                "grpc.health.v1.Health/List",
                "grpc.health.v1.Health/Watch",
                "grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
            ):
                call = channel.stream_stream(f"/{path}")()
                await call.write(b"\xff")
                assert (await status_of(call))[0] == "INVALID_ARGUMENT", path

    run(main())


def test_watchers_of_health_are_few_and_it_lists_its_services():
    async def main():
        async with serving(max_calls=1) as (_, channel):
            stub = health_pb2_grpc.HealthStub(channel)
            watching = [stub.Watch(health_pb2.HealthCheckRequest()) for _ in range(256)]
            for call in watching:
                assert (await call.read()).status == health_pb2.HealthCheckResponse.SERVING
            async with grpc.aio.insecure_channel(channel.target, [("grpc.use_local_subchannel_pool", 1)]) as other:
                stub = health_pb2_grpc.HealthStub(other)
                code, message, _ = await status_of(stub.Watch(health_pb2.HealthCheckRequest()))
                assert code == "RESOURCE_EXHAUSTED" and "256 calls of Watch run" in message
                listed = await stub.List(health_pb2.HealthListRequest())
                assert set(listed.statuses) == {"", SERVICE, "liveness"}
            for call in watching:
                call.cancel()

    run(main())


def test_health_checks_do_not_wait_behind_other_calls():
    async def run():
        async with serving(max_calls_per_connection=1000) as (_, channel):
            waiting = [open_call(channel) for _ in range(400)]  # which gRPC hands to the server one by one
            check = health_pb2_grpc.HealthStub(channel).Check
            assert (await check(health_pb2.HealthCheckRequest())).status == health_pb2.HealthCheckResponse.SERVING
            assert channel.overload.num_calls < 200
            for call in waiting:
                call.cancel()

    asyncio.run(run())


def test_a_call_has_a_message():
    async def main():
        async with serving() as (_, channel):
            call = open_call(channel)
            await call.done_writing()
            assert (await status_of(call))[:2] == ("INVALID_ARGUMENT", "a call of Generate has one message, got none")

    run(main())


def test_a_message_must_arrive_in_time():
    async def main():
        async with serving(message_timeout_s=0.2) as (_, channel):
            code, message, _ = await status_of(open_call(channel))
            assert code == "DEADLINE_EXCEEDED" and "message_timeout_s = 0.2 s" in message

    run(main())


def test_slow_messages_of_one_client_are_few():
    async def main():
        async with serving(message_timeout_s=50.0) as (_, channel):
            slow = [open_call(channel) for _ in range(16)]
            await asyncio.sleep(0.5)
            code, message, details = await status_of(open_call(channel))
            assert code == "RESOURCE_EXHAUSTED" and "arrives slowly, and so do 16 others" in message
            assert [detail.retry_delay.seconds for detail in details] == [1]
            # Quick ones are served beside them.
            assert (await pb_grpc.InferenceStub(channel).GetModelInfo(pb.GetModelInfoRequest())).name == "fake"
            for call in slow:
                call.cancel()

    run(main())


def test_too_many_calls_are_refused_before_they_are_read():
    async def main():
        async with serving(max_calls=2) as (frontend, channel):
            stub = pb_grpc.InferenceStub(channel)
            running = [stub.Generate(pb.GenerateRequest(text="a")) for _ in range(2)]
            while len(frontend.submitted) < 2:
                await asyncio.sleep(0.01)
            call = open_call(channel)  # without a message
            code, message, details = await status_of(call)
            assert code == "RESOURCE_EXHAUSTED" and "max_calls allows 2" in message
            assert [detail.retry_delay.seconds for detail in details] == [1]
            assert dict(await call.trailing_metadata())["grpc-retry-pushback-ms"] == "1000"
            for each in running:
                each.cancel()
            while len(frontend.aborted) < 2:
                await asyncio.sleep(0.01)
            assert (await stub.GetModelInfo(pb.GetModelInfoRequest())).name == "fake"

    run(main())


def test_sessions_of_one_client_are_few():
    async def main():
        async with serving() as (_, channel):
            sessions = [open_call(channel, "Session") for _ in range(33)]
            endings = {asyncio.ensure_future(status_of(call)): call for call in sessions}
            [refused], waiting = await asyncio.wait(endings, return_when=asyncio.FIRST_COMPLETED)
            code, message, [details] = refused.result()
            assert code == "RESOURCE_EXHAUSTED" and "32 of this client; at most 64 and 32 are allowed" in message
            assert details.retry_delay.seconds == 1
            left = waiting.pop()
            left.cancel()
            endings[left].cancel()
            await asyncio.sleep(0.2)
            late = open_call(channel, "Session")
            await late.done_writing()
            assert [message async for message in late] == []
            for ending in waiting:
                ending.cancel()
                endings[ending].cancel()

    run(main())


def test_large_messages_are_refused():
    async def main():
        async with serving(max_message_mib=1) as (_, channel):
            call = open_call(channel)
            with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                await call.write(bytes(2 << 20))
            assert (await status_of(call))[0] == "RESOURCE_EXHAUSTED"

    run(main())


def test_invalid_arguments_name_the_field_in_their_details():
    async def main():
        async with serving() as (frontend, channel):
            stub = pb_grpc.InferenceStub(channel)
            for request, field in (
                (pb.GenerateRequest(text="a", sampling_params=pb.SamplingParams(top_p=2)), "top_p"),
                (pb.GenerateRequest(text="a", request_id="x" * 300), "request_id"),
                (pb.GenerateRequest(text="a", chat=pb.Chat(messages="[")), "messages"),
            ):
                _, message, [details] = await status_of(stub.Generate(request))
                [violation] = details.field_violations
                assert (violation.field, violation.description) == (field, message)
            call = stub.Generate(pb.GenerateRequest(text="a"))
            while not frontend.submitted:
                await asyncio.sleep(0.01)
            frontend.push(0, error=RequestError("RESOURCE_EXHAUSTED", "later", 1.5), token_ids=())
            _, _, [details] = await status_of(call)
            assert details.retry_delay.ToMilliseconds() == 1500

    run(main())


def test_our_own_mistakes_are_internal_and_logged(caplog):
    async def main():
        async with serving() as (frontend, channel):
            await channel.channel_ready()
            frontend.model_info = None
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await pb_grpc.InferenceStub(channel).GetModelInfo(pb.GetModelInfoRequest())
            assert caught.value.code() is grpc.StatusCode.INTERNAL
            assert caught.value.details() == "GetModelInfo failed in the server, whose log says why"

    run(main())
    assert "Traceback" in caplog.text and "GetModelInfo" in caplog.text


def test_clients_that_leave_while_a_message_is_written_leave_no_trace(caplog):
    async def main():
        async with serving() as (frontend, channel):
            for round in range(20):
                connection = await RawConnection(window=0).connect("127.0.0.1", int(channel.target.rpartition(":")[2]))
                for _ in range(8):
                    await connection.call(f"/{SERVICE}/Generate", pb.GenerateRequest(text="a"))
                first = round * 8
                while len(frontend.submitted) < first + 8:
                    await asyncio.sleep(0.01)
                for number in range(first, first + 8):
                    frontend.push(number, text="ab" * 500)
                await asyncio.sleep(0.05)
                await connection.close()
            while channel.overload.num_calls:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            assert len(frontend.aborted) == 160

    run(main())
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_calls": 0}, r"max_calls must be an integer in \[1, 1048576\], got 0"),
        ({"max_connections": 1.5}, "max_connections must be an integer"),
        ({"message_timeout_s": 0}, r"message_timeout_s must be a number of seconds in \(0, 1e6\], got 0"),
    ],
)
def test_limits_are_checked(options, words):
    with pytest.raises(ValueError, match=words):
        Limits(**options)


def test_a_refused_call_leaves_nothing_behind():
    """An exception that stays would hold the message, of megabytes, until a collection."""

    async def main():
        async with serving() as (_, channel):
            call = open_call(channel)
            await call.write(pb.GenerateRequest(text="a" * 10_000).SerializeToString())
            assert (await status_of(call))[0] == "INVALID_ARGUMENT"
            await asyncio.sleep(0.1)
            gc.collect()
            gc.disable()
            try:
                call = open_call(channel)
                await call.write(pb.GenerateRequest(text="a" * 10_000).SerializeToString())
                assert (await status_of(call))[0] == "INVALID_ARGUMENT"
                await asyncio.sleep(0.1)
                assert [each for each in gc.get_objects() if isinstance(each, RequestFailed)] == []
            finally:
                gc.enable()

    run(main())
