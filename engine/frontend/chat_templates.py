"""Chat templates of a checkpoint: Jinja sources that turn messages into the text of a prompt.

Templates come with the weights, so they run in Jinja's sandbox and get JSON values only, and nothing of them runs while they are
compiled. The environment is that of Hugging Face's templates: `raise_exception`, `strftime_now`, `tojson` without HTML escapes,
loop controls and `{% generation %}` blocks.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.compiler import CodeGenerator
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from expertwire.engine.frontend.chat import THINKING, Chat
from expertwire.engine.frontend.content_parts import check_parts, flattened, iterates_parts

# Errors that a template may raise on messages that it does not expect.
_TEMPLATE_FAULTS = (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError)
# Errors of a source that is not Jinja, or nested too deeply: the last two.
_SOURCE_FAULTS = (TemplateError, SyntaxError, ValueError, RecursionError, MemoryError)
_REASONING = ("reasoning_content", "thinking", "reasoning")  # keys of a message's reasoning
# Bytes of all templates. To compile one takes up to 32 us and 4 KiB; known models have less than 32 KiB.
MAX_BYTES = 1 << 17
_CUT = "<<cut here>> "  # a template that trims the text removes the space


@dataclass(frozen=True)
class _Compiled:
    template: Template
    reads: frozenset[str]  # its free variables

    def iterates_parts(self, variables: Mapping[str, Any]) -> bool:
        """Return whether it writes the text of content parts itself, with these values of its other variables."""
        return iterates_parts(
            lambda messages: self.template.render({**variables, "messages": messages}), _TEMPLATE_FAULTS
        )


class ChatTemplates:
    """The named templates of a model. "default" is used unless another is named, "tool_use" for chats with tools.

    Args:
        sources: name -> Jinja source.
        special_tokens: variables of templates such as `bos_token`.

    Attributes:
        source: the sources of all templates.

    Raises:
        ValueError: a source is not a valid template, or they are larger than `MAX_BYTES`.
    """

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        self.source = "\n".join(sources.values())
        _check_size("chat templates", self.source)
        self._environment = make_environment()
        self._special_tokens = dict(special_tokens)
        self._templates = {name: self._compile(f"chat template {name!r}", source) for name, source in sources.items()}
        self._compile_given = functools.lru_cache(maxsize=8)(functools.partial(self._compile, "chat_template"))

    @classmethod
    def open(cls, folder: Path, config: Mapping[str, Any], special_tokens: Mapping[str, str]) -> ChatTemplates:
        """Read the templates of a checkpoint.

        They are in `chat_template.jinja` and `additional_chat_templates/*.jinja`, else in `tokenizer_config.json` (`config`),
        else in `chat_template.json`.

        Raises:
            ValueError: a file is malformed; the message names it.
        """
        return cls(_read_sources(folder, config), special_tokens)

    def variables(self, chat_template: str | None = None) -> tuple[str, ...]:
        """Return the variables that a chat may set, in alphabetical order: of one template, as in `Chat`, or of all."""
        some = self._templates.values() if chat_template is None else [self._choose(chat_template, with_tools=False)]
        found = frozenset().union(*(compiled.reads for compiled in some))
        return tuple(sorted(found - {"messages", "tools", "add_generation_prompt"} - self._special_tokens.keys()))

    def has_switch(self, chat: Chat) -> bool:
        """Return whether the template of a chat has a switch for thinking. Raise ValueError if there is no template."""
        return not self._choose(chat.chat_template, chat.tools is not None).reads.isdisjoint(THINKING)

    def render(self, chat: Chat, max_chars: int | None = None) -> str:
        """Return the prompt of a chat.

        A variable that the template does not read is an error; transformers ignores it.

        Args:
            chat: the chat.
            max_chars: most characters of the prompt; None: no limit.

        Raises:
            ValueError: there is no template, it does not read a variable of the chat, it refuses the messages, or its text is too
                long.
        """
        compiled = self._choose(chat.chat_template, chat.tools is not None)
        context = {
            "documents": None,
            **self._special_tokens,
            **_plain(_variables(chat, compiled.reads)),
            "tools": _plain(chat.tools),
            "add_generation_prompt": chat.add_generation_prompt,
        }
        messages = [_with_reasoning(message) for message in _plain(list(chat.messages))]
        if any(isinstance(message.get("content"), list) for message in messages):
            iterated = compiled.iterates_parts(context)
            check_parts(messages, iterated=iterated)
            messages = messages if iterated else list(map(flattened, messages))
        if chat.continue_final_message:
            messages[-1] = _marked(messages[-1])
        try:
            text = _join(compiled.template.generate({**context, "messages": messages}), max_chars)
        except _TEMPLATE_FAULTS as error:
            raise ValueError(f"the chat template cannot render these messages: {error}") from error
        return _cut(text) if chat.continue_final_message else text

    def _choose(self, name: str | None, with_tools: bool) -> _Compiled:
        if name is not None and name not in self._templates:
            if "{" not in name:
                known = ", ".join(sorted(self._templates)) or "none"
                raise ValueError(
                    f"chat_template must be Jinja source or a template of the model ({known}), got {name!r}"
                )
            return self._compile_given(name)
        if name is None:
            name = "tool_use" if with_tools and "tool_use" in self._templates else "default"
        if name not in self._templates:
            raise ValueError(
                "the model has no chat template: put a chat_template.jinja into its folder, pass `chat_template`, or send the "
                "prompt as text"
            )
        return self._templates[name]

    def _compile(self, name: str, source: str) -> _Compiled:
        _check_size(name, source)
        try:
            tree = self._environment.parse(source)
            _check_escapes(tree)
            reads = _free_variables(tree) - self._environment.globals.keys()
            return _Compiled(self._environment.from_string(source), reads)
        except _SOURCE_FAULTS as error:
            raise ValueError(f"{name} is not valid Jinja: {error}") from error


def _read_sources(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    files = {"default": folder / "chat_template.jinja"}
    files |= {path.stem: path for path in sorted(folder.glob("additional_chat_templates/*.jinja"))}
    sources = {name: _read(path) for name, path in files.items() if path.is_file()}
    if sources:
        return sources
    found, file = config.get("chat_template"), folder / "tokenizer_config.json"
    legacy = folder / "chat_template.json"
    if found is None and legacy.is_file():
        found, file = _read_legacy(legacy), legacy
    if isinstance(found, list):
        try:
            found = {entry["name"]: entry["template"] for entry in found}
        except (TypeError, KeyError) as error:
            raise ValueError(f"{file}: an entry of chat_template must have 'name' and 'template'") from error
    sources = found if isinstance(found, dict) else {} if found is None else {"default": found}
    for source in sources.values():
        if not isinstance(source, str):
            raise ValueError(f"{file}: chat_template must be text or a list of named texts, got {source!r:.100}")
    return sources


def _read(file: Path) -> str:
    if (size := file.stat().st_size) > MAX_BYTES:
        raise ValueError(f"{file} must have at most {MAX_BYTES} bytes, got {size}")
    return file.read_text(encoding="utf-8")


def _check_size(name: str, source: str) -> None:
    if (size := len(source.encode(errors="replace"))) > MAX_BYTES:
        raise ValueError(f"{name} must have at most {MAX_BYTES} bytes, got {size}")


def _read_legacy(file: Path) -> Any:
    try:
        return json.loads(_read(file))["chat_template"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file} must be a JSON object with a chat_template: {error}") from error


def _variables(chat: Chat, reads: frozenset[str]) -> dict[str, Any]:
    """Return the variables that a chat sets besides its messages; `reads` are those that the template reads."""
    values = dict(chat.chat_template_kwargs)
    _check_read("chat_template_kwargs", values, reads)
    if chat.tools:
        _check_read("tools", ["tools"], reads)
    if chat.reasoning_effort is not None:
        _check_read("reasoning_effort", ["reasoning_effort"], reads)
        values["reasoning_effort"] = chat.reasoning_effort
    if chat.thinking is not None:
        switch = next((name for name in THINKING if name in reads), " or ".join(THINKING))
        _check_read("thinking", [switch], reads)
        values[switch] = chat.thinking
    return values


def _check_read(field: str, names: Iterable[str], reads: frozenset[str]) -> None:
    for name in names:
        if name not in reads:
            known = ", ".join(sorted(reads - {"messages", "add_generation_prompt"})) or "only the messages"
            raise ValueError(f"{field}: the chat template does not read {name}; it reads {known}")


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message without empty keys, with its reasoning under every name that templates use."""
    message = {key: value for key, value in message.items() if value is not None}
    found = next((message[key] for key in _REASONING if key in message), None)
    return message if found is None else {"thinking": found, **message, "reasoning_content": found}


