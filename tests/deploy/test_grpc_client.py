"""The sync client against the server, over a frontend that answers by itself."""

from __future__ import annotations

import asyncio
import dataclasses
import threading

import pytest
from helpers import chat_templates, fake_frontend

from expertwire.deploy.grpc.async_client import AsyncClient
from expertwire.deploy.grpc.client import Client, ServerError
from expertwire.deploy.grpc.server import Server
from expertwire.engine.frontend.api import Logprob, RequestError, RequestOptions
from expertwire.engine.frontend.chat import Chat
from expertwire.engine.frontend.tokenizer import Tokenizer

STATS = {
    "num_running": 2, "num_waiting": 0, "held": 0, "running": [1, 1], "outstanding_tokens": [5, 6],
    "blocks": {"kv": 9}, "blocks_used": {"kv": [0, 5]}, "expert_load": [[1, 2, 3], [4, 5, 6]],
}  # fmt: skip


class EchoFrontend(fake_frontend.FakeFrontend):
    """Answers a prompt with itself, letter by letter; one that ends in "..." never ends. Tenant "busy" is to wait."""

    num_refusals = 0

    def submit(self, prompt, params, options, **other):
        number = super().submit(prompt, params, options, **other)
        text = "".join(chr(token) for token in prompt)
        if options.tenant == "soon" and self.num_refusals:
            self.num_refusals -= 1
            self.push(number, error=RequestError("RESOURCE_EXHAUSTED", "soon", 0.05), token_ids=())
        if options.tenant == "busy":
            self.push(number, error=RequestError("RESOURCE_EXHAUSTED", "wait", 0.25), token_ids=())
        for branch in range(params.n):
            for letter in text.removesuffix("..."):
                logprobs = None if params.logprobs is None else ({ord(letter): Logprob(-1.5, 2, letter)},)
                self.push(number, branch, letter, token_ids=(ord(letter),), logprobs=logprobs)
            if not text.endswith("..."):
                stop = {"finish_reason": "stop", "stop_reason": "##"} if params.stop else {"finish_reason": "length"}
                stop["expert_load"] = [[branch, 2**40], [0, 0]] if params.expert_load else None
                self.push(number, branch, token_ids=(), num_cached_tokens=len(text) - 1, **stop)
        return number


@pytest.fixture(scope="module")
def server():
    """A server in a thread: its address, frontend and loop."""
    ready, running = threading.Event(), {}

    async def main():
        stop, frontend, server = asyncio.Event(), EchoFrontend(), Server("127.0.0.1", 0)
        loop = asyncio.get_running_loop()
        running.update(address=f"127.0.0.1:{server.port}", frontend=frontend, loop=loop, stop=stop)
        frontend.stats_values = STATS
        await server.serve(frontend, stop=stop, drain_timeout_s=5, on_ready=ready.set)

    thread = threading.Thread(target=asyncio.run, args=(main(),))
    thread.start()
    assert ready.wait(30)
    yield running
    running["loop"].call_soon_threadsafe(running["stop"].set)
    thread.join(30)
    assert not thread.is_alive()


@pytest.fixture
def serve_family(server, tmp_path):
    """Gives the server a tokenizer with the chat template of a family, until the test ends."""
    frontend = server["frontend"]
    info = frontend.model_info

    def serve(name):
        frontend.tokenizer = Tokenizer.open(chat_templates.write(tmp_path, chat_templates.FAMILIES[name]))
        frontend.model_info = dataclasses.replace(info, vocab_size=frontend.tokenizer.vocab_size)
        return frontend.tokenizer

    yield serve
    frontend.tokenizer, frontend.model_info = None, info


@pytest.fixture
def client(server):
    with Client(server["address"]) as client:
        yield client


def test_text_comes_in_pieces_and_usage_at_the_end(client):
    generation = client.generate([72, 73, 74], temperature=0, max_tokens=9)
    chunks = list(generation)
    assert "".join(chunk.text for chunk in chunks) == "HIJ"
    assert [token for chunk in chunks for token in chunk.token_ids] == [72, 73, 74]
    assert chunks[-1].finish_reason == "length" and chunks[-1].stop_reason is None and chunks[-1].logprobs is None
    usage = generation.usage
    counts = (
        usage.prompt_tokens,
        usage.completion_tokens,
        usage.seed,
        usage.cached_prompt_tokens,
        usage.reasoning_tokens,
    )
    assert counts == (3, 3, 77, 2, 0)
    assert 0 < usage.time_to_first_token_s <= usage.total_time_s


def test_options_of_a_request(server, client):
    list(client.generate([65], priority=-1, tenant="acme", cache_salt="s"))
    assert server["frontend"].options[-1] == RequestOptions(priority=-1, tenant="acme", cache_salt="s")
    with pytest.raises(ServerError, match="wait") as caught:
        list(client.generate([65], tenant="busy"))
    assert (caught.value.code, caught.value.retry_after_s) == ("RESOURCE_EXHAUSTED", 0.25)
    for options in ({"priority": 2**31}, {"priority": "high"}, {"tenant": 5}):
        with pytest.raises(ValueError, match=next(iter(options))):
            client.generate([65], **options)


