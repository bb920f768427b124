"""Reader of `tiktoken.model`, the vocabulary of Kimi K2's checkpoints, which have no `tokenizer.json`.

A line is a token's bytes in base64 and its rank. The regular expression that splits text into words is not in the file but in
the checkpoint's code (`tokenization_kimi.py` of moonshotai/Kimi-K2-Instruct, also for K2.5), which is not run.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

NAME = "tiktoken.model"
MAX_BYTES = 16 << 20  # of the file; Kimi's has 3 MB
MAX_TOKEN_BYTES = 1024  # of a token, as finding its merge takes time quadratic in them
_NUM_SPECIAL = 256  # ids that follow the ranks
_LETTERS = r"[^\r\n\p{L}\p{N}]?"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_WORD = "|".join(
    (
        r"[\p{Han}]+",
        f"{_LETTERS}{_UPPER}*{_LOWER}+{_ENDING}",
        f"{_LETTERS}{_UPPER}+{_LOWER}*{_ENDING}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)


def read(file: Path, config: Mapping[str, Any]) -> Tokenizer:
    """Read a `tiktoken.model`; `config` is its `tokenizer_config.json`, which names the special tokens.

    Raises:
        ValueError: the file is damaged or too large, or the config is not Kimi's.
    """
    if config.get("tokenizer_class") != "TikTokenTokenizer":
        raise ValueError(
            f"{file}: tokenizer_class must be TikTokenTokenizer (Kimi's), got {config.get('tokenizer_class')!r}: how other "
            "tokenizers cut a text into words is not in the file; convert it to a tokenizer.json"
        )
    ranks = _read_ranks(file)
    letters = byte_alphabet()
    names = {token: "".join(letters[byte] for byte in token) for token in ranks}
    vocab = {names[token]: rank for token, rank in ranks.items()}
    backend = Tokenizer(models.BPE(vocab, _merges(ranks, names)))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORD), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    declared = {int(token): entry for token, entry in config.get("added_tokens_decoder", {}).items()}
    for token in range(len(ranks), len(ranks) + _NUM_SPECIAL):
        entry = declared.get(token, {"content": f"<|reserved_token_{token}|>", "special": True})
        backend.add_tokens([AddedToken(**{"normalized": False, **entry})])
    return backend


def byte_alphabet() -> dict[int, str]:
    """Return the character of each byte in byte-level vocabularies, as in GPT-2: printable Latin-1 itself, others from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + i) for i, byte in enumerate(others)}


def _read_ranks(file: Path) -> dict[bytes, int]:
    if (size := file.stat().st_size) > MAX_BYTES:
        raise ValueError(f"{file} must have at most {MAX_BYTES} bytes, got {size}")
    try:
        lines = [line.split() for line in file.read_bytes().splitlines() if line.strip()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except (ValueError, binascii.Error) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    if sorted(ranks.values()) != list(range(len(ranks))) or not all(bytes([byte]) in ranks for byte in range(256)):
        raise ValueError(
            f"{file} is damaged: its ranks must be 0, 1, 2 and so on, with every single byte among the tokens"
        )
    if (longest := max(map(len, ranks))) > MAX_TOKEN_BYTES:
        raise ValueError(f"{file}: a token must have at most {MAX_TOKEN_BYTES} bytes, got {longest}")
    return ranks


def _merges(ranks: Mapping[bytes, int], names: Mapping[bytes, str]) -> list[tuple[str, str]]:
    """Return the pairs of tokens that form a token, in the order of its rank, which is the order of merging."""
    pairs = []
    for token in sorted(ranks, key=ranks.__getitem__):
        halves = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [(ranks[left], ranks[right], left, right) for left, right in halves if left in ranks and right in ranks]
        pairs += [(names[left], names[right]) for _, _, left, right in sorted(known)]
    return pairs
