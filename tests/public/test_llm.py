"""The offline API over an engine that a thread plays."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
import time

import numpy as np
import pytest
from helpers import chat_templates, tokenizer_files
from helpers.fake_controller import INFO, ThreadController, next_token

import expertwire
from expertwire.deploy import runtime
from expertwire.engine.frontend.api import EngineFailed, Logprob, RequestOptions
from expertwire.engine.frontend.chat import Chat
from expertwire.generation import delayed_interrupt

SamplingParams = expertwire.SamplingParams
CHAT = [{"role": "user", "content": "fox"}]


def info_of(config):
    limit = config.max_queued_requests
    return dataclasses.replace(
        INFO,
        seed=config.seed,
        max_queued_requests=limit,
        max_queued_requests_per_tenant=config.max_queued_requests_per_tenant or limit,
    )


class FakeEngine:
    def __init__(self, config, **options):
        self.config = config
        self.controller = ThreadController(info_of(config), **options)
        self.closed = 0

    def connect(self):
        return self.controller.frontend_channel

    def close(self):
        self.closed += 1
        self.controller.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tokenizer_files.write(tmp_path_factory.mktemp("model"), "byte_level")


@pytest.fixture
def start(model, monkeypatch):
    """Starts an `LLM` whose engine has these options; gives it and the engine."""
    llms = []

    def start(folder=model, config=None, **options):
        engines = []

        def start_engine(config, launcher, end_of_turn_ids, thinking):
            engines.append(FakeEngine(config, **options))
            return engines[0]

        monkeypatch.setattr(runtime, "Engine", start_engine)
        llms.append(expertwire.LLM(folder, **(config or {})))
        return llms[-1], engines[0]

    yield start
    for llm in llms:
        llm.close()


def expected(prompt, count, branch=0):
    return [next_token(prompt, branch, i) for i in range(count)]


def test_prompts_of_every_form_in_their_order(start):
    llm, engine = start()
    assert llm.model_info == dataclasses.replace(INFO, seed=0)
    text = "The quick brown"
    ids = llm.tokenizer.encode(text)
    lists = [[i, i + 1] for i in range(1, 30)]
    prompts = [text, *lists, np.array([5, 6]), (7, 8), {"prompt": text}, {"prompt_token_ids": [9]}]
    params = [SamplingParams(max_tokens=1 + i % 7) for i in range(len(prompts))]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    as_ids = [ids, *lists, [5, 6], [7, 8], ids, [9]]
    assert [output.prompt_token_ids for output in outputs] == as_ids
    assert [output.prompt for output in outputs] == [text, *[None] * 31, text, None]
    for output, prompt, param in zip(outputs, as_ids, params, strict=True):
        [completion] = output.outputs
        assert completion.token_ids == expected(prompt, param.max_tokens)
        assert completion.text == llm.tokenizer.decode(completion.token_ids)
        assert (completion.finish_reason, completion.logprobs, completion.cumulative_logprob) == ("length", None, None)
        assert output.finished
    assert len({output.request_id for output in outputs}) == len(outputs)
    assert engine.controller.num_requests == 0


@pytest.mark.parametrize("prompt", ["hello", [3, 4, 5], {"prompt_token_ids": [3]}])
def test_one_prompt_without_parameters(start, prompt):
    llm, _ = start()
    [output] = llm.generate(prompt, use_tqdm=False)
    assert len(output.outputs[0].token_ids) == INFO.max_model_len - len(output.prompt_token_ids)


def test_no_prompts(start):
    llm, _ = start()
    assert llm.generate([], use_tqdm=False) == []


def test_branches_logprobs_and_seeds(start):
    llm, _ = start()
    params = SamplingParams(n=3, logprobs=1, prompt_logprobs=0, max_tokens=4, seed=11)
    [output] = llm.generate([[10, 11, 12]], params, use_tqdm=False)
    assert [entry and {token: pair[:2] for token, pair in entry.items()} for entry in output.prompt_logprobs] == [
        None,
        {11: (-1.0, 1)},
        {12: (-2.0, 1)},
    ]
    for index, completion in enumerate(output.outputs):
        assert completion.index == index
        assert completion.seed == 11
        assert completion.token_ids == expected([10, 11, 12], 4, index)
        assert completion.logprobs == [
            {token: Logprob(-0.5, 1, llm.tokenizer.token_text(token))} for token in completion.token_ids
        ]
        assert completion.cumulative_logprob == -2.0


def test_seeds_follow_from_the_engines_seed(start):
    def seeds(**config):
        llm, _ = start(config=config)
        return [output.outputs[0].seed for output in llm.generate([[1], [2]], use_tqdm=False)]

    assert seeds(seed=3) == seeds(seed=3)
    assert seeds(seed=3) != seeds(seed=4)


def test_stop_strings(start):
    llm, engine = start()
    whole = llm.generate([[1, 2]], SamplingParams(max_tokens=12), use_tqdm=False)[0].outputs[0].text
    stop = whole[5:8]
    [output] = llm.generate([[1, 2]], SamplingParams(max_tokens=12, stop=stop), use_tqdm=False)
    assert output.outputs[0].text == whole[: whole.index(stop)]
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", stop)
    llm.stats()  # the engine has heard everything before
    assert engine.controller.aborted


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_chat(start, kind, tmp_path):
    llm, _ = start(tokenizer_files.write(tmp_path, kind))
    chats = [[{"role": "user", "content": word}] for word in ("fox", "dog")]
    outputs = llm.chat(chats, SamplingParams(max_tokens=2), use_tqdm=False)
    for chat, output in zip(chats, outputs, strict=True):
        assert output.prompt == llm.tokenizer.render_chat(Chat(messages=chat))
        assert output.prompt_token_ids == llm.tokenizer.encode_chat(Chat(messages=chat))
    [alone] = llm.chat(chats[1], SamplingParams(max_tokens=2), use_tqdm=False)
    assert alone.outputs[0].token_ids == outputs[1].outputs[0].token_ids
    options = {"chat_template": "{{ messages[0].content }}{{ more }}", "chat_template_kwargs": {"more": "!"}}
    assert llm.chat(chats[0], use_tqdm=False, **options)[0].prompt == "fox!"
    for bad in ([], {"role": "user"}, [chats[0], []]):
        with pytest.raises(ValueError, match="non-empty list"):
            llm.chat(bad)


def test_what_a_chat_passes_to_the_template(start, monkeypatch):
    llm, _ = start()
    seen = []
    monkeypatch.setattr(llm.tokenizer, "render_chat", lambda chat: seen.append(chat) or "fox")
    fields = {
        "tools": [{"name": "f"}],
        "reasoning_effort": "high",
        "thinking": False,
        "chat_template_kwargs": {"more": 1},
        "add_generation_prompt": False,
        "continue_final_message": True,
        "chat_template": "tool_use",
    }
    llm.chat(CHAT, use_tqdm=False, **fields)
    llm.chat([CHAT, CHAT], use_tqdm=False)
    assert seen == [Chat(messages=CHAT, **fields), *[Chat(messages=CHAT)] * 2]
    with pytest.raises(ValueError, match="thinking must be"):
        llm.chat(CHAT, thinking="no")


def test_ends_of_a_turn_reach_the_engine(start, tmp_path, monkeypatch):
    model = chat_templates.write(tmp_path, chat_templates.FAMILIES["gpt_oss"])
    given = []

    def start_engine(config, launcher, end_of_turn_ids, thinking):
        given.extend(end_of_turn_ids)
        return FakeEngine(config)

    monkeypatch.setattr(runtime, "Engine", start_engine)
    with expertwire.LLM(model) as llm:
        assert [llm.tokenizer.decode([i], skip_special_tokens=False) for i in given] == ["<|return|>", "<|call|>"]


def test_more_prompts_than_may_wait(start):
    llm, engine = start(config={"max_queued_requests": 5}, max_queued_requests=5)
    outputs = llm.generate([[i] for i in range(60)], SamplingParams(max_tokens=3, n=2), use_tqdm=False)
    assert [output.outputs[1].token_ids for output in outputs] == [expected([i], 3, 1) for i in range(60)]
    assert engine.controller.most_waiting <= 5
    with pytest.raises(ValueError, match="prompt 0: n must be at most max_queued_requests = 5, got 6"):
        llm.generate([1], SamplingParams(n=6))


def test_more_prompts_than_a_tenant_may_have_waiting(start):
    llm, engine = start(config={"max_queued_requests_per_tenant": 4}, max_queued_requests=4)
    assert len(llm.generate([[i] for i in range(30)], SamplingParams(max_tokens=3), use_tqdm=False)) == 30
    assert engine.controller.most_waiting <= 4
    with pytest.raises(ValueError, match="prompt 0: n must be at most max_queued_requests_per_tenant = 4, got 5"):
        llm.generate([1], SamplingParams(n=5))


def test_options_for_all_prompts_or_one_for_each(start):
    llm, engine = start()
    quiet, given = {"use_tqdm": False}, engine.controller.options
    outputs = llm.generate([[1, 2, 3, 4], [5]], SamplingParams(n=2), priority=[2, -2], tenant="acme", **quiet)
    assert given == [RequestOptions(priority=p, tenant="acme") for p in (2, 2, -2, -2)]
    assert [output.num_cached_tokens for output in outputs] == [2, 0]
    prompts = [{"prompt_token_ids": [1], "cache_salt": "own"}, [2]]
    llm.generate(prompts, priority=7, tenant=("a", "b"), cache_salt="all", **quiet)
    assert given[4:] == [
        RequestOptions(priority=7, tenant="a", cache_salt="own"),
        RequestOptions(priority=7, tenant="b", cache_salt="all"),
    ]
    chats = [[{"role": "user", "content": word}] for word in ("fox", "dog")]
    llm.chat(chats, priority=[3, 4], cache_salt=["x", "y"], **quiet)
    llm.chat(chats[0], tenant="acme", **quiet)
    assert given[6:] == [
        RequestOptions(priority=3, cache_salt="x"),
        RequestOptions(priority=4, cache_salt="y"),
        RequestOptions(tenant="acme"),
    ]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"priority": [1]}, r"priority must be one value, or one for each prompt \(2\), got 1"),
        ({"priority": [1, 2.0]}, "prompt 1: priority must be an integer"),
        ({"tenant": 5}, "prompt 0: tenant must be a string"),
        ({"cache_salt": ["a", "b" * 129]}, "prompt 1: cache_salt .* 128 characters"),
    ],
)
def test_bad_options_stop_all_before_any_is_sent(start, options, error):
    llm, engine = start()
    with pytest.raises(ValueError, match=error):
        llm.generate([[1], [2]], **options)
    llm.stats()  # everything sent before has arrived
    assert engine.controller.options == []


@pytest.mark.parametrize(
    ("prompts", "params", "error"),
    [
        ([[1], [400]], None, r"prompt 1: prompt must be token ids in \[0, 400\), got 400"),
        ([[1], [2] * 64], None, "prompt 1: .*max_model_len"),
        ([[1], ""], None, "prompt 1: .*at least one token"),
        ([[1], {"text": "a"}], None, "must have 'prompt' or 'prompt_token_ids'"),
        ([[1], {}], None, "must have 'prompt' or 'prompt_token_ids'"),
        ([[1], 2.5], None, "prompt 1: .*got float"),
        (3, None, "prompts must be a string, token ids, or a list of these, got int"),
        ([[1], [2]], [SamplingParams()], r"one for each prompt \(2\), got 1"),
        ([[1], [2]], [], r"one for each prompt \(2\), got 0"),
        ([[1], {"cache_salt": "a"}], None, "must have 'prompt' or 'prompt_token_ids'"),
        ([[1], {"prompt": "a", "cache_salt": 3}], None, "prompt 1: cache_salt must be a string"),
    ],
)
def test_a_bad_prompt_stops_all_before_any_is_sent(start, prompts, params, error):
    llm, engine = start()
    with pytest.raises(ValueError, match=error):
        llm.generate(prompts, params)
    llm.stats()  # everything sent before has arrived
    assert engine.controller.most_waiting == 0


def test_a_prompt_that_the_controller_rejects(start):
    llm, engine = start(reject=13)
    with pytest.raises(ValueError, match="prompt 2: too many blocks"):
        llm.generate([[1], [2], [13], [3]], SamplingParams(max_tokens=50), use_tqdm=False)
    assert llm.stats() == {"num_requests": 0}
    assert len(llm.generate([[1]], use_tqdm=False)) == 1
    assert engine.closed == 0


def test_a_failure_names_the_rank(start):
    llm, _ = start(fail_after=3)
    for _ in range(2):
        with pytest.raises(EngineFailed, match="rank 1: killed by signal 9") as caught:
            llm.generate([[1], [2]], use_tqdm=False)
        assert caught.value.rank == 1


@pytest.fixture
def interruptible():
    """SIGINT raises, also where the tests run in the background of a shell, which ignores it; gives the handler."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield signal.default_int_handler
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_leaves_it_usable(start, interruptible):
    llm, engine = start()
    engine.controller.paused.set()

    def interrupt():
        while not engine.controller.num_requests:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[i] for i in range(20)], SamplingParams(max_tokens=5), use_tqdm=False)
    thread.join()
    assert signal.getsignal(signal.SIGINT) is interruptible
    assert llm.stats() == {"num_requests": 0}
    engine.controller.paused.clear()
    [output] = llm.generate([[4, 5]], use_tqdm=False)
    assert output.outputs[0].token_ids == expected([4, 5], INFO.max_model_len - 2)


