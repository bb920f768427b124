"""Queries over gRPC: tokens and text, loads, experts, options, the cache; and text in one message."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json

import grpc
import pytest
from helpers import fake_frontend, tokenizer_files

from expertwire.deploy.grpc.config import ServerConfig
from expertwire.deploy.grpc.server import Server
from expertwire.deploy.grpc.server_info import ServerInfo
from expertwire.deploy.proto import expertwire_v1_pb2 as pb
from expertwire.deploy.proto import expertwire_v1_pb2_grpc as pb_grpc
from expertwire.engine.config.engine_config import EngineConfig
from expertwire.engine.frontend.tokenizer import Tokenizer

STATS = {
    "num_waiting": 3, "held": 1, "running": [2, 5], "outstanding_tokens": [100, 2**33],
    "blocks": {"full": 9, "window": 4}, "blocks_used": {"full": [1, 2], "window": [3, 4]}, "expert_load": [[1, 2], [3, 2**40]],
}  # fmt: skip
ENGINE = EngineConfig(model="/models/fake", dtype="auto", seed=5)


@contextlib.asynccontextmanager
async def serving(tokenizer=None):
    """A server: its frontend, and a client's stub."""
    server, frontend, stop = Server("127.0.0.1", 0), fake_frontend.FakeFrontend(), asyncio.Event()
    frontend.tokenizer, frontend.stats_values = tokenizer, STATS
    if tokenizer is not None:
        frontend.model_info = dataclasses.replace(frontend.model_info, vocab_size=tokenizer.vocab_size)
    info = ServerInfo([(ENGINE, frontend.model_info)], ServerConfig(port=7))
    task = asyncio.ensure_future(server.serve(frontend, stop=stop, drain_timeout_s=0, info=info))
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            yield frontend, pb_grpc.InferenceStub(channel)
        stop.set()
        await task
    finally:
        task.cancel()


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 60))


async def refused(awaitable):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await awaitable
    return f"{caught.value.code().name}: {caught.value.details()}"


def test_text_becomes_tokens_and_comes_back(tmp_path):
    tokenizer = Tokenizer.open(tokenizer_files.write(tmp_path, "byte_level"))

    async def main():
        async with serving(tokenizer) as (_, stub):
            text = "Übung macht den Meister 🙂"
            for special in (True, False):
                request = pb.TokenizeRequest(text=text, add_special_tokens=special)
                tokens = list((await stub.Tokenize(request)).token_ids)
                assert tokens == tokenizer.encode(text, special)
            answer = await stub.Detokenize(pb.DetokenizeRequest(token_ids=tokens))
            assert answer.text == text
            assert "prompt is missing: set one of text, chat" in await refused(stub.Tokenize(pb.TokenizeRequest()))
            too_many = pb.DetokenizeRequest(token_ids=[1] * 1001)
            assert "token_ids must have at most max_model_len = 1000" in await refused(stub.Detokenize(too_many))
            huge = await refused(stub.Detokenize(pb.DetokenizeRequest(token_ids=[-1])))
            assert huge.startswith(
                f"INVALID_ARGUMENT: token_ids must be token ids in [0, {tokenizer.vocab_size}), got -1"
            )

    run(main())


def test_without_a_tokenizer_there_is_no_text():
    async def main():
        async with serving() as (_, stub):
            for call in (
                stub.Tokenize(pb.TokenizeRequest(text="a")),
                stub.Tokenize(pb.TokenizeRequest(chat=pb.Chat(messages='[{"role": "user", "content": "a"}]'))),
                stub.Detokenize(pb.DetokenizeRequest(token_ids=[1])),
            ):
                assert "INVALID_ARGUMENT" in (message := await refused(call)) and "tokenizer" in message

    run(main())


def test_loads_are_by_rank():
    async def main():
        async with serving() as (_, stub):
            loads = await stub.GetLoads(pb.GetLoadsRequest())
            assert (loads.num_waiting, loads.num_held) == (3, 1)
            assert [(each.rank, each.num_running, each.outstanding_tokens) for each in loads.ranks] == [
                (0, 2, 100),
                (1, 5, 2**33),
            ]
            assert dict(loads.ranks[1].blocks_used) == {"full": 2, "window": 4}
            assert dict(loads.ranks[1].blocks_total) == STATS["blocks"]

    run(main())


