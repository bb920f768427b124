"""`Chat`: a conversation from a client, which `engine.frontend.chat_templates` renders as a prompt."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

JSON_FIELDS = frozenset({"messages", "tools", "chat_template_kwargs"})
# Tenths of the most output tokens that each reasoning effort lets a model think whose template does not read the effort.
EFFORT_TENTHS = {"none": 0, "minimal": 1, "low": 2, "medium": 5, "high": 8}
# Names of the template variable that turns thinking on or off; a template reads at most one of them.
THINKING = ("enable_thinking", "thinking")


@dataclass(frozen=True, kw_only=True)
class Chat:
    """A conversation and the options of its chat template.

    Args:
        messages: at least one dictionary with a "role"; a key with the value None counts as absent. The content is a string, or
            a list of text parts, {"type": "text", "text": ...}. The assistant's reasoning may be called "reasoning_content",
            "reasoning" or "thinking", whichever the template reads.
        tools: JSON schemas of functions.
        reasoning_effort: one of the model's reasoning efforts, such as "low", "medium" or "high" for gpt-oss; one of
            `EFFORT_TENTHS` if the template does not read it but the model reasons.
        thinking: whether the model thinks, if its template has a switch for it.
        chat_template_kwargs: further variables of the template.
        add_generation_prompt: end the prompt with the start of the assistant's answer.
        continue_final_message: end the prompt within the last message, which the model continues; excludes
            `add_generation_prompt`.
        chat_template: name of one of the model's templates, or the source of another.

    Raises:
        ValueError: names the field and what is allowed.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None
    reasoning_effort: str | None = None
    thinking: bool | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template: str | None = None

    def __post_init__(self) -> None:
        _check_messages(self.messages)
        if self.tools is not None and not _is_list_of_objects(self.tools):
            raise ValueError(f"tools must be a list of JSON schemas, each a dictionary, got {self.tools!r:.100}")
        for name, kind in (("reasoning_effort", str), ("thinking", bool), ("chat_template", str)):
            if getattr(self, name) is not None and not isinstance(getattr(self, name), kind):
                allowed = "True, False" if kind is bool else "a string"
                raise ValueError(f"{name} must be {allowed} or None, got {getattr(self, name)!r:.100}")
        for name in ("add_generation_prompt", "continue_final_message"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r:.100}")
        if self.add_generation_prompt and self.continue_final_message:
            raise ValueError("continue_final_message needs add_generation_prompt=False, as no new message begins")
        self._check_variables()

    def _check_variables(self) -> None:
        names = self.chat_template_kwargs
        if not isinstance(names, Mapping) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"chat_template_kwargs must be a dictionary of names and values, got {names!r:.100}")
        for name in ("messages", "tools", "add_generation_prompt"):
            if name in names:
                raise ValueError(f"chat_template_kwargs must not have {name!r}, which is an argument of its own")
        if self.reasoning_effort is not None and "reasoning_effort" in names:
            raise ValueError("reasoning_effort is set twice: as an argument and in chat_template_kwargs")
        if self.thinking is not None and (twice := next((name for name in THINKING if name in names), None)):
            raise ValueError(f"thinking is set twice: as an argument and as {twice!r} in chat_template_kwargs")


@dataclass(frozen=True, kw_only=True)
class ChatText:
    """A chat as it arrives: fields of `Chat`, of which those in `JSON_FIELDS` are JSON text that nobody has parsed."""

    fields: Mapping[str, Any]

    @property
    def reasoning_effort(self) -> str | None:
        """As in `Chat`."""
        return self.fields.get("reasoning_effort")

    @property
    def chat_template(self) -> None:
        """None, as a template is not code that a client may send."""
        return None

    def parse(self) -> Chat:
        """Return the chat.

        Raises:
            ValueError: a field is not JSON, or the chat is malformed; names the field and what is allowed.
        """
        return Chat(**{"messages": [], **{name: _from_json(name, value) for name, value in self.fields.items()}})


def _from_json(field: str, value: Any) -> Any:
    if field not in JSON_FIELDS:
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{field} must be JSON text: {error}") from error


def _is_list_of_objects(value: Any) -> bool:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and all(isinstance(entry, Mapping) for entry in value)
    )


def _check_messages(messages: Any) -> None:
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence) or not messages:
        raise ValueError(f"messages must be a non-empty list of dictionaries, got {messages!r:.100}")
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"a message must be a dictionary with a 'role', got {message!r:.100}")
