"""Tokenising in processes: like on the loop, and what no text, template or crash can do to the front."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time

import numpy as np
import psutil
import pytest
from helpers import tokenizer_files
from helpers.fake_controller import INFO, HandController

from expertwire.engine.frontend.api import RequestFailed
from expertwire.engine.frontend.chat import ChatText
from expertwire.engine.frontend.frontend import Frontend
from expertwire.engine.frontend.text_workers import TextLimits, TextWorkers
from expertwire.engine.frontend.tokenizer import Tokenizer
from expertwire.scheduler.sampling_params import SamplingParams

pytestmark = pytest.mark.new_interpreters  # which are found by their command
PARAMS = SamplingParams(max_tokens=1)
LONG = "The quick brown fox jumps. " * 400  # more than what is tokenised on the loop
WIDE = dataclasses.replace(INFO, max_model_len=100_000)


def chat(content="hi", **fields):
    return ChatText(fields={"messages": f'[{{"role": "user", "content": "{content}"}}]', **fields})


def kind(template):
    """A template that does something else for one message."""
    return (
        f"{{% for message in messages %}}{{% if message.content == 'attack' %}}{template}{{% else %}}{{{{ message.content }}}}"
        "{% endif %}{% endfor %}"
    )


@contextlib.asynccontextmanager
async def texts(tmp_path, *, info=WIDE, template=None, tokenizer="byte_level", **limits):
    folder = tokenizer_files.write(tmp_path, tokenizer)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    controller = HandController(info)
    frontend = Frontend(controller.frontend_channel, Tokenizer.open(folder))
    with contextlib.closing(TextWorkers(frontend, str(folder), TextLimits(**limits))) as workers:
        yield workers, frontend
    controller.close()


def command(process):
    """Return a process's command line; nothing for one that has ended. For an instant after `exec` it is still empty."""
    try:
        while not (words := process.cmdline()):
            time.sleep(0.001)
    except psutil.NoSuchProcess:  # or a zombie
        return ""
    return " ".join(words)


def worker_pids():
    return {child.pid for child in psutil.Process().children() if "expertwire.engine.process" in command(child)}


async def failure(awaitable):
    with pytest.raises((ValueError, RequestFailed)) as caught:
        await awaitable
    return str(caught.value)


def test_tokens_and_texts_are_those_of_the_tokenizer(tmp_path):
    async def run():
        before = worker_pids()
        async with texts(tmp_path) as (workers, frontend):
            assert len(worker_pids() - before) == 2
            for prompt in (LONG, LONG + "größer 🙂", chat("größer <|im_end|>"), chat(LONG), "short", [5, 6]):
                expected = frontend.encode(prompt, PARAMS)
                found = await workers.encode(prompt, PARAMS, client="a")
                assert found.dtype == expected.dtype == np.int32
                assert found.tolist() == expected.tolist()
            tokens = await workers.tokenize(LONG, client="a", add_special_tokens=False)
            assert tokens.tolist() == frontend.tokenizer.encode(LONG, add_special_tokens=False)
            assert await workers.detokenize(tokens, client="a") == LONG
        assert worker_pids() == before

    asyncio.run(run())


def test_a_worker_keeps_little_of_what_a_large_text_took(tmp_path):
    async def run():
        before = worker_pids()
        # One, because another might still load its tokenizer when memory is measured first.
        info = dataclasses.replace(INFO, max_model_len=4_000_000)
        async with texts(tmp_path, info=info, num_workers=1) as (workers, _):
            await workers.encode(LONG, PARAMS, client="a")
            [pid] = worker_pids() - before
            small = psutil.Process(pid).memory_info().rss
            assert len(await workers.encode(LONG * 100, PARAMS, client="a")) > 100_000
            await workers.encode(LONG, PARAMS, client="a")  # it returns memory before it takes another task
            kept = psutil.Process(pid).memory_info().rss - small
            assert kept < 16 * len(LONG) * 100

    asyncio.run(run())


@pytest.mark.parametrize("tokenizer", ["byte_level", "byte_fallback"])
def test_no_text_that_fits_is_too_large(tmp_path, tokenizer):
    backend = Tokenizer.open(tokenizer_files.write(tmp_path, tokenizer))
    for text in (
        *tokenizer_files.CORPUS[:5],
        "the fox " * 50,
        " " * 40,
        "<|im_start|><|im_end|>" * 9,
        "ﬁ👩‍👩‍👧‍👦é̂" * 9,
    ):
        num_tokens = len(backend.encode(text, add_special_tokens=False))
        assert len(text.encode()) <= backend.max_token_bytes * num_tokens, text
    assert backend.max_token_bytes < 100


@pytest.mark.parametrize("tokenizer", ["word_level", "unigram"])
def test_tokenizers_that_drop_text_have_an_assumed_bound(tmp_path, tokenizer):
    assert Tokenizer.open(tokenizer_files.write(tmp_path, tokenizer)).max_token_bytes == 256


