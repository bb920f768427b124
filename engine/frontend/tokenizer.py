"""Tokenizer: text to token ids and back, whole, as a chat, and token by token, on the `tokenizers` library.

The library's own `DecodeStream` fails on byte-fallback tokens that are not valid UTF-8, so streams are made here from a table
of the text of single tokens.
"""

from __future__ import annotations

import codecs
import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import tokenizers

from expertwire.engine.config.thinking import ThinkingIds
from expertwire.engine.frontend import sentences, text_bounds, tiktoken_files, tokenizer_files
from expertwire.engine.frontend.chat import EFFORT_TENTHS, THINKING, Chat
from expertwire.engine.frontend.chat_templates import ChatTemplates
from expertwire.engine.frontend.output_formats import OutputFormat, output_format_of
from expertwire.engine.frontend.vocabulary_text import VocabularyText
from expertwire.engine.loader.checkpoint import checkpoint_folder

# Decoders that give every token but the first a text that does not depend on its neighbours.
_PIECE_DECODERS = frozenset({"ByteFallback", "Fuse", "Metaspace", "Replace", "Strip", "WordPiece"})


class TextStream(Protocol):
    """Incremental detokenization of one sequence; its pieces add up to the text of `Tokenizer.decode`."""

    def push(self, token: int) -> str:
        """Add a token; return the new text that is final, "" inside a character."""
        ...

    def flush(self) -> str:
        """Return the remaining text, as no token follows."""
        ...


class ReasoningIds(NamedTuple):
    """The tokens before and after an output's reasoning."""

    start: tuple[int, ...]
    end: int


