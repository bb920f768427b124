"""Kimi's `tiktoken.model` against the published algorithm: of all neighbours, those that make the token of least rank join."""

from __future__ import annotations

import base64
import json
import random
from collections import Counter
from itertools import pairwise

import pytest
from helpers import chat_templates, tokenizer_files

from expertwire.engine.frontend import tiktoken_files
from expertwire.engine.frontend.chat import Chat
from expertwire.engine.frontend.tokenizer import Tokenizer

regex = pytest.importorskip("regex")

# Written out as in the checkpoint's code, while ours is put together from its parts.
WORDS = regex.compile(
    r"[\p{Han}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    regex.V1,
)
TEXTS = [
    *tokenizer_files.CORPUS[:5],
    "ABC你好x 1234567 ABC你好x 1234567 Abc'sd Abc'sd",
    "IT'S 12345 o'clock; I'LL go -- don't!!\r\n\r\n  Größe 世界abc你好Def  \n\t x",
    "HelloWorld fooBar ABC１２３ ﬀ é e\u0301 ʰx \u00a0\u3000y 🙂🙃\x00",
]


def join(parts: list[bytes], ranks: dict[bytes, int]) -> list[bytes]:
    while len(parts) > 1:
        rank, place = min((ranks.get(a + b, len(ranks)), i) for i, (a, b) in enumerate(pairwise(parts)))
        if rank == len(ranks):
            break
        parts = [*parts[:place], parts[place] + parts[place + 1], *parts[place + 2 :]]
    return parts


def encode(text: str, ranks: dict[bytes, int]) -> list[int]:
    words = [word.encode() for word in WORDS.findall(text)]
    assert b"".join(words) == text.encode()
    return [ranks[part] for word in words for part in join([bytes([byte]) for byte in word], ranks)]


def train(count: int) -> dict[bytes, int]:
    """Single bytes in some order, pairs that stand across the borders of words, so that only cutting at the right places keeps
    them apart, then the most frequent pairs of the corpus, each in turn."""
    order = list(range(256))
    random.Random(3).shuffle(order)
    ranks = {bytes([byte]): rank for rank, byte in enumerate(order)}
    for pair in (b"34", "C你".encode()[:2], "c你".encode()[:2], b"'s", b".\n", b" \n"):
        ranks[pair] = len(ranks)
    words = [word.encode() for text in TEXTS for word in WORDS.findall(text)]
    for _ in range(count):
        pieces = [join([bytes([byte]) for byte in word], ranks) for word in words]
        pairs = Counter(a + b for word in pieces for a, b in pairwise(word))
        ranks[pairs.most_common(1)[0][0]] = len(ranks)
    return ranks


def write(folder, ranks, **config):
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()]
    (folder / "tiktoken.model").write_text("".join(lines))
    named = chat_templates.FAMILIES["kimi_k2"]
    entries = {
        str(len(ranks) + 2 * i): {"content": text, "special": text in named.special}
        for i, text in enumerate((*named.special, *named.plain))
    }
    fields = {"tokenizer_class": "TikTokenTokenizer", "added_tokens_decoder": entries, "chat_template": named.template}
    (folder / "tokenizer_config.json").write_text(json.dumps({**fields, "eos_token": "[EOS]", **config}))
    return folder


@pytest.fixture(scope="module")
def ranks():
    return train(150)


@pytest.fixture(scope="module")
def tokenizer(ranks, tmp_path_factory):
    return Tokenizer.open(write(tmp_path_factory.mktemp("kimi"), ranks))


def test_tokens_are_those_of_the_published_algorithm(tokenizer, ranks):
    rng = random.Random(1)
    letters = "".join(TEXTS)
    texts = [*TEXTS, *("".join(rng.choices(letters, k=rng.randrange(40))) for _ in range(300))]
    assert len({token for text in texts for token in encode(text, ranks) if token >= 256}) > 60
    for text in texts:
        assert tokenizer.encode(text) == encode(text, ranks), text
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_stand_after_the_ranks(tokenizer, ranks):
    first = len(ranks)
    assert tokenizer.vocab_size == first + 256
    assert tokenizer.encode(f"[BOS]a<|im_end|><|reserved_token_{first + 1}|>") == [
        first, ranks[b"a"], first + 4, first + 1,
    ]  # fmt: skip
    ids = tokenizer.encode("<think>a</think><|im_end|>")
    assert tokenizer.decode(ids) == "<think>a</think>"
    assert tokenizer.special_tokens["eos_token"] == "[EOS]"
    assert tokenizer.output_format.name == "kimi_k2" and tokenizer.end_of_turn_ids() == (first + 4,)
    chat = tokenizer.encode_chat(Chat(messages=chat_templates.CALLS))
    assert [token for token in chat if token >= first].count(first + 2 * 7) == 1  # one section of calls


def test_a_tokenizer_json_comes_first(tmp_path, ranks):
    folder = write(tmp_path, ranks)
    tokenizer_files.word_level().save(str(folder / "tokenizer.json"))
    assert Tokenizer.open(folder).encode("lazy") != encode("lazy", ranks)


def test_other_vocabularies_of_tiktoken_are_refused(tmp_path, ranks):
    for name in ("PreTrainedTokenizerFast", None):
        with pytest.raises(ValueError, match=r"tiktoken\.model: tokenizer_class must be TikTokenTokenizer"):
            Tokenizer.open(write(tmp_path, ranks, tokenizer_class=name))


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("YQ== 0\nYg==\n", "cannot be read"),
        ("YQ== one\n", "cannot be read"),
        ("Y?== 0\n", "cannot be read"),
        ("YQ== 0\nYg== 2\n", "is damaged"),
        ("YQ== 0\nYg== 1\n", "is damaged"),
        ("", "is damaged"),
    ],
)
def test_damaged_files(tmp_path, ranks, text, error):
    write(tmp_path, ranks)
    (tmp_path / "tiktoken.model").write_text(text)
    with pytest.raises(ValueError, match=rf"tiktoken\.model {error}"):
        Tokenizer.open(tmp_path)


def test_large_files_and_tokens_are_refused(tmp_path, ranks):
    file = write(tmp_path, ranks) / "tiktoken.model"
    with file.open("ab") as large:
        large.truncate(tiktoken_files.MAX_BYTES + 1)
    with pytest.raises(ValueError, match=rf"tiktoken\.model must have at most {tiktoken_files.MAX_BYTES} bytes"):
        Tokenizer.open(tmp_path)
    write(tmp_path, ranks | {b"x" * (tiktoken_files.MAX_TOKEN_BYTES + 1): len(ranks)})
    with pytest.raises(
        ValueError, match=rf"a token must have at most {tiktoken_files.MAX_TOKEN_BYTES} bytes, got 1025"
    ):
        Tokenizer.open(tmp_path)
