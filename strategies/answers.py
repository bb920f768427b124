"""Answers, extracted from the text of outputs to vote on or to compare.

Two answers are equal if their normal forms are (`normalized`). An output without an answer has no vote.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import re2

from expertwire.strategies.checks import require_integer, require_string

# RE2's time for one match is linear in the text, and for all matches quadratic at worst: with these limits 0.15 s.
MAX_REGEX_CHARS = 1024
MAX_REGEX_PROGRAM = 256
# To compile a pattern takes up to 1 ms with these; to read a Unicode class takes 0.07 ms of it.
MAX_PATTERN_CHARS = 512
MAX_UNICODE_CLASSES = 8
MAX_ANSWER_CHARS = 4096
MAX_JSON_CHARS = 65_536  # the parser keeps all other threads waiting, for 2 ms
MAX_BOXES = 8  # beginnings of boxes that are tried, from the last one on

_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # a brace, or what is none as it follows a backslash
_UNICODE_CLASS = re.compile(r"\\[pP]")
_NUMBER = re.compile(r"[+-]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?")


class AnswerExtractor(Protocol):
    """Extracts the answer from an output's text. Implementations are frozen dataclasses of options."""

    def __call__(self, text: str, /) -> str | None:
        """Return the answer, or None if there is none. An empty answer is none."""
        ...


def normalized(answer: str | None) -> str | None:
    """Return the normal form of an answer; None if nothing is left.

    White space at both ends, dollar signs around and a full stop at the end are removed; white space inside becomes one space. A
    plain decimal number loses its thousands separators, a plus sign, zeros in front and zeros behind the point: "$1,050.0$." is
    "1050". An answer of more than 4096 characters is cut.
    """
    if answer is None:
        return None
    answer = " ".join(answer[:MAX_ANSWER_CHARS].split())
    answer = answer.removesuffix(".").strip().strip("$").strip().removesuffix(".").strip()
    if _NUMBER.fullmatch(answer):
        whole, _, fraction = answer.lstrip("+-").replace(",", "").partition(".")
        digits = whole.lstrip("0") or "0"
        fraction = fraction.rstrip("0")
        number = digits + ("." + fraction if fraction else "")
        answer = "-" + number if answer.startswith("-") and number != "0" else number
    return answer or None


@dataclass(frozen=True)
class WholeText:
    """The answer is the whole text."""

    def __call__(self, text: str, /) -> str | None:
        """Return the text's normal form."""
        return normalized(text)


@dataclass(frozen=True)
class BoxedAnswer:
    """The answer is what is in the last `\\boxed{...}` whose braces are balanced; `\\{` and `\\}` are no braces."""

    def __call__(self, text: str, /) -> str | None:
        """Return the last box's content; None if there is no complete one."""
        end = len(text)
        for _ in range(MAX_BOXES):
            start = text.rfind("\\boxed{", 0, end)
            if start < 0:
                break
            content = _balanced(text, start + len("\\boxed{"))
            if content is not None:
                return normalized(content)
            end = start
        return None


def _balanced(text: str, begin: int) -> str | None:
    """Return the text from `begin` up to the brace that closes it, if there is one within the limit of an answer."""
    depth = 1
    for match in _BRACE.finditer(text, begin, begin + MAX_ANSWER_CHARS):
        if (found := match[0]) in "{}":
            depth += 1 if found == "{" else -1
            if depth == 0:
                return text[begin : match.start()]
    return None


