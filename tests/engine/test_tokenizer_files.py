"""Hostile and damaged tokenizer files: each is refused at once, by a ValueError that names the file and the field."""

from __future__ import annotations

import json

import pytest
from helpers import tokenizer_files

from expertwire.engine.frontend import tokenizer_files as ours
from expertwire.engine.frontend.tokenizer import Tokenizer

ADDED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


@pytest.fixture
def folder(tmp_path):
    return tokenizer_files.write(tmp_path, "word_level", chat_template=None)


def change(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def refused(folder, words):
    with pytest.raises(ValueError, match=words) as error:
        Tokenizer.open(folder)
    return str(error.value)


def test_a_panic_of_the_library_is_an_error(folder):
    change(folder / "tokenizer.json", normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA/w=="})
    assert "Precompiled" in refused(folder, r"tokenizer.json cannot be read")


def test_more_added_tokens_than_any_model_has(folder):
    tokens = [{"id": 1000 + i, "content": f"<x{i}>", **ADDED} for i in range(ours.MAX_ADDED_TOKENS + 1)]
    change(folder / "tokenizer.json", added_tokens=tokens)
    refused(folder, r"tokenizer.json: added_tokens must have at most 20000 entries, got 20001")


def test_a_file_that_is_too_large_is_not_read(folder):
    with (folder / "tokenizer.json").open("r+b") as file:
        file.truncate(ours.MAX_BYTES + 1)  # sparse
    refused(folder, rf"tokenizer.json must have at most {ours.MAX_BYTES} bytes")


@pytest.mark.parametrize(
    "added",
    [
        [1],
        {"x": {"content": "a"}},
        {"5": 7},
        {"5": {"content": 7}},
        {"5": {"content": "<new>", "special": "yes"}},
        {str(i): {"content": f"<{i}>"} for i in range(ours.MAX_ADDED_TOKENS + 1)},
    ],
    ids=lambda added: str(added)[:30],
)
def test_added_tokens_of_the_config_are_checked(folder, added):
    change(folder / "tokenizer_config.json", added_tokens_decoder=added)
    refused(folder, r"tokenizer_config.json: .*added_tokens_decoder")


def test_a_special_token_without_a_text_counts_as_missing(folder):
    change(folder / "tokenizer_config.json", bos_token={"id": 1})
    assert "bos_token" not in Tokenizer.open(folder).special_tokens


@pytest.mark.parametrize(
    "template", ["{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "{% for a in b %}" * 200 + "{% endfor %}" * 200]
)
def test_a_template_that_is_nested_too_deeply(folder, template):
    (folder / "chat_template.jinja").write_text(template)
    refused(folder, "chat template 'default' is not valid Jinja")