class Tokenizer:
    """The tokenizer of a checkpoint; made by `Tokenizer.open`.

    The special tokens that `encode` adds are those of `tokenizer.json`; `add_bos_token` and `add_eos_token` of
    `tokenizer_config.json` have no effect, as in transformers 5.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, special_tokens: Mapping[str, str], chat_templates: ChatTemplates
    ) -> None:
        self.special_tokens = dict(special_tokens)
        self._backend = backend
        self._chat_templates = chat_templates
        self._tables = {skip: _make_table(backend, skip) for skip in (False, True)}
        self._texts = _Texts(self._tables[False])

    @classmethod
    def open(cls, path: str | Path) -> Tokenizer:
        """Read the tokenizer and the chat templates of the folder `path`.

        Raises:
            ValueError: a file is missing, malformed or of an unsupported kind; the message names it.
        """
        folder = checkpoint_folder(path)
        config = tokenizer_files.read_config(folder)
        backend = tokenizer_files.read_backend(folder, config)
        backend.no_truncation()
        backend.no_padding()
        special_tokens = tokenizer_files.special_tokens(folder, config)
        tokenizer_files.add_missing(backend, config, special_tokens)
        return cls(backend, special_tokens, ChatTemplates.open(folder, config, special_tokens))

    @property
    def vocab_size(self) -> int:
        """Number of tokens, including added ones."""
        return self._backend.get_vocab_size()

    @functools.cached_property
    def max_token_bytes(self) -> int:
        """Most bytes of text (UTF-8) that one token may stand for; see `text_bounds`."""
        return text_bounds.max_token_bytes(self._backend)

    @functools.cached_property
    def vocabulary_text(self) -> VocabularyText:
        """The texts of all tokens, for searches; made in up to a second for large vocabularies."""
        return VocabularyText(self._tables[False].texts(self.vocab_size))

    def makes_same_tokens(self, other: Tokenizer) -> bool:
        """Return whether another tokenizer makes the same tokens of any text."""
        return self._backend.to_str() == other._backend.to_str()

    def makes_same_chats(self, other: Tokenizer) -> bool:
        """Return whether another tokenizer also renders chats alike."""
        return self.makes_same_tokens(other) and self._chat_templates.source == other._chat_templates.source

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of `text`; special tokens written in it are recognised.

        Raises:
            ValueError: the text is not valid Unicode.
        """
        try:
            return self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError as error:
            raise ValueError(f"text must be a string of valid Unicode, got {text!r:.100}") from error
        except BaseException as error:
            # A panic of the library is no Exception, so nobody would answer the client.
            if type(error).__name__ == "PanicException":
                raise RuntimeError(f"the tokenizer has panicked: {error}") from error
            raise

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of token ids; ids beyond the vocabulary have none."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    @functools.cached_property
    def output_format(self) -> OutputFormat:
        """The model's output format."""
        added = {token.content for token in self._backend.get_added_tokens_decoder().values()}
        return output_format_of(added, self._chat_templates.source)

    @functools.cached_property
    def reasoning_ids(self) -> ReasoningIds | None:
        """The tokens around reasoning; None if the output format has none, or none that ends with a single token."""
        if self.output_format.reasoning is None:
            return None
        start, end = (self.encode(text, add_special_tokens=False) for text in self.output_format.reasoning)
        return ReasoningIds(tuple(start), end[0]) if len(end) == 1 and start and start[0] not in start[1:] else None

    @functools.cached_property
    def thinking_ids(self) -> ThinkingIds | None:
        """The tokens by which ranks control reasoning; None as `reasoning_ids`."""
        if self.reasoning_ids is None:
            return None
        wait = self.encode("Wait", add_special_tokens=False)
        texts = sentences.texts(self._backend.get_vocab(), self._tables[False].text)
        return ThinkingIds(
            start=self.reasoning_ids.start,
            end=self.reasoning_ids.end,
            wait=wait[0] if len(wait) == 1 and self._tables[False].text(wait[0]).strip() == "Wait" else None,
            spaces=tuple(sorted(token for token, text in texts.items() if text.isspace())),
            sentence_ends=tuple(sorted(token for token, text in texts.items() if sentences.ends_sentence(text))),
        )

    @property
    def chat_variables(self) -> tuple[str, ...]:
        """The variables of the chat templates that a request may set."""
        return self._chat_templates.variables()

    def end_of_turn_ids(self) -> tuple[int, ...]:
        """Return the ids of the output format's `end_of_turn` tokens, as far as the vocabulary has them."""
        ids = map(self._backend.token_to_id, self.output_format.end_of_turn)
        return tuple(token for token in ids if token is not None)

    def render_chat(self, chat: Chat, max_chars: int | None = None) -> str:
        """Return the prompt text of a chat.

        Args:
            chat: the chat.
            max_chars: most characters of the text; None: no limit.

        Raises:
            ValueError: as `ChatTemplates.render`; or the output format has no such `reasoning_effort`.
        """
        if chat.reasoning_effort is None:
            return self._chat_templates.render(chat, max_chars)
        is_read = self.reads_effort(chat.chat_template)
        efforts = self.output_format.reasoning_efforts if is_read else tuple(EFFORT_TENTHS)
        if efforts and chat.reasoning_effort not in efforts:
            raise ValueError(
                f"reasoning_effort must be one of {', '.join(efforts)}, got {chat.reasoning_effort!r:.100}"
            )
        if not is_read:
            is_given = chat.thinking is not None or bool(chat.chat_template_kwargs.keys() & THINKING)
            sets_switch = not is_given and self._chat_templates.has_switch(chat)
            thinking = chat.reasoning_effort != "none" if sets_switch else chat.thinking
            chat = dataclasses.replace(chat, reasoning_effort=None, thinking=thinking)
        return self._chat_templates.render(chat, max_chars)

    def reads_effort(self, chat_template: str | None) -> bool:
        """Return whether a chat's `reasoning_effort` is a matter of the template; else it sets thinking's switch and budget.

        It is the template's without reasoning that ranks can control, too: one that does not read it then refuses it.

        Args:
            chat_template: as in `Chat`.

        Raises:
            ValueError: there is no such template.
        """
        return self.reasoning_ids is None or "reasoning_effort" in self._chat_templates.variables(chat_template)

    def encode_chat(self, chat: Chat, max_chars: int | None = None) -> list[int]:
        """Return the token ids of a chat. No special tokens are added: the template writes them. Raise as `render_chat`."""
        return self.encode(self.render_chat(chat, max_chars), add_special_tokens=False)

    def token_text(self, token: int) -> str:
        """Return the text of one token within a sequence, with U+FFFD for an incomplete character."""
        return self._texts[token]

    def stream(self, skip_special_tokens: bool = True) -> TextStream:
        """Return a new stream for one sequence."""
        return self._tables[skip_special_tokens].stream()


class _Texts(dict[int, str]):
    """Token id -> its text, for log-probabilities, which name the same tokens again and again."""

    def __init__(self, table: _ByteTable | _PieceTable) -> None:
        self._table = table

    def __missing__(self, token: int) -> str:
        self[token] = self._table.text(token)
        return self[token]