def test_an_interrupt_waits_for_its_turn_unless_repeated(interruptible):
    reached = []

    def interrupted(times):
        with delayed_interrupt() as check:
            check()
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
            reached.append("check")
            check()
            reached.append("end")

    for times in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            interrupted(times)
    assert reached == ["check"]


def test_generate_from_another_thread(start):
    llm, _ = start()
    outputs = []
    thread = threading.Thread(target=lambda: outputs.extend(llm.generate([[4, 5]], use_tqdm=False)))
    thread.start()
    thread.join(30)
    assert outputs[0].outputs[0].token_ids == expected([4, 5], INFO.max_model_len - 2)


def test_progress(start, capsys):
    llm, _ = start()
    llm.generate([[1], [2]], use_tqdm=True)
    shown = capsys.readouterr().err
    assert "2/2" in shown
    assert "tokens/s" in shown


def test_it_closes_once(start):
    llm, engine = start()
    with llm as same:
        assert same is llm
    llm.close()
    assert engine.closed == 1
    with pytest.raises(ValueError, match="closed"):
        llm.generate([[1]])


def test_the_engine_ends_with_the_object(start):
    llm, engine = start()
    llm.generate([[1]], use_tqdm=False)
    finalizer = llm._closing
    assert finalizer.atexit
    finalizer()
    assert engine.closed == 1


