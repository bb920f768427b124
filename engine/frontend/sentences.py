"""Tokens whose text ends a sentence, by their text alone: what follows is not known when they are sampled."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from expertwire.engine.frontend.tiktoken_files import byte_alphabet

_MARKS = ".!?;…。！？；।؟"
_CLOSERS = "\"')]}*_`”’»」』）"
_SPACES = " \n\r\t"
_PIECE_SPACES = "▁>"  # as in sentencepiece's vocabularies: "▁", "<0x0A>"


def ends_sentence(text: str) -> bool:
    """Return whether a text ends a sentence: with a mark, perhaps with closing quotes or brackets, or with the line."""
    words = text.rstrip()
    return "\n" in text[len(words) :] or words.rstrip(_CLOSERS).endswith(tuple(_MARKS))


def texts(vocab: Mapping[str, int], text: Callable[[int], str]) -> dict[int, str]:
    """Return the texts of those tokens that may end a sentence or be white space.

    Args:
        vocab: name -> token. A name ends with the text's last character, or with the letter of its last byte.
        text: returns the text of a token; it is asked for few of them, as that takes microseconds.
    """
    letters = byte_alphabet()
    endings = _MARKS + _CLOSERS + _SPACES
    last = {*endings, *_PIECE_SPACES, *(letters[character.encode()[-1]] for character in endings)}
    return {token: text(token) for name, token in vocab.items() if name[-1:] in last}