@dataclass(frozen=True)
class RegexAnswer:
    """The answer is a group of the last match of a regular expression in the last 1024 characters of the text.

    Patterns come from clients, and Python's `re` may take time exponential in the text. The syntax is that of RE2: `re`'s without
    back references and look-around.

    Args:
        pattern: the regular expression.
        group: number of the group; 0 is the whole match. None: 1 if the pattern has groups, else 0.

    Raises:
        ValueError: names the field and what it allows.
    """

    pattern: str
    group: int | None = None

    def __post_init__(self) -> None:
        require_string("answer.pattern", self.pattern)
        if len(self.pattern) > MAX_PATTERN_CHARS:
            raise ValueError(
                f"answer.pattern must have at most {MAX_PATTERN_CHARS} characters, got {len(self.pattern)}"
            )
        if (classes := len(_UNICODE_CLASS.findall(self.pattern))) > MAX_UNICODE_CLASSES:
            raise ValueError(f"answer.pattern must have \\p or \\P at most {MAX_UNICODE_CLASSES} times, got {classes}")
        try:
            compiled = _compiled(self.pattern)
        except (re2.error, UnicodeEncodeError) as error:
            said = error.args[0]
            reason = said.decode(errors="replace") if isinstance(said, bytes) else str(error)
            if "too large" in reason:
                raise _too_large(self.pattern, "more") from None
            raise ValueError(f"answer.pattern must be a regular expression in RE2's syntax: {reason}") from None
        if compiled.programsize > MAX_REGEX_PROGRAM:
            raise _too_large(self.pattern, compiled.programsize)
        if self.group is not None:
            require_integer("answer.group", self.group, minimum=0, maximum=compiled.groups)

    def __call__(self, text: str, /) -> str | None:
        """Return the group of the last match; None if nothing matches."""
        compiled = _compiled(self.pattern)
        group = min(1, compiled.groups) if self.group is None else self.group
        match = None
        for match in compiled.finditer(text[-MAX_REGEX_CHARS:]):  # noqa: B007 - the last one counts
            pass
        return None if match is None else normalized(match[group])


def _too_large(pattern: str, size: object) -> ValueError:
    allowed = f"at most {MAX_REGEX_PROGRAM} instructions of RE2"
    return ValueError(f"answer.pattern must compile to {allowed}, got {size} for {pattern!r:.100}")


@lru_cache(maxsize=64)
def _compiled(pattern: str) -> re2._Regexp:
    options = re2.Options()
    options.log_errors = False
    options.max_mem = 1 << 14  # bytes, for about 700 instructions: what is larger is refused soon
    re2.compile(pattern, options)
    options.max_mem = 1 << 20  # also for the search
    return re2.compile(pattern, options)


@dataclass(frozen=True)
class JsonPointerAnswer:
    """The answer is what a JSON pointer (RFC 6901) leads to in the text, which must be one JSON value of up to 65,536 characters.

    A string is the answer itself, a number or a Boolean its JSON, an object or array its JSON with sorted keys. `null` is no
    answer.

    Args:
        pointer: for instance "/result/value"; "" is the whole value.

    Raises:
        ValueError: names the field and what it allows.
    """

    pointer: str

    def __post_init__(self) -> None:
        require_string("answer.pointer", self.pointer, empty=True)
        if self.pointer and not self.pointer.startswith("/"):
            raise ValueError(f"answer.pointer must be empty or begin with '/' (RFC 6901), got {self.pointer!r}")
        if re.search(r"~(?![01])", self.pointer):
            raise ValueError(f"answer.pointer must have '~' only as '~0' (a '~') or '~1' (a '/'), got {self.pointer!r}")

    def __call__(self, text: str, /) -> str | None:
        """Return the value that the pointer leads to; None if the text is no JSON, is too long or has no such value."""
        if len(text) > MAX_JSON_CHARS:
            return None
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return None
        for part in self.pointer.split("/")[1:]:
            key = part.replace("~1", "/").replace("~0", "~")
            if isinstance(value, dict) and key in value:
                value = value[key]
            elif isinstance(value, list) and re.fullmatch("0|[1-9][0-9]{0,8}", key) and int(key) < len(value):
                value = value[int(key)]
            else:
                return None
        if value is None or (isinstance(value, float) and not math.isfinite(value)):
            return None
        return normalized(value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False))
