"""Chats whose content is a list of parts: text is written as text, in every family, and other kinds are refused by name."""

from __future__ import annotations

import pytest
from helpers import chat_templates, tokenizer_files

from expertwire.engine.frontend.chat import Chat
from expertwire.engine.frontend.tokenizer import Tokenizer

STRINGS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
PARTS = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}[{{ part.type }}: {{ part[part.type] }}]{% endfor %}{% endif %}{% endfor %}"
)


def text(word):
    return {"type": "text", "text": word}


def render(folder, template, *contents):
    tokenizer = Tokenizer.open(tokenizer_files.write(folder, "word_level", chat_template=template))
    return tokenizer.render_chat(Chat(messages=[{"role": "user", "content": content} for content in contents]))


@pytest.mark.parametrize("family", sorted(chat_templates.FAMILIES))
def test_a_text_part_is_written_as_the_text_is(tmp_path, family):
    tokenizer = Tokenizer.open(chat_templates.write(tmp_path, chat_templates.FAMILIES[family]))
    as_string, as_parts = (
        tokenizer.render_chat(Chat(messages=[{"role": "user", "content": content}]))
        for content in ("What is it?", [text("What is it?")])
    )
    assert as_parts == as_string and "What is it?" in as_string


def test_parts_are_joined_for_a_template_of_strings(tmp_path):
    assert render(tmp_path, STRINGS, [text("one"), text("two")], "three") == "<user>one\ntwo<user>three"
    assert render(tmp_path, STRINGS, []) == "<user>"


def test_parts_reach_a_template_that_iterates_over_them(tmp_path):
    thought = {"type": "thinking", "thinking": "hm"}
    assert render(tmp_path, PARTS, [text("one"), thought], "three") == "[text: one][thinking: hm]three"


@pytest.mark.parametrize("template", [STRINGS, PARTS])
@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}, ["'image_url'", "'text'"]),
        ({"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}, ["'input_audio'", "'text'"]),
        ({"text": "one"}, ['{"type": "text"']),
        ("one", ['{"type": "text"']),
        ({"type": "text", "text": 5}, ["must be a string"]),
    ],
)
def test_other_parts_are_refused_by_name(tmp_path, template, part, words):
    with pytest.raises(ValueError, match=r"messages\[1\].content") as error:
        render(tmp_path, template, "hello", [part])
    assert all(word in str(error.value) for word in words), error.value


def test_thinking_is_refused_by_a_template_of_strings(tmp_path):
    with pytest.raises(ValueError, match="'thinking'; allowed are 'text'"):
        render(tmp_path, STRINGS, [{"type": "thinking", "thinking": "hm"}])
