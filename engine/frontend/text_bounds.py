"""Bounds on the text that a token stands for, so that a text can be refused by its size, without tokenising it."""

from __future__ import annotations

import json
import math
from typing import Any

import tokenizers

# Assumed of a tokenizer that may drop text, or take text of any length as one token. A text with more is refused even if
# it would have fitted, such as many kilobytes of spaces.
_UNBOUNDED = 256
# A byte of normalised text may come from so many bytes. Composition (NFC) makes 3 bytes of 9, compatibility (NFKC) 1 of 4,
# lower case 1 of 3.
_SHRINKS = {"NFC": 4, "NFD": 4, "NFKC": 4, "NFKD": 4, "Lowercase": 3, "Prepend": 1, "ByteLevel": 1}
_KEEPS_ALL = frozenset({"ByteLevel", "Digits", "Metaspace", "UnicodeScripts"})  # pre-tokenizers that drop nothing


def max_token_bytes(backend: tokenizers.Tokenizer) -> int:
    """Return the most bytes of text (UTF-8) that one token stands for.

    This is exact enough to refuse no text that fits if every byte of a text is in one token: byte-level vocabularies and those
    with byte fallback, whose added tokens swallow no spaces. For others it is an assumption, 256 bytes.
    """
    parts = _parts(_state(backend.pre_tokenizer), "pretokenizers"), _parts(_state(backend.normalizer), "normalizers")
    byte_level = any(part["type"] == "ByteLevel" for part in (*parts[0], *parts[1]))
    shrink, added = math.prod(map(_shrink, parts[1])), backend.get_added_tokens_decoder().values()
    bounded = shrink < math.inf and all(map(_keeps_all, parts[0])) and _spells_bytes(backend, byte_level)
    if not bounded or any(token.lstrip or token.rstrip for token in added):
        return _UNBOUNDED
    # In byte-level vocabularies each character of a name is a byte.
    names = backend.get_vocab(with_added_tokens=False)
    longest = max(len(name) if byte_level else len(name.encode()) for name in names)
    return math.ceil(shrink * max([longest, *(len(token.content.encode()) for token in added)]))


def _spells_bytes(backend: tokenizers.Tokenizer, byte_level: bool) -> bool:
    """Return whether the vocabulary can spell any byte, so that no text is dropped or unknown."""
    vocabulary, model = backend.get_vocab(with_added_tokens=False), backend.model
    if getattr(model, "byte_fallback", False):
        return all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))
    alphabet = set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    return isinstance(model, tokenizers.models.BPE) and byte_level and vocabulary.keys() >= alphabet


def _state(component: Any) -> dict[str, Any]:
    """Return a component of a tokenizer as in `tokenizer.json`; {} for None."""
    return {} if component is None else json.loads(component.__getstate__())


def _parts(state: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """Return the parts of a sequence of normalizers or pre-tokenizers."""
    if not state:
        return []
    return [each for part in state[key] for each in _parts(part, key)] if state["type"] == "Sequence" else [state]


def _shrink(normalizer: dict[str, Any]) -> float:
    """Return how many bytes of text a byte that it returns may come from."""
    if normalizer["type"] == "Replace" and (pattern := normalizer["pattern"].get("String")) and normalizer["content"]:
        return max(1.0, len(pattern.encode()) / len(normalizer["content"].encode()))
    return _SHRINKS.get(normalizer["type"], math.inf)


def _keeps_all(pre_tokenizer: dict[str, Any]) -> bool:
    kind = pre_tokenizer["type"]
    return kind in _KEEPS_ALL or (kind in ("Split", "Punctuation") and pre_tokenizer["behavior"] != "Removed")
