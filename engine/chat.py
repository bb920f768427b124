"""Chat templates of a checkpoint: Jinja sources that turn messages into the text of a prompt.

Templates come with the weights, so they run in Jinja's sandbox and see plain JSON values only. The environment is the one
that Hugging Face's templates are written for: `raise_exception`, `strftime_now`, `tojson` without HTML escapes, loop controls
and `{% generation %}` blocks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

# What a template may raise besides Jinja's own errors when it meets messages that it does not expect.
_TEMPLATE_FAULTS = (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError)


class ChatTemplates:
    """The named templates of a model; "default" is used when none is named, "tool_use" when tools are given.

    Args:
        sources: name -> Jinja source.
        special_tokens: variables such as `bos_token` that templates refer to.

    Raises:
        ValueError: a source is no valid template.
    """

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        self._environment = _environment()
        self._special_tokens = dict(special_tokens)
        self._templates = {name: self._compile(name, source) for name, source in sources.items()}

    @classmethod
    def open(cls, folder: Path, config: Mapping[str, Any], special_tokens: Mapping[str, str]) -> ChatTemplates:
        """The templates of a checkpoint: its `chat_template.jinja` (and `additional_chat_templates/*.jinja`), else what
        `tokenizer_config.json` (`config`) holds, else `chat_template.json`."""
        return cls(_read_sources(folder, config), special_tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The prompt that stands for `messages`.

        Args:
            messages: at least one dictionary with a "role"; keys whose value is None are dropped.
            add_generation_prompt: end with what begins the assistant's answer.
            chat_template: name of one of the model's templates, or the source of another.
            tools: JSON schemas of functions.
            documents: dictionaries with "title" and "text".
            variables: further variables of the template.

        Raises:
            ValueError: the messages are malformed, there is no template, or the template refuses the messages.
        """
        template, messages = self._choose(chat_template, bool(tools)), _checked(messages)
        values = _plain({"tools": tools, "documents": documents, **variables})
        try:
            return template.render(
                {
                    **self._special_tokens,
                    **values,
                    "messages": messages,
                    "add_generation_prompt": add_generation_prompt,
                }
            )
        except _TEMPLATE_FAULTS as error:
            raise ValueError(f"the chat template cannot render these messages: {error}") from error

    def _choose(self, name: str | None, with_tools: bool) -> Any:
        if name is not None and name not in self._templates:
            if "{" not in name:
                known = ", ".join(sorted(self._templates)) or "none"
                raise ValueError(
                    f"chat_template must be Jinja source or a template of the model ({known}), got {name!r}"
                )
            return self._compile("chat_template", name)
        if name is None:
            name = "tool_use" if with_tools and "tool_use" in self._templates else "default"
        if name not in self._templates:
            raise ValueError(
                "the model has no chat template: put a chat_template.jinja into its folder, pass `chat_template`, or send the "
                "prompt as text"
            )
        return self._templates[name]

    def _compile(self, name: str, source: str) -> Any:
        try:
            return self._environment.from_string(source)
        except TemplateError as error:
            raise ValueError(f"chat template {name!r} is not valid Jinja: {error}") from error


def _read_sources(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    files = {"default": folder / "chat_template.jinja"}
    files |= {path.stem: path for path in sorted(folder.glob("additional_chat_templates/*.jinja"))}
    sources = {name: path.read_text(encoding="utf-8") for name, path in files.items() if path.is_file()}
    if sources:
        return sources
    found = config.get("chat_template")
    legacy = folder / "chat_template.json"
    if found is None and legacy.is_file():
        found = json.loads(legacy.read_text(encoding="utf-8")).get("chat_template")
    if isinstance(found, list):
        return {entry["name"]: entry["template"] for entry in found}
    return {} if found is None else {"default": found}


def _checked(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence) or not messages:
        raise ValueError(f"messages must be a non-empty list of dictionaries, got {messages!r}")
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"a message must be a dictionary with a 'role', got {message!r}")
    return [{key: value for key, value in message.items() if value is not None} for message in _plain(list(messages))]


def _plain(value: Any) -> Any:
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise ValueError(f"messages and template variables must be JSON values: {error}") from error


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's text for training; here it is only rendered."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's interface

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    helpers: dict[str, Callable] = {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    environment.globals.update(helpers)
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
