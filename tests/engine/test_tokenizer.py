"""Text to tokens and back, against transformers and against whole decoding."""

from __future__ import annotations

import json
import random
import subprocess
import sys

import pytest
from helpers import tokenizer_files

from expertwire.engine.frontend.chat import Chat
from expertwire.engine.frontend.tokenizer import Tokenizer

TEXTS = [
    "The quick brown fox",
    "  leading and trailing  ",
    "größer, 你好 🙂 don't",
    "<|im_start|>user\nhi<|im_end|><s> the fox",
    "",
]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "the <b>fox</b> & 'ü' 🙂", "name": None},
]


@pytest.fixture(scope="module", params=sorted(tokenizer_files.KINDS))
def folder(request, tmp_path_factory):
    return tokenizer_files.write(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def ours(folder):
    return Tokenizer.open(folder)


@pytest.fixture(scope="module")
def theirs(folder):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(folder)


def test_text_and_chats_equal_transformers(ours, theirs):
    for text in TEXTS:
        for add in (True, False):
            assert ours.encode(text, add_special_tokens=add) == theirs.encode(text, add_special_tokens=add), text
        ids = theirs.encode(text)
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip), text
    tools = [{"type": "function", "function": {"name": "ü<tool>", "parameters": {}}}]
    for options in ({}, {"add_generation_prompt": False}, {"tools": tools}):
        options = {"add_generation_prompt": True, **options}
        rendered = theirs.apply_chat_template(CHAT, tokenize=False, **options)
        assert ours.render_chat(Chat(messages=CHAT, **options)) == rendered
        assert ours.encode_chat(Chat(messages=CHAT, **options)) == theirs.apply_chat_template(
            CHAT, return_dict=False, **options
        )
    assert (
        ours.encode_chat(Chat(messages=CHAT)).count(1) == 1
    )  # one <s>, although byte_fallback's post-processor adds one as well
    assert ours.special_tokens["eos_token"] == "<|im_end|>"
    assert ours.vocab_size == len(theirs)


@pytest.mark.parametrize("skip", [True, False])
def test_streamed_pieces_join_to_the_whole_text(ours, skip):
    rng = random.Random(1)
    cases = [ours.encode(text) for text in tokenizer_files.CORPUS[:5]]
    cases += [[rng.randrange(ours.vocab_size + 3) for _ in range(rng.randrange(20))] for _ in range(1500)]
    for ids in cases:
        stream = ours.stream(skip)
        assert "".join([*map(stream.push, ids), stream.flush()]) == ours.decode(ids, skip_special_tokens=skip), ids


def test_a_stream_gives_text_as_soon_as_it_is_certain(tmp_path):
    tokenizer = Tokenizer.open(tokenizer_files.write(tmp_path, "byte_level"))
    smile = tokenizer.encode("a🙃b")
    assert len(smile) > 3
    stream = tokenizer.stream()
    pieces = [stream.push(token) for token in smile]
    assert pieces == ["a", *[""] * (len(smile) - 3), "🙃", "b"]
    spaced = Tokenizer.open(tokenizer_files.write(tmp_path / "spaced", "byte_fallback"))
    stream = spaced.stream()
    assert [stream.push(token) for token in spaced.encode("the fox")] == ["", "the", " f", "ox"]


@pytest.mark.parametrize(
    "decoder",
    [
        {"type": "BPEDecoder", "suffix": "</w>"},
        {
            "type": "Sequence",
            "decoders": [
                {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
    ],
)
def test_decoders_that_cannot_be_streamed_are_refused(tmp_path, decoder):
    folder = tokenizer_files.write(tmp_path, "byte_level")
    file = folder / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "decoder": decoder}))
    with pytest.raises(ValueError, match=r"decoder of (BPEDecoder|ByteLevel \+ Strip) is not supported"):
        Tokenizer.open(folder)