def test_experts_are_reported_time_after_time():
    async def main():
        async with serving() as (frontend, stub):
            call = stub.WatchExperts(pb.WatchExpertsRequest(interval_s=0.1))
            first = await call.read()
            frontend.stats_values = STATS | {"expert_load": [[7], [8]]}
            second = await call.read()
            call.cancel()
            assert [list(layer.tokens) for layer in first.layers] == [[1, 2], [3, 2**40]]
            assert [list(layer.tokens) for layer in second.layers] == [[7], [8]]
            for interval_s in (0.0, -1.0, float("nan")):
                message = await refused(stub.WatchExperts(pb.WatchExpertsRequest(interval_s=interval_s)).read())
                assert message.startswith("INVALID_ARGUMENT: interval_s must be seconds in [0.1, 1e6]")

    run(main())


def test_options_are_shown_as_they_were_resolved():
    async def main():
        async with serving() as (_, stub):
            info = await stub.GetServerInfo(pb.GetServerInfoRequest())
            config = {entry.name: (json.loads(entry.value), entry.reason) for entry in info.config}
            assert config["engine.dtype"] == ("float32", "\"auto\" stands for the model's, or this machine's")
            assert config["engine.seed"] == (5, "")
            assert config["server.port"] == (7, "")
            assert config["server.max_calls"] == (16384, "")
            fronts, reason = config["server.fronts"]
            assert fronts == info.fronts >= 1 and "eight cores" in reason
            assert info.version and info.uptime_s > 0

    run(main())


def test_the_cache_is_flushed():
    async def main():
        async with serving() as (_, stub):
            assert dict((await stub.FlushCache(pb.FlushCacheRequest())).freed_blocks) == {"full": 7}

    run(main())


def test_all_the_text_in_one_message():
    async def main():
        async with serving() as (frontend, stub):
            call = stub.GenerateUnary(pb.GenerateRequest(text="hello", sampling_params=pb.SamplingParams(n=2)))
            while not frontend.submitted:
                await asyncio.sleep(0.01)
            for branch, text, fields in (
                (1, "x", {}),
                (0, "ab", {}),
                (0, "c", {"finish_reason": "stop", "stop_reason": "##"}),
                (1, "yz", {"finish_reason": "length"}),
            ):
                frontend.push(0, branch, text, **fields)
                await asyncio.sleep(0.01)
            response = await call
            chunks = [(chunk.branch, chunk.text, len(chunk.token_ids), chunk.stop_string) for chunk in response.chunks]
            assert chunks == [(0, "abc", 3, "##"), (1, "xyz", 3, "")]
            assert response.chunks[1].finish_reason == pb.FINISH_REASON_LENGTH
            assert response.usage.completion_tokens == 6 and response.request_id

    run(main())


def test_requests_are_aborted_on_every_front():
    async def main():
        async with serving() as (frontend, stub):
            calls = [stub.Generate(pb.GenerateRequest(text="a", request_id=name)) for name in ("one", "two", "three")]
            while len(frontend.submitted) < 3:
                await asyncio.sleep(0.01)
            await stub.Abort(pb.AbortRequest(request_id="one", request_ids=["three", "nobody's"]))
            assert frontend.aborted_by_name == [("", ["one", "three", "nobody's"])]
            for call in (calls[0], calls[2]):
                messages = [message async for message in call]
                assert messages[-1].chunks[-1].finish_reason == pb.FINISH_REASON_ABORT
            assert len(frontend.aborted) == 2
            # What another front was asked for.
            frontend.on_abort_by_name("", ["two"])
            messages = [message async for message in calls[1]]
            assert messages[-1].chunks[-1].finish_reason == pb.FINISH_REASON_ABORT
            assert "request_ids must have at least one id" in await refused(stub.Abort(pb.AbortRequest()))

    run(main())
