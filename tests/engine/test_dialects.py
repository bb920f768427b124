"""The delimiters of each family: told from the tokenizer, consistent with what templates write, listed in the documents."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from helpers import chat_templates
from helpers.chat_templates import CALL, CALLS, QUESTION, TOOLS, TURNS

from expertwire.engine.frontend.chat import Chat
from expertwire.engine.frontend.output_formats import DIALECTS, PLAIN, THINKING, dialect_of
from expertwire.engine.frontend.tokenizer import Tokenizer

PAGE = (Path(__file__).parents[2] / "docs" / "chat.md").read_text()
FAMILIES = chat_templates.FAMILIES
# With the thinking switch on, off, and where it stands by itself: whether the prompt opens the reasoning.
OPENS = {
    "deepseek_r1": {None: True},
    "deepseek_v31": {None: False, True: True, False: False},
    "qwen3": {None: False, True: False, False: False},
    "glm_45": {None: False, True: False, False: False},
    "glm_47": {None: True, True: True, False: False},
    "minimax_m2": {None: True},
    "kimi_k2": {None: False},
    "gpt_oss": {None: False},
    "mistral": {None: False},
}


@pytest.fixture
def open_family(tmp_path):
    return lambda name: Tokenizer.open(chat_templates.write(tmp_path / name, FAMILIES[name]))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_tokenizer_tells_the_dialect(open_family, family):
    tokenizer = open_family(family)
    assert tokenizer.dialect.name == FAMILIES[family].dialect
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in tokenizer.dialect.end_of_turn]
    assert all(len(tokens) == 1 for tokens in ids)
    assert tokenizer.end_of_turn_ids() == tuple(tokens[0] for tokens in ids)


def test_vocabularies_without_a_template():
    """As of base models, and of releases that come without a Jinja template."""
    assert dialect_of({"<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>"}, "").name == "qwen3"
    assert dialect_of({"｜DSML｜", "<think>", "</think>", "<｜tool▁sep｜>"}, "").name == "deepseek_v3.2"
    assert dialect_of({"[INST]", "[TOOL_CALLS]"}, "").name == "mistral_v3"
    assert dialect_of({"<think>", "</think>", "<|im_end|>"}, "") is THINKING
    assert dialect_of({"<think>"}, "") is dialect_of((), "[INST]") is PLAIN


def fill(text, **values):
    for name, value in values.items():
        text = text.replace("{" + name + "}", value)
    return text


def arguments_of(calls):
    given = CALL["function"]["arguments"]
    if not calls.argument:
        return json.dumps(given, ensure_ascii=False)
    # In Python's syntax every value is a literal; between tags a string stands for itself.
    quoted = calls.kind == "python"
    values = {
        name: value if isinstance(value, str) and not quoted else json.dumps(value, ensure_ascii=False)
        for name, value in given.items()
    }
    parts = [fill(calls.argument, name=name, value=value) for name, value in values.items()]
    return ", ".join(parts) if quoted else "".join(parts)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"olmoe"}))
def test_templates_write_calls_as_the_dialect_says(open_family, family):
    tokenizer = open_family(family)
    calls = tokenizer.dialect.tool_calls
    tools = None if family == "deepseek_r1" else TOOLS
    text = tokenizer.render_chat(Chat(messages=CALLS[:3], tools=tools, add_generation_prompt=False))
    written = fill(calls.call, name="weather", index="0", arguments=arguments_of(calls))
    assert written in text
    assert written.startswith(calls.start) and written.endswith(calls.end)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_templates_write_reasoning_as_the_dialect_says(open_family, family):
    """Qwen3's and gpt-oss's keep the reasoning of the last turn only, DeepSeek's none."""
    tokenizer = open_family(family)
    dialect = tokenizer.dialect
    text = tokenizer.render_chat(Chat(messages=TURNS[:3], add_generation_prompt=False))
    if dialect.reasoning is None or family in ("deepseek_r1", "deepseek_v31", "qwen3_coder"):
        assert "two and two" not in text
        return
    before, found, after = text.partition(dialect.reasoning[0])
    reasoning, closed, answer = after.partition(dialect.reasoning[1])
    assert found and closed and reasoning.strip() == "two and two" and "two and two" not in before
    assert "4" in answer and any(answer.rstrip().endswith(end) for end in (*dialect.end_of_turn, "4"))
    if dialect.answer is not None:
        assert answer.partition(dialect.answer[0])[2] == "4" + dialect.answer[1]


@pytest.mark.parametrize("family", sorted(OPENS))
def test_whether_the_prompt_opens_the_reasoning(open_family, family):
    tokenizer = open_family(family)
    for thinking, opens in OPENS[family].items():
        prompt = tokenizer.render_chat(Chat(messages=QUESTION, thinking=thinking))
        assert tokenizer.dialect.opens_reasoning(prompt) is opens, thinking
    assert not tokenizer.dialect.opens_reasoning("<think> is how reasoning begins")
    assert not PLAIN.opens_reasoning("<think>")


def test_no_dialect_hides_another():
    for index, dialect in enumerate(DIALECTS):
        assert dialect_of(dialect.marks, "") is dialect_of((), "\n".join(dialect.marks)) is dialect
        assert len(dialect.end_of_turn) > 0 and dialect.name not in {other.name for other in DIALECTS[:index]}


def test_the_page_has_every_delimiter():
    for dialect in DIALECTS:
        row = "".join(row for row in PAGE.splitlines() if row.startswith(f"| `{dialect.name}` |"))
        parts = [*(dialect.reasoning or ()), *dialect.end_of_turn, *dialect.reasoning_efforts, *(dialect.answer or ())]
        if dialect.tool_calls is not None:
            call = dialect.tool_calls
            parts += [call.kind, call.start, call.end, call.call, call.argument]
        for part in parts:
            for line in part.split("\n"):
                assert line.replace("|", "\\|") in row, (dialect.name, part)
    switches, calls = PAGE.split("Calls of tools, with")
    for table in (switches.split("| dialect |")[1], calls):
        assert re.findall(r"^\| `(\S+)` \|", table, re.MULTILINE) == [dialect.name for dialect in DIALECTS]