def test_branches_log_probabilities_and_stop_reasons(client):
    chunks = list(client.generate([65], n=2, logprobs=0, stop="##"))
    assert sorted(chunk.branch for chunk in chunks if chunk.finish_reason) == [0, 1]
    assert {chunk.stop_reason for chunk in chunks if chunk.finish_reason} == {"##"}
    entries = [entry for chunk in chunks for entry in chunk.logprobs or ()]
    assert entries == [{65: Logprob(-1.5, 2, "A")}] * 2


def test_the_experts_of_a_branch_come_with_its_end(client):
    chunks = list(client.generate([65], n=2, expert_load=True))
    ends = {chunk.branch: chunk.expert_load for chunk in chunks if chunk.finish_reason}
    assert ends == {branch: [[branch, 2**40], [0, 0]] for branch in (0, 1)}
    assert all(chunk.expert_load is None for chunk in [*client.generate([65])])


def test_errors_have_code_and_message(client):
    with pytest.raises(ServerError, match="temperature") as caught:
        list(client.generate("a", temperature=-1.0))
    assert (caught.value.code, caught.value.retry_after_s) == ("INVALID_ARGUMENT", None)
    client.abort("nobody")  # not an error: it may just have ended
    with pytest.raises(ValueError, match="no sampling parameter is called temprature; there are temperature"):
        client.generate("a", temprature=0)
    with pytest.raises(ValueError, match="max_tokens"):
        client.generate("a", max_tokens="many")


def test_a_chat_becomes_the_prompt_of_its_template(server, client, serve_family):
    tokenizer, messages = serve_family("deepseek_v31"), chat_templates.TURNS
    for options, opens in (
        ({}, False),
        ({"thinking": True}, True),
        ({"chat_template_kwargs": {"thinking": True}}, True),
    ):
        generation = client.chat(messages, tools=chat_templates.TOOLS, max_tokens=3, tenant="acme", **options)
        list(generation)
        tokens, params = server["frontend"].submitted[-1]
        chat = Chat(messages=messages, tools=chat_templates.TOOLS, **options)
        assert tokens == tokenizer.encode_chat(chat)
        assert tokenizer.decode(tokens, skip_special_tokens=False).endswith("<think>") is opens
        assert generation.opens_reasoning is opens
        assert (params.max_tokens, server["frontend"].options[-1].tenant) == (3, "acme")
    options = {"add_generation_prompt": False, "continue_final_message": True}
    list(client.chat(messages[:3], **options))
    assert server["frontend"].submitted[-1][0] == tokenizer.encode_chat(Chat(messages=messages[:3], **options))


def test_an_effort_that_the_template_does_not_read_sets_a_budget(server, client, serve_family):
    tokenizer, messages = serve_family("qwen3"), chat_templates.QUESTION
    options = {"tenant": "acme", "max_tokens": 50}
    for effort, budget in (("none", 0), ("low", 10), ("high", 40)):
        for more, expected in (({}, budget), ({"thinking_budget": 7}, 7)):
            list(client.chat(messages, reasoning_effort=effort, **options, **more))
            tokens, params = server["frontend"].submitted[-1]
            assert tokens == tokenizer.encode_chat(Chat(messages=messages, thinking=effort != "none"))
            assert params.thinking_budget == expected
    list(client.chat(messages, thinking=True, **options))
    assert server["frontend"].submitted[-1][1].thinking_budget is None
    serve_family("granite_4")
    with pytest.raises(ServerError, match="does not read reasoning_effort"):
        list(client.chat(messages, reasoning_effort="low", **options))


def test_a_prompt_of_text_may_open_the_reasoning_too(client, serve_family):
    tokenizer = serve_family("deepseek_r1")
    for text, opens in (("<think>\n", True), ("<think>\n\n</think>", False), ("<think> is a word", False)):
        for prompt in (text, tokenizer.encode("x" * 50 + text)):
            generation = client.generate(prompt)
            list(generation)
            assert generation.opens_reasoning is opens
    serve_family("mistral")  # whose delimiters are special tokens
    generation = client.generate("[INST]x[/INST][THINK]")
    list(generation)
    assert generation.opens_reasoning


def test_what_a_server_says_of_its_output_format(client, serve_family):
    assert client.model_info()["output_format"] == {}
    tokenizer = serve_family("gpt_oss")
    info = client.model_info()
    assert list(info["chat_variables"]) == list(tokenizer.chat_variables) == ["model_identity", "reasoning_effort"]
    output_format = info["output_format"]
    assert output_format["reasoning_start"] == "<|channel|>analysis<|message|>"
    assert output_format["reasoning_efforts"] == ["low", "medium", "high"]
    assert output_format["name"] == "harmony"