def test_an_engine_whose_frontend_cannot_start_is_closed(model, monkeypatch):
    engines = []

    def start_engine(config, launcher, end_of_turn_ids, thinking):
        engines.append(FakeEngine(config))
        engines[0].controller.close()
        return engines[0]

    monkeypatch.setattr(runtime, "Engine", start_engine)
    with pytest.raises(EngineFailed):
        expertwire.LLM(model)
    assert engines[0].closed == 1


class TestTokenizer:
    def test_is_needed(self, tmp_path, start):
        with pytest.raises(ValueError, match=r"no tokenizer\.json"):
            start(tmp_path)

    def test_is_not_needed_for_random_weights(self, tmp_path, start):
        llm, _ = start(tmp_path, config={"load_format": "dummy"})
        assert llm.tokenizer is None
        [output] = llm.generate([4, 5], use_tqdm=False)
        assert (output.outputs[0].text, len(output.outputs[0].token_ids)) == ("", INFO.max_model_len - 2)
        for call in (lambda: llm.generate("text"), lambda: llm.chat([{"role": "user", "content": "a"}])):
            with pytest.raises(ValueError, match="needs a tokenizer"):
                call()


def test_options_are_checked_before_anything_starts(start):
    with pytest.raises(ValueError, match="dtype must be one of"):
        start(config={"dtype": "int3"})
    with pytest.raises(TypeError, match="tensor_parallel"):
        start(config={"tensor_parallel": 2})
