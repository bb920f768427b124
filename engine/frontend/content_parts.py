"""Content parts: messages whose content is a list, `[{"type": "text", "text": ...}]`, as OpenAI's API has it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

_PROBE = "content of the probe"
# Types of parts that are text: to every template, and to one that iterates over parts (Mistral's reasoning).
_TEXT, _ITERATED = ("text",), ("text", "thinking")


def iterates_parts(render: Callable[[list[dict[str, Any]]], str], faults: tuple[type[Exception], ...]) -> bool:
    """Return whether a template writes the text of content parts itself; others would write the list as Python or JSON does.

    Args:
        render: renders messages.
        faults: errors that a template may raise on messages that it does not expect.
    """
    try:
        text = render([{"role": "user", "content": [{"type": "text", "text": _PROBE}]}])
    except faults:
        return False
    return _PROBE in text and "'type'" not in text and '"type"' not in text


def check_parts(messages: Sequence[Mapping[str, Any]], *, iterated: bool) -> None:
    """Check the content parts of messages.

    Args:
        messages: the messages; a content that is no list is not looked at.
        iterated: whether the template iterates over parts.

    Raises:
        ValueError: a part is malformed, or is not text; names its type and what is allowed.
    """
    allowed = _ITERATED if iterated else _TEXT
    for index, message in enumerate(messages):
        for part in message["content"] if isinstance(message.get("content"), list) else ():
            kind = part.get("type") if isinstance(part, Mapping) else None
            if not isinstance(kind, str):
                example = '{"type": "text", "text": "..."}'
                raise ValueError(
                    f"messages[{index}].content must be a string or a list of {example}, got {part!r:.100}"
                )
            if kind not in allowed:
                raise ValueError(
                    f"messages[{index}].content has a part of type {kind!r:.100}; allowed are {' and '.join(map(repr, allowed))}"
                )
            if kind == "text" and not isinstance(part.get("text"), str):
                raise ValueError(f"messages[{index}].content: the text of a part must be a string, got {part!r:.100}")


def flattened(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message with its text parts, which have been checked, joined by line breaks (as vLLM does)."""
    if not isinstance(message.get("content"), list):
        return message
    return {**message, "content": "\n".join(part["text"] for part in message["content"])}