def test_tokens_with_a_text(ours):
    texts = [ours.token_text(token) for token in range(ours.vocab_size)]
    for text in ("\n", "e", " t", "\ufffd", "; ", texts[-1], texts[len(texts) // 2], "no token has this", "\ud800", ""):
        expected = [token for token, other in enumerate(texts) if text and text in other]
        assert ours.vocabulary_text.ids_with(text).tolist() == expected, text


def test_token_text(tmp_path):
    tokenizer = Tokenizer.open(tokenizer_files.write(tmp_path / "a", "byte_fallback"))
    assert tokenizer.token_text(tokenizer.encode("x the")[-1]) == " the"
    assert tokenizer.token_text(5 + 0xE2) == "�"
    tokenizer = Tokenizer.open(tokenizer_files.write(tmp_path / "b", "byte_level"))
    assert tokenizer.token_text(1) == "<s>"


@pytest.mark.parametrize("add_bos_token", [True, False])
@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_tokenizer_json_alone_decides_about_bos(tmp_path, kind, add_bos_token):
    transformers = pytest.importorskip("transformers")
    folder = tokenizer_files.write(tmp_path, kind, add_bos_token=add_bos_token, tokenizer_class="LlamaTokenizer")
    ids = Tokenizer.open(folder).encode("the fox")
    assert (ids[0] == 1) == (kind == "byte_fallback")
    assert ids == transformers.AutoTokenizer.from_pretrained(folder).encode("the fox")


def test_tokens_that_only_the_config_declares(tmp_path):
    transformers = pytest.importorskip("transformers")
    entry = {
        "content": "<tool>",
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "single_word": False,
        "special": False,
    }
    folder = tokenizer_files.write(tmp_path, "byte_level", added_tokens_decoder={"900": entry}, pad_token="<pad>")
    ours, theirs = Tokenizer.open(folder), transformers.AutoTokenizer.from_pretrained(folder)
    text = "a<tool>b<pad>c"
    assert ours.encode(text) == theirs.encode(text)
    assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text), skip_special_tokens=True) == "a<tool>bc"


def test_special_tokens_map(tmp_path):
    folder = tokenizer_files.write(tmp_path, "byte_level", bos_token=None)
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": {"content": "<|im_start|>"}}))
    assert Tokenizer.open(folder).special_tokens["bos_token"] == "<|im_start|>"


def test_truncation_and_padding_of_the_file_have_no_effect(tmp_path):
    folder = tokenizer_files.write(tmp_path, "byte_level")
    backend = tokenizer_files.byte_level()
    backend.enable_truncation(4)
    backend.enable_padding(length=50)
    backend.save(str(folder / "tokenizer.json"))
    ids = Tokenizer.open(folder).encode("The quick brown fox jumps")
    assert ids == tokenizer_files.byte_level().encode("The quick brown fox jumps").ids


class TestBadFiles:
    def test_missing_tokenizer(self, tmp_path):
        with pytest.raises(ValueError, match=r"no tokenizer\.json"):
            Tokenizer.open(tmp_path)
        for name in ("tekken.json", "tokenizer.model"):
            (tmp_path / name).write_bytes(b"")
            with pytest.raises(ValueError, match=f"convert its {name}"):
                Tokenizer.open(tmp_path)

    @pytest.mark.parametrize("content", ["", "{}", "[1]", '{"model": 3}'])
    def test_malformed_tokenizer(self, tmp_path, content):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(
            ValueError, match=r"tokenizer\.json (cannot be read|is not valid JSON|must be a JSON object)"
        ):
            Tokenizer.open(tmp_path)

    @pytest.mark.parametrize(("content", "error"), [("{", "not valid JSON"), ("[]", "must be a JSON object")])
    def test_malformed_config(self, tmp_path, content, error):
        tokenizer_files.write(tmp_path, "word_level")
        (tmp_path / "tokenizer_config.json").write_text(content)
        with pytest.raises(ValueError, match=rf"tokenizer_config\.json.*{error}"):
            Tokenizer.open(tmp_path)

    def test_without_config(self, tmp_path):
        tokenizer_files.write(tmp_path, "word_level")
        (tmp_path / "tokenizer_config.json").unlink()
        assert Tokenizer.open(tmp_path).special_tokens == {}

    def test_text_that_is_not_unicode(self, tmp_path):
        tokenizer = Tokenizer.open(tokenizer_files.write(tmp_path, "word_level"))
        with pytest.raises(ValueError):
            tokenizer.encode("a\ud800b")


def test_frontends_do_not_import_torch():
    code = "import sys; import expertwire.engine.frontend.frontend; sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
