"""Hostile input to every method: nothing holds a front's event loop.

What is measured is the processor time of the loop's thread between two turns of a task: other threads and other programs
of the machine do not count.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import threading
import time

import grpc
import pytest
from helpers import tokenizer_files
from helpers.fake_controller import INFO, ThreadController
from helpers.slow import slow_but

from expertwire.deploy.grpc import calls
from expertwire.deploy.grpc.catalog import Catalog
from expertwire.deploy.grpc.server import Server
from expertwire.deploy.proto import expertwire_v1_pb2 as pb
from expertwire.engine.frontend.frontend import Frontend
from expertwire.engine.frontend.text_workers import TextWorkers
from expertwire.engine.frontend.tokenizer import Tokenizer
from expertwire.strategies import MajorityVote, Needs, registry

# The aim is 20 ms; processors differ by more than the rest.
HELD_S = 0.04
METHODS = [method.name for method in calls.SERVICE.methods]
WORDS = "Once upon a time there was a text that had no end. "


def generate(**fields):
    params = fields.pop("params", {})
    if "chat" in fields:
        fields["chat"] = pb.Chat(messages=fields["chat"])
    if "ids" in fields:
        fields["token_ids"] = pb.TokenIds(ids=fields.pop("ids"))
    return pb.GenerateRequest(sampling_params=pb.SamplingParams(**{"max_tokens": 1, **params}), **fields)


def chat(content):
    return '[{"role": "user", "content": ' + content + "}]"


LARGE = {
    "text of 1 MB": lambda: generate(text=WORDS * 20_000),
    "text of 4 MB": lambda: generate(text=WORDS * 80_000),
    "one word of 1 MB": lambda: generate(text="a" * 1_000_000),
    "chat of 1 MB": lambda: generate(chat=chat('"' + WORDS * 20_000 + '"')),
    "chat of many messages": lambda: generate(chat="[" + ",".join([chat('"a"')[1:-1]] * 50_000) + "]"),
    "deep chat": lambda: generate(chat=chat("[" * 100_000 + "]" * 100_000)),
    "deep chat without an end": lambda: generate(chat=chat("[" * 1_000_000)),
    "token ids": lambda: generate(ids=[5] * 1_000_000),
    "many stop strings": lambda: generate(ids=[5], params={"stop": [f"~{i}" for i in range(1024)]}),
    "too many stop strings": lambda: generate(ids=[5], params={"stop": [f"~{i}" for i in range(50_000)]}),
    "more stop strings": lambda: generate(ids=[5], params={"stop": ["a"] * 2_500_000}),
    "long stop strings": lambda: generate(ids=[5], params={"stop": ["a" * 1_000_000]}),
    "many stop tokens": lambda: generate(ids=[5], params={"stop_token_ids": range(1_000_000)}),
    "many biases": lambda: generate(ids=[5], params={"logit_bias": dict.fromkeys(range(100_000), 1.0)}),
    "log-probabilities of a prompt": lambda: generate(ids=[5] * 8000, params={"prompt_logprobs": 64}),
    "log-probabilities of many outputs": lambda: generate(
        ids=[5], params={"n": 128, "max_tokens": 20, "logprobs": 64, "stop": [f"~{i}" for i in range(1024)]}
    ),
}


STRATEGIES = {
    "a regular expression that backtracks": {"regex": {"pattern": "(a+)+$"}},
    "a regular expression with a match a character": {"regex": {"pattern": "(?:.*~~)|."}},
    "a regular expression of many groups": {"regex": {"pattern": "((a)|(b)|(c)|(d)|(e)|(f))*~~|."}},
    "a pointer into text": {"json_pointer": {"pointer": "/a"}},
    "boxes": {"boxed": {}},
}


def vote(answer):
    strategy = pb.Strategy(majority_vote={"n": 64, "answer": answer})
    return generate(ids=[5], params={"max_tokens": 600, "ignore_eos": True}, strategy=strategy)


class Blocking:
    """An extractor of the server's own, which returns when it is let go."""

    def __init__(self):
        self.is_called, self.may_return = threading.Event(), threading.Event()
        self.was_let_go = False

    def __call__(self, text):
        self.is_called.set()
        self.was_let_go = self.may_return.wait(30)
        return text[:1]


BLOCKING = Blocking()


@dataclasses.dataclass(frozen=True)
class Patient:
    """A vote over what `BLOCKING` extracts."""

    @property
    def needs(self):
        return Needs(answer=BLOCKING)

    decide = MajorityVote(2, answer=BLOCKING).decide
    select = MajorityVote(2, answer=BLOCKING).select


