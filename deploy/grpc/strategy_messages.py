"""Conversions between strategies in messages and their options by name, as `strategies.registry` has them; and their results.

The fields of a message are those of the strategy's class, so there is no table of them here.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from google.protobuf.message import Message

from expertwire.deploy.proto import expertwire_v1_pb2 as pb
from expertwire.strategies.answers import AnswerExtractor
from expertwire.strategies.base import Strategy
from expertwire.strategies.registry import ANSWERS, parse_strategy, strategy_to_dict
from expertwire.strategies.verifiers import Candidate, VerifierError

MAX_CUSTOM_CHARS = 65_536
MAX_CHARS = 4096  # of another option; the front tokenises some, and compiles others
_KINDS = tuple(field.name for field in pb.Strategy.DESCRIPTOR.oneofs_by_name["kind"].fields)


@dataclass(frozen=True)
class ServerVerifier:
    """A verifier of the server, by its name, for a strategy that a client makes as an object."""

    name: str

    def __call__(self, candidates: Sequence[Candidate], /) -> NoReturn:
        """Raise VerifierError: the verifier is in the server."""
        raise VerifierError(f"the verifier {self.name!r} is in the server; offline a strategy needs a callable")


def to_options(message: pb.Strategy) -> dict[str, Any]:
    """Return the options that a message says, for `strategy_from_dict`.

    Raises:
        ValueError: names the field and what it allows.
    """
    kind = message.WhichOneof("kind")
    if kind is None:
        raise ValueError(f"strategy must have one of {', '.join(_KINDS)}, got none")
    if kind == "custom":
        return {**_custom_options(message.custom), "strategy": message.custom.name}
    return {"strategy": kind, **_values(getattr(message, kind))}


def from_strategy(strategy: Strategy | Mapping[str, Any] | str) -> pb.Strategy:
    """Return the message of a strategy, of its options, or of what a command line says (`parse_strategy`).

    Args:
        strategy: its verifier must be a name, or a `ServerVerifier`; an object's class one of `strategies.registry`.

    Raises:
        ValueError: names the option and what it allows.
    """
    if isinstance(strategy, str):
        strategy = parse_strategy(strategy)
    if not isinstance(strategy, Mapping):
        strategy = _options_of(strategy)
    options = dict(strategy)
    name = options.pop("strategy", None)
    if not isinstance(name, str):
        raise ValueError(f'strategy must have its name as "strategy", got {name!r:.200}')
    message = pb.Strategy()
    if name in _KINDS and name != "custom":
        kind = getattr(message, name)
        kind.SetInParent()
        _fill(kind, options, f"strategy {name}")
    else:
        message.custom.name = name
        if options:
            message.custom.options = _to_json(options)
    return message


def _custom_options(message: pb.CustomStrategy) -> dict[str, Any]:
    if len(message.options) > MAX_CUSTOM_CHARS:
        raise ValueError(f"options must have at most {MAX_CUSTOM_CHARS} characters, got {len(message.options)}")
    try:
        options = json.loads(message.options or "{}")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"options must be a JSON object: {error}, got {message.options!r:.200}") from error
    if not isinstance(options, dict):
        raise ValueError(f"options must be a JSON object, got {message.options!r:.200}")
    return options


def _values(message: Message) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for field, value in message.ListFields():
        if isinstance(value, pb.Answer):
            values[field.name] = _answer_options(value)
        elif field.name == "table":
            values[field.name] = [_row_options(row) for row in value]
        elif isinstance(value, str) and len(value) > MAX_CHARS:
            raise ValueError(f"{field.name} must have at most {MAX_CHARS} characters in a request, got {len(value)}")
        else:
            values[field.name] = _values(value) if isinstance(value, Message) else value
    return values


def _answer_options(message: pb.Answer) -> dict[str, Any]:
    kind = message.WhichOneof("kind")
    if kind is None:
        raise ValueError(f"answer must have one of {', '.join(sorted(ANSWERS))}, got none")
    return {"type": kind, **_values(getattr(message, kind))}


def _row_options(row: pb.Bin) -> dict[str, Any]:
    if row.strategy.HasField("all_branches"):
        raise ValueError("all_branches must be unset in a table: it belongs to the request's strategy")
    return {**_values(row), "strategy": to_options(row.strategy)}


def _options_of(strategy: Strategy) -> dict[str, Any]:
    if not all(hasattr(strategy, name) for name in ("needs", "decide", "select")):
        raise ValueError(f"strategy must be a strategy, its options or a string, got {strategy!r:.200}")
    verifier = strategy.needs.verifier
    if verifier is not None and not isinstance(verifier, ServerVerifier):
        raise ValueError(f"verifier must be a name, or ServerVerifier(name), for a server; got {verifier!r:.200}")
    return strategy_to_dict(strategy, verifiers={} if verifier is None else {verifier.name: verifier})


def _fill(message: Any, values: Mapping[str, Any], what: str) -> None:
    """Set the fields of a message to the options of these names; None counts as absent."""
    fields = message.DESCRIPTOR.fields_by_name
    for name, value in values.items():
        if name not in fields:
            raise ValueError(f"{what} has the options {', '.join(fields) or 'none'}, got {name}")
        if value is None:
            continue
        if name == "answer":
            _fill_answer(message.answer, value)
        elif name == "table":
            for row in value:
                _fill_row(message.table.add(), row)
        elif fields[name].message_type is not None:
            record = dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value  # type: ignore[arg-type]
            getattr(message, name).SetInParent()
            _fill(getattr(message, name), _mapping(name, record), name)
        else:
            if callable(value):
                value = value.name if isinstance(value, ServerVerifier) else value
            try:
                setattr(message, name, value)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{what}: {name} cannot be {value!r:.200}: {error}") from error


def _fill_answer(message: pb.Answer, value: str | Mapping[str, Any] | AnswerExtractor) -> None:
    if isinstance(value, str):
        options: dict[str, Any] = {"type": value}
    elif isinstance(value, Mapping):
        options = dict(value)
    else:
        kind = next((name for name, known in ANSWERS.items() if type(value) is known), None)
        options = {"type": kind, **vars(value)}
    kind = options.pop("type", None)
    if kind not in ANSWERS:
        raise ValueError(f"answer.type must be one of {', '.join(sorted(ANSWERS))}, got {kind!r:.200}")
    getattr(message, kind).SetInParent()
    _fill(getattr(message, kind), options, "answer")


def _fill_row(message: pb.Bin, value: Any) -> None:
    row = dict(vars(value) if dataclasses.is_dataclass(value) else _mapping("table", value))
    if "strategy" not in row:
        raise ValueError(f'table must have objects with the option "strategy", got {value!r:.200}')
    message.strategy.CopyFrom(from_strategy(row.pop("strategy")))
    _fill(message, row, "table")


def _mapping(what: str, value: object) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{what} must be an object of options, got {value!r:.200}")
    return value


def _to_json(options: Mapping[str, Any]) -> str:
    try:
        return json.dumps(options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"options of a server's own strategy must be JSON values: {error}") from error
