"""The tokenizer's files of a checkpoint: what they hold is checked and bounded, as anybody may have written them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from expertwire.engine.frontend import tiktoken_files
from expertwire.engine.models.hf_config import parse_json

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
MAX_BYTES = 256 << 20  # of a file; the largest known tokenizer.json has 34 MB
MAX_ADDED_TOKENS = 20_000  # the library takes time quadratic in them: 18 s for 200,000; Gemma 3 has 6,415
_CONFIG = "tokenizer_config.json"


def read_config(folder: Path) -> dict[str, Any]:
    """Return `tokenizer_config.json`, {} if there is none.

    Raises:
        ValueError: it is malformed; the message names the field.
    """
    config, file = _read_json(folder / _CONFIG), folder / _CONFIG
    added = config.get("added_tokens_decoder", {})
    if not isinstance(added, dict) or len(added) > MAX_ADDED_TOKENS:
        raise ValueError(f"{file}: added_tokens_decoder must be an object of at most {MAX_ADDED_TOKENS} tokens by id")
    for token, entry in added.items():
        if not token.isdecimal() or not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
            raise ValueError(
                f"{file}: added_tokens_decoder must have ids and tokens with a content, got {token!r}: {entry!r:.100}"
            )
    return config


def read_backend(folder: Path, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """Return the tokenizer of `tokenizer.json`, or of `tiktoken.model`.

    Raises:
        ValueError: there is neither, or it is malformed or too large.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        if (folder / tiktoken_files.NAME).is_file():
            return tiktoken_files.read(folder / tiktoken_files.NAME, config)
        present = [name for name in ("tokenizer.model", "tekken.json") if (folder / name).is_file()]
        hint = f"; convert its {present[0]} with transformers" if present else ""
        raise ValueError(f"{folder} has no tokenizer.json, which is needed for text{hint}")
    data = _read(file)
    added = parse_json(data, str(file)).get("added_tokens")
    if isinstance(added, list) and len(added) > MAX_ADDED_TOKENS:
        raise ValueError(f"{file}: added_tokens must have at most {MAX_ADDED_TOKENS} entries, got {len(added)}")
    try:
        return tokenizers.Tokenizer.from_buffer(data)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the library is no Exception
        raise ValueError(f"{file} cannot be read: {error}") from error


def special_tokens(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Return name -> text. `special_tokens_map.json` is read only if the config does not list the added tokens."""
    legacy = {} if "added_tokens_decoder" in config else _read_json(folder / "special_tokens_map.json")
    found = {name: legacy.get(name, config.get(name)) for name in SPECIAL_TOKENS}
    texts = {name: token.get("content") if isinstance(token, dict) else token for name, token in found.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def add_missing(backend: tokenizers.Tokenizer, config: Mapping[str, Any], special: Mapping[str, str]) -> None:
    """Add the tokens that only the config declares, so that they are recognised in text.

    Raises:
        ValueError: one of them is malformed.
    """
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    declared = [
        entry for _, entry in sorted(config.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0]))
    ]
    try:
        missing = [tokenizers.AddedToken(**entry) for entry in declared if entry["content"] not in known]
    except TypeError as error:
        raise ValueError(f"{_CONFIG}: an entry of added_tokens_decoder is malformed: {error}") from error
    known |= {token.content for token in missing}
    missing += [tokenizers.AddedToken(text, special=True) for text in special.values() if text not in known]
    backend.add_tokens(list({token.content: token for token in missing}.values()))


def _read(file: Path) -> bytes:
    if (size := file.stat().st_size) > MAX_BYTES:
        raise ValueError(f"{file} must have at most {MAX_BYTES} bytes, got {size}")
    return file.read_bytes()


def _read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file, {} if there is no such file."""
    return parse_json(_read(file), str(file)) if file.is_file() else {}