def test_chats_that_cannot_be_rendered(client, serve_family):
    messages = [{"role": "user", "content": "a"}]
    serve_family("gpt_oss")
    for options, error in (
        ({"reasoning_effort": "very"}, "reasoning_effort must be one of low, medium, high, got 'very'"),
        (
            {"thinking": True},
            "thinking: the chat template does not read enable_thinking or thinking; it reads model_identity",
        ),
        ({"chat_template_kwargs": {"efort": 1}}, "chat_template_kwargs: .* does not read efort; it reads"),
    ):
        with pytest.raises(ServerError, match=error) as caught:
            list(client.chat(messages, **options))
        assert caught.value.code == "INVALID_ARGUMENT"
    for options, error in (
        ({"thinking": "yes"}, "thinking must be True"),
        ({"tools": {}}, "tools must be a list"),
        ({"temprature": 0}, "no sampling parameter is called temprature"),
    ):
        with pytest.raises(ValueError, match=error):
            client.chat(messages, **options)
    with pytest.raises(ValueError, match="messages must be a JSON value"):
        client.chat([{"role": "user", "content": b"a"}])


def test_abort_from_elsewhere_ends_the_stream(client):
    generation = client.generate([65, *b"..."], request_id="endless")
    chunks = iter(generation)
    assert next(chunks).text == "A"
    client.abort("endless")
    assert [chunk.finish_reason for chunk in chunks] == ["abort"]
    assert generation.usage.completion_tokens == 1


def test_leaving_a_stream_early_aborts_its_request(server, client):
    for chunk in client.generate([66, *b"..."], request_id="left"):
        assert chunk.text == "B"
        break
    number = len(server["frontend"].submitted) - 1
    # The id is free again once the server has noticed.
    while number not in server["frontend"].aborted:
        list(client.generate([65]))


def test_model_info_stats_and_health(server, client):
    info = client.model_info()
    assert (info["name"], info["vocab_size"], list(info["eos_token_ids"])) == ("fake", 100, [2, 3])
    assert client.stats() == STATS
    assert client.is_serving()
    with Client("127.0.0.1:1", timeout_s=5) as nobody:
        assert not nobody.is_serving()
        with pytest.raises(ServerError, match="UNAVAILABLE"):
            nobody.model_info()


def test_queries(server, client, serve_family):
    tokenizer = serve_family("deepseek_v31")
    tokens = client.tokenize("hello there")
    assert tokens == tokenizer.encode("hello there")
    assert client.detokenize(tokens) == tokenizer.decode(tokens)
    assert client.tokenize(Chat(messages=chat_templates.TURNS)) == tokenizer.encode_chat(
        Chat(messages=chat_templates.TURNS)
    )
    assert client.loads()["ranks"][1]["blocks_used"] == {"kv": 5}
    assert client.flush_cache() == {"full": 7}
    watching = client.watch_experts(interval_s=0.1)
    assert [next(watching), next(watching)] == [STATS["expert_load"]] * 2
    watching.close()


@pytest.mark.parametrize("retries", [0, 1, 2])
def test_refused_calls_are_tried_again(server, retries):
    """The server refuses tenant "soon" twice, each time for a moment."""
    server["frontend"].num_refusals = 2
    with Client(server["address"], retries=retries) as client:
        generation = client.generate([65], tenant="soon")
        if retries == 2:
            assert "".join(chunk.text for chunk in generation) == "A"
        else:
            with pytest.raises(ServerError, match="RESOURCE_EXHAUSTED: soon"):
                list(generation)
    assert server["frontend"].num_refusals == 1 - retries + (retries == 2)


def test_retries_are_bounded():
    with pytest.raises(ValueError, match=r"retries must be an integer in \[0, 4\], got 5"):
        Client(retries=5)


def test_an_asyncio_client_does_the_same(server, client, serve_family):
    tokenizer = serve_family("deepseek_v31")

    async def main():
        async with AsyncClient(server["address"], timeout_s=20) as other:
            generation = other.generate([72, 73, 74], temperature=0, n=2)
            chunks = [chunk async for chunk in generation]
            assert "".join(chunk.text for chunk in chunks if chunk.branch == 1) == "HIJ"
            assert generation.usage.completion_tokens == 6
            chat = other.chat(chat_templates.TURNS, max_tokens=3, thinking=True)
            assert [chunk async for chunk in chat][-1].finish_reason == "length" and chat.opens_reasoning
            with pytest.raises(ServerError, match="temperature"):
                async for _ in other.generate("a", temperature=-1.0):
                    pass
            assert await other.tokenize("hello") == tokenizer.encode("hello")
            assert await other.detokenize(tokenizer.encode("hello")) == "hello"
            assert await other.model_info() == client.model_info()
            assert await other.stats() == client.stats()
            assert await other.loads() == client.loads()
            assert await other.flush_cache() == client.flush_cache()
            endless = other.generate([65, 46, 46, 46])
            async for chunk in endless:
                await other.abort(endless.request_id)
                if chunk.finish_reason:
                    assert chunk.finish_reason == "abort"
            watching = other.watch_experts(interval_s=0.1)
            assert await anext(watching) == STATS["expert_load"]
            await watching.aclose()

    asyncio.run(asyncio.wait_for(main(), 60))