class _ByteTable(dict[int, bytes]):
    """Token id -> its bytes, for byte-level vocabularies, whose text is the UTF-8 decoding of the bytes."""

    def __init__(self, backend: tokenizers.Tokenizer, skipped: frozenset[int]) -> None:
        self._backend = backend
        self._byte_of = {letter: byte for byte, letter in tiktoken_files.byte_alphabet().items()}
        self.update(dict.fromkeys(skipped, b""))

    def __missing__(self, token: int) -> bytes:
        name = self._backend.id_to_token(token) or ""
        # An added token may have characters outside the alphabet; its text is its name.
        inside = all(character in self._byte_of for character in name)
        self[token] = bytes(self._byte_of[character] for character in name) if inside else name.encode()
        return self[token]

    def text(self, token: int) -> str:
        return self[token].decode(errors="replace")

    def texts(self, num: int) -> list[str]:
        return [self.text(token) for token in range(num)]

    def stream(self) -> TextStream:
        return _ByteStream(self)


class _ByteStream:
    def __init__(self, table: _ByteTable) -> None:
        self._table = table
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def push(self, token: int) -> str:
        return self._decode(self._table[token])

    def flush(self) -> str:
        return self._decode(b"", True)


class _PieceTable(dict[int, str | None]):
    """Token id -> its text after another token, for all other decoders; None for a byte token (`<0xE2>`).

    Decoders such as Metaspace, Fuse + Strip or WordPiece treat only the first token differently, so the text of any other is
    what it adds to an anchor token. A run of byte tokens is decoded as a whole, as one invalid byte changes all of its text.
    """

    def __init__(self, backend: tokenizers.Tokenizer, skipped: frozenset[int], byte_fallback: bool) -> None:
        self._backend = backend
        self._byte_fallback = byte_fallback
        self._anchor = self._find_anchor()
        self.skipped = set(skipped)

    def __missing__(self, token: int) -> str | None:
        if self._backend.id_to_token(token) is None:
            self.skipped.add(token)
        self[token] = None if self._is_byte(token) else self.join([token], first=False)
        return self[token]

    def join(self, tokens: list[int], first: bool) -> str:
        """Return the text of consecutive tokens, at the beginning of a sequence or later."""
        if first:
            return self._decode(tokens)
        return self._decode([self._anchor, *tokens])[len(self._decode([self._anchor])) :]

    def text(self, token: int) -> str:
        return self.join([token], first=False)

    def texts(self, num: int) -> list[str]:
        anchor = len(self._decode([self._anchor]))
        pairs = [[self._anchor, token] for token in range(num)]
        return [text[anchor:] for text in self._backend.decode_batch(pairs, skip_special_tokens=False)]

    def stream(self) -> TextStream:
        return _PieceStream(self)

    def _decode(self, tokens: list[int]) -> str:
        return self._backend.decode(tokens, skip_special_tokens=False)

    def _is_byte(self, token: int) -> bool:
        name = self._backend.id_to_token(token) or ""
        return self._byte_fallback and len(name) == 6 and name.startswith("<0x") and name.endswith(">")

    def _find_anchor(self) -> int:
        for token in range(self._backend.get_vocab_size()):
            if not self._is_byte(token) and self._decode([token]).strip():
                return token
        raise ValueError("tokenizer.json has no token with a visible text")


class _PieceStream:
    def __init__(self, table: _PieceTable) -> None:
        self._table = table
        self._run: list[int] = []
        self._first = True

    def push(self, token: int) -> str:
        piece = self._table[token]
        if token in self._table.skipped:
            return ""
        if piece is not None and not self._run and not self._first:
            return piece
        self._run.append(token)
        return "" if piece is None else self.flush()

    def flush(self) -> str:
        if not self._run:
            return ""
        text = self._table.join(self._run, self._first)
        self._first = False
        self._run.clear()
        return text


def _make_table(backend: tokenizers.Tokenizer, skip_special_tokens: bool) -> _ByteTable | _PieceTable:
    decoder = json.loads(backend.decoder.__getstate__()) if backend.decoder is not None else {}
    kinds = [part["type"] for part in decoder.get("decoders", [decoder] if decoder else [])]
    added = backend.get_added_tokens_decoder()
    skipped = frozenset(token for token, entry in added.items() if entry.special and skip_special_tokens)
    if kinds == ["ByteLevel"]:
        return _ByteTable(backend, skipped)
    if not _PIECE_DECODERS.issuperset(kinds):
        raise ValueError(
            f"tokenizer.json: a decoder of {' + '.join(kinds)} is not supported; allowed are ByteLevel alone, or any of "
            f"{', '.join(sorted(_PIECE_DECODERS))}"
        )
    return _PieceTable(backend, skipped, "ByteFallback" in kinds)