def test_too_large_texts_are_refused_by_their_size(tmp_path):
    async def run():
        async with texts(tmp_path, info=INFO) as (workers, _):
            allowed = workers.max_text_bytes
            for field, prompt in (("text", "a" * 60_000_000), ("messages", chat("a" * 30_000_000))):
                assert f"{field} has" in (message := await failure(workers.encode(prompt, PARAMS, client="a")))
                assert f"{allowed * (6 if field == 'messages' else 1)} bytes" in message
            assert "max_model_len" in await failure(workers.encode("a " * (allowed // 4), PARAMS, client="a"))
            # The parameters come first.
            bad = SamplingParams(max_tokens=1, stop_token_ids=[10**6])
            assert "stop_token_ids" in await failure(workers.encode(chat("{"), bad, client="a"))

    asyncio.run(run())


ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "limits", "message"),
    [
        (ENDLESS, {"timeout_s": 1.0}, "INVALID_ARGUMENT: prompt: to render and tokenise it must take at most 1 s"),
        ("{{ 'a' * 3000000000 }}", {"memory_bytes": 1 << 28}, "must take at most 256 MiB of memory"),
        ("{% for a in range(99999) %}" + "a" * 100_000 + "{% endfor %}", {}, "its text must have at most"),
        ("{{ raise_exception('no') }}", {}, "the chat template cannot render these messages: no"),
    ],
)
def test_a_hostile_template_costs_its_own_request(tmp_path, template, limits, message):
    async def run():
        async with texts(tmp_path, template=kind(template), **limits) as (workers, frontend):
            for _ in range(3):
                attack = asyncio.ensure_future(failure(workers.encode(chat("attack"), PARAMS, client="attacker")))
                tokens = await workers.encode(chat("fox"), PARAMS, client="good")
                assert tokens.tolist() == frontend.tokenizer.encode("fox", add_special_tokens=False)
                assert message in await attack

    asyncio.run(run())


def test_a_client_takes_its_turn(tmp_path):
    async def run():
        async with texts(tmp_path, template=kind(ENDLESS), timeout_s=60.0) as (workers, _):
            endless = asyncio.ensure_future(workers.encode(chat("attack"), PARAMS, client="attacker"))
            queued = [asyncio.ensure_future(workers.encode(chat(), PARAMS, client="attacker")) for _ in range(9)]
            for _ in range(3):  # one worker is left to others, however many tasks wait before theirs
                await workers.encode(chat(), PARAMS, client="good")
            assert not endless.done() and not any(task.done() for task in queued)
            queued[0].cancel()
            endless.cancel()

    asyncio.run(run())


def test_waiting_texts_are_bounded_by_client(tmp_path):
    async def run():
        async with texts(tmp_path, template=kind(ENDLESS), waiting_bytes=40_000) as (workers, _):
            tasks = [asyncio.ensure_future(workers.encode(chat("attack"), PARAMS, client="a")) for _ in range(2)]
            await asyncio.sleep(0)
            tasks += [asyncio.ensure_future(workers.encode(chat("b" * 6000), PARAMS, client="a")) for _ in range(2)]
            assert "RESOURCE_EXHAUSTED" in await failure(tasks.pop())
            await workers.encode(chat("b" * 6000), PARAMS, client="b")

    asyncio.run(run())


def test_a_worker_that_is_killed_is_replaced(tmp_path):
    async def run():
        before = worker_pids()
        async with texts(tmp_path, template=kind(ENDLESS), timeout_s=60.0) as (workers, _):
            await workers.encode(chat(), PARAMS, client="a")
            attack = asyncio.ensure_future(failure(workers.encode(chat("attack"), PARAMS, client="a")))
            await asyncio.sleep(0.1)
            killed = worker_pids() - before
            for pid in killed:
                psutil.Process(pid).kill()
            assert "INTERNAL: the process that tokenised this prompt was killed by SIGKILL" in await attack
            # A task that a dead process is given before its end is noticed fails, too.
            while any(map(psutil.pid_exists, killed)):
                await asyncio.sleep(0.05)
            while len(worker_pids() - before) < 2:  # one that was killed while it started is replaced after a pause
                await asyncio.sleep(0.05)
            await workers.encode(chat(), PARAMS, client="a")

    asyncio.run(run())


def test_a_worker_that_cannot_start_fails_what_waits(tmp_path):
    async def run():
        async with texts(tmp_path) as (workers, _):
            for file in tmp_path.iterdir():
                file.unlink()
            message = await failure(workers.encode(LONG, PARAMS, client="a"))
            assert "UNAVAILABLE: the tokenizer's process could not start: it exited with code 1" in message

    asyncio.run(run())
