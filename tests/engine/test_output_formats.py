"""The delimiters of each family: told from the tokenizer, consistent with what templates write, listed in the documents."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from helpers import chat_templates
from helpers.chat_templates import QUESTION, TURNS

from expertwire.engine.frontend.chat import Chat
from expertwire.engine.frontend.output_formats import OUTPUT_FORMATS, PLAIN, THINKING, output_format_of
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
def test_the_tokenizer_tells_the_output_format(open_family, family):
    tokenizer = open_family(family)
    assert tokenizer.output_format.name == FAMILIES[family].output_format
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in tokenizer.output_format.end_of_turn]
    assert all(len(tokens) == 1 for tokens in ids)
    assert tokenizer.end_of_turn_ids() == tuple(tokens[0] for tokens in ids)


def test_vocabularies_without_a_template():
    """As of base models, and of releases that come without a Jinja template."""
    assert output_format_of({"<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>"}, "").name == "qwen3"
    assert output_format_of({"｜DSML｜", "<think>", "</think>", "<｜tool▁sep｜>"}, "").name == "deepseek_v3.2"
    assert output_format_of({"[INST]", "[TOOL_CALLS]"}, "").name == "mistral_v3"
    assert output_format_of({"<think>", "</think>", "<|im_end|>"}, "") is THINKING
    assert output_format_of({"<think>"}, "") is output_format_of((), "[INST]") is PLAIN


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_templates_write_reasoning_as_the_output_format_says(open_family, family):
    """Qwen3's and gpt-oss's keep the reasoning of the last turn only, DeepSeek's none."""
    tokenizer = open_family(family)
    output_format = tokenizer.output_format
    text = tokenizer.render_chat(Chat(messages=TURNS[:3], add_generation_prompt=False))
    if output_format.reasoning is None or family in ("deepseek_r1", "deepseek_v31", "qwen3_coder"):
        assert "two and two" not in text
        return
    before, found, after = text.partition(output_format.reasoning[0])
    reasoning, closed, answer = after.partition(output_format.reasoning[1])
    assert found and closed and reasoning.strip() == "two and two" and "two and two" not in before
    assert "4" in answer and any(answer.rstrip().endswith(end) for end in (*output_format.end_of_turn, "4"))


@pytest.mark.parametrize("family", sorted(OPENS))
def test_whether_the_prompt_opens_the_reasoning(open_family, family):
    tokenizer = open_family(family)
    for thinking, opens in OPENS[family].items():
        prompt = tokenizer.render_chat(Chat(messages=QUESTION, thinking=thinking))
        assert tokenizer.output_format.opens_reasoning(prompt) is opens, thinking
    assert not tokenizer.output_format.opens_reasoning("<think> is how reasoning begins")
    assert not PLAIN.opens_reasoning("<think>")


def test_no_output_format_hides_another():
    for index, output_format in enumerate(OUTPUT_FORMATS):
        assert (
            output_format_of(output_format.marks, "")
            is output_format_of((), "\n".join(output_format.marks))
            is output_format
        )
        assert len(output_format.end_of_turn) > 0 and output_format.name not in {
            other.name for other in OUTPUT_FORMATS[:index]
        }


def test_the_page_has_every_delimiter():
    table = PAGE.split("## Output formats")[1].split("| format |")[1]
    for each in OUTPUT_FORMATS:
        row = next(row for row in table.splitlines() if row.startswith(f"| `{each.name}` |"))
        for part in (*(each.reasoning or ()), *each.end_of_turn, *each.reasoning_efforts):
            assert part.replace("|", "\\|") in row, (each.name, part)
    assert re.findall(r"^\| `(\S+)` \|", table, re.MULTILINE)[: len(OUTPUT_FORMATS)] == [
        each.name for each in OUTPUT_FORMATS
    ]
