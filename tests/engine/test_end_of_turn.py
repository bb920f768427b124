"""Chats through an engine: they end with the turn, whatever the checkpoint's list of end-of-sequence ids says."""

from __future__ import annotations

import json

import pytest
from helpers import chat_templates
from helpers import tiny_checkpoints as tiny

from expertwire import LLM, SamplingParams
from expertwire.engine.frontend.chat import Chat

OPTIONS = {"dtype": "float32", "threads_per_rank": 1, "launcher": "local", "kv_cache_memory_bytes": 20_000_000}


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    """A model that speaks harmony, whose checkpoint lists `<|return|>` and `<|endoftext|>`, but not `<|call|>`."""
    folder = tiny.make("qwen3_moe", tmp_path_factory.mktemp("harmony"))
    chat_templates.write(folder, chat_templates.FAMILIES["gpt_oss"])
    vocabulary = {token["content"]: token["id"] for token in _added(folder)}
    ids = [vocabulary["<|return|>"], vocabulary["<|endoftext|>"]]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    with LLM(folder, **OPTIONS) as llm:
        yield llm


def _added(folder):
    return json.loads((folder / "tokenizer.json").read_text())["added_tokens"]


def token_of(llm, text):
    [token] = llm.tokenizer.encode(text, add_special_tokens=False)
    return token


def test_the_checkpoints_list_comes_first(llm):
    names = [llm.tokenizer.decode([token], skip_special_tokens=False) for token in llm.model_info.eos_token_ids]
    assert names == ["<|return|>", "<|endoftext|>", "<|call|>"]


@pytest.mark.parametrize(("text", "ends"), [("<|return|>", True), ("<|call|>", True), ("<|end|>", False), ("x", False)])
def test_an_answer_ends_with_its_turn(llm, text, ends):
    """A message that ends with <|end|> is followed by another one of the same turn."""
    token = token_of(llm, text)
    params = SamplingParams(temperature=0, max_tokens=4, logit_bias={token: 100.0}, skip_special_tokens=False)
    [output] = llm.chat(chat_templates.QUESTION, params, reasoning_effort="low", use_tqdm=False)
    assert output.prompt == llm.tokenizer.render_chat(Chat(messages=chat_templates.QUESTION, reasoning_effort="low"))
    assert output.outputs[0].token_ids == ([token] if ends else [token] * 4)
    assert output.outputs[0].finish_reason == ("stop" if ends else "length")