class Monitor:
    """The longest processor time of the loop's thread between two of its turns."""

    def __init__(self):
        self.longest_s = 0.0

    async def watch(self):
        last = time.thread_time()
        while True:
            await asyncio.sleep(0)
            now = time.thread_time()
            self.longest_s, last = max(self.longest_s, now - last), now


@contextlib.asynccontextmanager
async def serving(folder):
    info = dataclasses.replace(INFO, max_model_len=32_768, max_num_seqs=256)
    controller = ThreadController(info, all_top=True)
    frontend = Frontend(controller.frontend_channel, Tokenizer.open(folder))
    stop, server, catalog = (
        asyncio.Event(),
        Server("127.0.0.1", 0),
        Catalog(strategies={**registry.STRATEGIES, "patient": Patient}),
    )
    with contextlib.closing(TextWorkers(frontend, str(folder))) as texts:
        serving = server.serve(frontend, stop=stop, drain_timeout_s=1.0, texts=texts, catalog=catalog)
        task = asyncio.ensure_future(serving)
        yield f"127.0.0.1:{server.port}"
        stop.set()
        await task
    controller.close()


def call(address, method, message):
    """Call a method from a thread of its own; return the status."""
    with grpc.insecure_channel(address) as channel:
        try:
            for _ in channel.unary_stream(f"/{calls.SERVICE.full_name}/{method}")(message, timeout=60):
                pass
        except grpc.RpcError as error:
            return error.code().name
    return "OK"


async def held_by(address, method, message):
    """The longest that the loop was held while a call was served, and the call's status."""
    monitor = Monitor()
    watching = asyncio.ensure_future(monitor.watch())
    status = await asyncio.to_thread(call, address, method, message)
    watching.cancel()
    return monitor.longest_s, status


async def held_each_time(address, method, message):
    """Return the least of up to three calls: a busy machine makes one slow, and what holds the loop holds it every time."""
    found = [await held_by(address, method, message)]
    while found[-1][0] > HELD_S and len(found) < 3:
        found.append(await held_by(address, method, message))
    return min(found)


def test_the_monitor_notices():
    async def run():
        monitor = Monitor()
        watching = asyncio.ensure_future(monitor.watch())
        await asyncio.sleep(0)
        end = time.thread_time() + 2 * HELD_S
        while time.thread_time() < end:
            pass
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        watching.cancel()
        assert monitor.longest_s > HELD_S

    asyncio.run(run())


def test_others_are_served_while_answers_are_extracted(tmp_path):
    folder = tokenizer_files.write(tmp_path, "byte_level")

    async def run():
        async with serving(folder) as address:
            strategy = pb.Strategy(custom={"name": "patient", "options": "{}"})
            request = generate(ids=[5], params={"max_tokens": 300, "ignore_eos": True}, strategy=strategy)
            slow = asyncio.create_task(asyncio.to_thread(call, address, "Generate", request.SerializeToString()))
            await asyncio.to_thread(BLOCKING.is_called.wait, 30)
            assert await asyncio.to_thread(call, address, "Generate", generate(ids=[5]).SerializeToString()) == "OK"
            assert not slow.done()
            BLOCKING.may_return.set()
            assert await slow == "OK"

    asyncio.run(run())
    assert BLOCKING.was_let_go


@pytest.mark.parametrize("name", slow_but(["a regular expression with a match a character"], STRATEGIES))
def test_no_strategy_holds_the_loop(tmp_path, name):
    folder = tokenizer_files.write(tmp_path, "byte_level")

    async def run():
        async with serving(folder) as address:
            request = vote(STRATEGIES[name]).SerializeToString()
            return await held_each_time(address, "GenerateUnary", request)

    seconds, status = asyncio.run(run())
    print(f"{1e3 * seconds:6.1f} ms  {status:20} {name}")
    assert status == "OK" and seconds <= HELD_S


@pytest.mark.slow
def test_nothing_holds_the_loop(tmp_path):
    folder = tokenizer_files.write(tmp_path, "byte_level")

    async def run():
        held = {}
        async with serving(folder) as address:
            for _ in range(2):  # the first call of a kind imports and warms up
                for method in METHODS:
                    for name, data in (("nothing", b""), ("noise", bytes(range(256)) * 4096)):
                        held[f"{method}: {name}"] = await held_each_time(address, method, data)
            for name, make in LARGE.items():
                message = make().SerializeToString()
                held[name] = await held_each_time(address, "Generate", message)
        return held

    held = asyncio.run(run())
    print(*(f"{1e3 * seconds:6.1f} ms  {status:20} {name}" for name, (seconds, status) in held.items()), sep="\n")
    assert {status for _, status in held.values()}.isdisjoint({"UNKNOWN", "DEADLINE_EXCEEDED", "CANCELLED"})
    assert [name for name, (seconds, _) in held.items() if seconds > HELD_S] == []