def _marked(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message whose text ends with the mark."""
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": content + _CUT}
    parts = content if isinstance(content, list) else []
    for index in reversed(range(len(parts))):
        part = parts[index]
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            marked = {**part, "text": part["text"] + _CUT}
            return {**message, "content": [*parts[:index], marked, *parts[index + 1 :]]}
    raise ValueError(f"continue_final_message: the last message has no text to continue, got {message!r:.100}")


def _cut(text: str) -> str:
    """Return the text before the last mark."""
    before, found, after = text.rpartition(_CUT.rstrip())
    if not found:
        raise ValueError("continue_final_message: the chat template leaves out the end of the last message")
    return before if after.startswith(" ") else before.rstrip()


def _join(pieces: Iterable[str], max_chars: int | None) -> str:
    """Return the pieces of a text; stop where it is too long."""
    if max_chars is None:
        return "".join(pieces)
    kept, size = [], 0
    for piece in pieces:
        kept.append(piece)
        size += len(piece)
        if size > max_chars:
            raise ValueError(f"its text must have at most {max_chars} characters")
    return "".join(kept)


def _plain(value: Any) -> Any:
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"messages, tools and chat_template_kwargs must be JSON values: {error}") from error


class _Generation(Extension):
    """The block `{% generation %}...{% endgeneration %}`, which marks text for training and is a scope of variables."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's interface

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _NoFolding(CodeGenerator):
    """Code that computes no expression of a template while it is compiled, as `{{ 'a' * 3000000000 }}` would be."""

    def _output_child_to_const(self, node: nodes.Expr, frame: Any, finalize: Any) -> str:
        if isinstance(node, (nodes.Const, nodes.TemplateData)):
            return super()._output_child_to_const(node, frame, finalize)
        raise nodes.Impossible


def _check_escapes(tree: nodes.Template) -> None:
    """Raise TemplateError if an `autoescape` block has an expression, which would be computed while it is compiled."""
    for block in tree.find_all(nodes.EvalContextModifier):
        if not all(isinstance(option.value, nodes.Const) for option in block.options):
            raise TemplateError(f"line {block.lineno}: autoescape must be true or false")


def make_environment() -> ImmutableSandboxedEnvironment:
    """Return the environment in which templates are compiled."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], optimized=False
    )
    environment.code_generator_class = _NoFolding
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


def _free_variables(template: nodes.Template) -> frozenset[str]:
    """Return the names that a template reads and does not certainly set itself, globals of the environment included.

    Jinja's `meta.find_undeclared_variables` also counts names that are only set, in some branches, and never read.
    """
    found: set[str] = set()
    _visit_all(template.body, set(), found)
    return frozenset(found)


def _visit_all(children: Iterable[nodes.Node | None], known: set[str], found: set[str]) -> set[str]:
    for child in children:
        if child is not None:
            _visit(child, known, found)
    return known


def _visit(node: nodes.Node, known: set[str], found: set[str]) -> None:
    """Add to `known` the names certainly set after `node`, and to `found` the names read before they are set."""
    match node:
        case nodes.Name():
            (known if node.ctx != "load" or node.name in known else found).add(node.name)
        case nodes.Assign():
            _visit_all((node.node, node.target), known, found)
        case nodes.AssignBlock():
            _visit_all((node.filter, *node.body), set(known), found)
            _visit(node.target, known, found)
        case nodes.For():
            _visit(node.iter, known, found)
            _visit_all((node.target, node.test, *node.body), known | {"loop"}, found)
            _visit_all(node.else_, set(known), found)
        case nodes.If():
            _visit_all((node.test, *(branch.test for branch in node.elif_)), known, found)
            branches = [node.body, *(branch.body for branch in node.elif_), node.else_]
            known |= set.intersection(*(_visit_all(branch, set(known), found) for branch in branches))
        case nodes.Macro() | nodes.CallBlock():
            if isinstance(node, nodes.CallBlock):
                _visit(node.call, known, found)
            else:
                known.add(node.name)
            _visit_all(node.defaults, known, found)
            _visit_all((*node.args, *node.body), known | {"caller", "varargs", "kwargs"}, found)
        case nodes.With():
            _visit_all(node.values, known, found)
            _visit_all((*node.targets, *node.body), set(known), found)
        case nodes.Scope() | nodes.FilterBlock():
            _visit_all(node.iter_child_nodes(), set(known), found)
        case _:
            _visit_all(node.iter_child_nodes(), known, found)
