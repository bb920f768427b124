"""Strategies and answer extractors by name, and their options as JSON's types: for command lines, requests and logs.

A strategy's options are its dataclass's fields. Four kinds of fields are more than numbers, strings and Booleans:

    answer           an extractor: {"type": "regex", "pattern": "..."}, or its name alone
    verifier         a name among the verifiers that the caller gives
    budget, verifier_policy   their fields
    default, table   of `compute_optimal`: strategies
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from typing import Any, Final

from expertwire.strategies.adaptive_consistency import AdaptiveConsistency
from expertwire.strategies.answers import BoxedAnswer, JsonPointerAnswer, RegexAnswer, WholeText
from expertwire.strategies.auto import Auto
from expertwire.strategies.base import Budget, Strategy
from expertwire.strategies.beam import BeamSearch
from expertwire.strategies.best_of_n import BestOfN
from expertwire.strategies.compute_optimal import Bin, ComputeOptimal
from expertwire.strategies.confidence_pruning import ConfidencePruning
from expertwire.strategies.confidence_vote import ConfidenceVote
from expertwire.strategies.dvts import DVTS
from expertwire.strategies.first_k_finish import FirstKFinish
from expertwire.strategies.lookahead import Lookahead
from expertwire.strategies.majority_vote import MajorityVote
from expertwire.strategies.sequential_revision import SequentialRevision
from expertwire.strategies.step_retries import StepRetries
from expertwire.strategies.verifier_vote import VerifierVote
from expertwire.strategies.verifiers import Verifier, VerifierPolicy

STRATEGIES: Final[Mapping[str, type]] = types.MappingProxyType(
    {
        "adaptive_consistency": AdaptiveConsistency,
        "auto": Auto,
        "beam_search": BeamSearch,
        "best_of_n": BestOfN,
        "compute_optimal": ComputeOptimal,
        "confidence_pruning": ConfidencePruning,
        "confidence_vote": ConfidenceVote,
        "dvts": DVTS,
        "first_k_finish": FirstKFinish,
        "lookahead": Lookahead,
        "majority_vote": MajorityVote,
        "sequential_revision": SequentialRevision,
        "step_retries": StepRetries,
        "verifier_vote": VerifierVote,
    }
)
ANSWERS: Final[Mapping[str, type]] = types.MappingProxyType(
    {"boxed": BoxedAnswer, "json_pointer": JsonPointerAnswer, "regex": RegexAnswer, "whole_text": WholeText}
)
NO_VERIFIERS: Final[Mapping[str, Verifier]] = types.MappingProxyType({})

_RECORDS: Final[Mapping[str, type]] = types.MappingProxyType({"budget": Budget, "verifier_policy": VerifierPolicy})


def strategy_from_dict(
    options: Mapping[str, Any],
    *,
    verifiers: Mapping[str, Verifier] = NO_VERIFIERS,
    strategies: Mapping[str, type] = STRATEGIES,
) -> Strategy:
    """Build a strategy of its options.

    Args:
        options: its name as "strategy", and the fields of its class.
        verifiers: by name.
        strategies: classes by name; a user's own are added with `{**STRATEGIES, "mine": Mine}`. They have to be dataclasses.

    Raises:
        ValueError: names the option and the values it allows.
    """
    if not isinstance(options, Mapping):
        raise ValueError(
            f'a strategy must be an object such as {{"strategy": "best_of_n", "n": 8}}, got {options!r:.200}'
        )
    name = options.get("strategy")
    if not isinstance(name, str) or name not in strategies:
        raise ValueError(f"strategy must be one of {', '.join(sorted(strategies))}, got {name!r:.200}")
    values = {key: value for key, value in options.items() if key != "strategy"}
    parsed = {}
    for key, value in values.items():
        if key == "answer" and value is not None:
            parsed[key] = answer_from_dict(value)
        elif key == "verifier" and value is not None:
            parsed[key] = _verifier(value, verifiers)
        elif key in _RECORDS:
            parsed[key] = value if isinstance(value, _RECORDS[key]) else _build(_RECORDS[key], key, value)
        elif strategies[name] is ComputeOptimal and key == "table":
            parsed[key] = tuple(_bin(row, verifiers, strategies) for row in _list(key, value))
        else:
            parsed[key] = value
    built: Strategy = _build(strategies[name], f"strategy {name}", parsed)
    return built


def strategy_to_dict(
    strategy: Strategy,
    *,
    verifiers: Mapping[str, Verifier] = NO_VERIFIERS,
    strategies: Mapping[str, type] = STRATEGIES,
) -> dict[str, Any]:
    """Return a strategy's options, of which `strategy_from_dict` builds an equal one. Defaults are left out.

    Raises:
        ValueError: the strategy's class, its extractor or its verifier has no name.
    """
    options: dict[str, Any] = {"strategy": _name_of(type(strategy), strategies, "strategy")}
    for key, value in _changed(strategy).items():
        if key == "answer":
            options[key] = {"type": _name_of(type(value), ANSWERS, "answer"), **_changed(value)}
        elif key == "verifier":
            options[key] = next((name for name, known in verifiers.items() if known is value), None) or _unnamed(value)
        elif key in _RECORDS:
            options[key] = _changed(value)
        elif isinstance(value, tuple) and value and isinstance(value[0], Bin):
            inner = [strategy_to_dict(row.strategy, verifiers=verifiers, strategies=strategies) for row in value]
            options[key] = [{**_changed(row), "strategy": one} for row, one in zip(value, inner, strict=True)]
        else:
            options[key] = value
    return options


def answer_from_dict(value: object) -> Any:
    """Build an answer extractor of its name, or of {"type": name, ...} with its options.

    Raises:
        ValueError: names the option and the values it allows.
    """
    options: object = {"type": value} if isinstance(value, str) else value
    if not isinstance(options, Mapping):
        return value  # an extractor itself; the strategy checks it
    name = options.get("type")
    if not isinstance(name, str) or name not in ANSWERS:
        raise ValueError(f"answer.type must be one of {', '.join(sorted(ANSWERS))}, got {name!r:.200}")
    return _build(ANSWERS[name], "answer", {key: option for key, option in options.items() if key != "type"})


def parse_strategy(text: str) -> dict[str, Any]:
    """Return the options that a command line says, for `strategy_from_dict`.

    `name:key=value,key=value`, for instance "majority_vote:n=8,answer=boxed,budget.tokens=4000"; a dot enters a record. A value
    is a number, true, false, null, or a string. Where it has a comma, the whole is given as JSON: '{"strategy": "majority_vote",
    "n": 8, "answer": {"type": "regex", "pattern": "a, (b)"}}'.

    Raises:
        ValueError: says what is wrong with the text.
    """
    if text.lstrip().startswith("{"):
        try:
            return dict(json.loads(text))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"strategy is no JSON: {error}, got {text!r:.200}") from error
    name, _, rest = text.partition(":")
    options: dict[str, Any] = {"strategy": name}
    for part in rest.split(",") if rest else []:
        key, equals, value = part.partition("=")
        if not equals or not key:
            raise ValueError(f"strategy must be name:key=value,key=value or JSON, got {part!r} in {text!r:.200}")
        place = options
        *records, last = key.split(".")
        for record in records:
            inner = place.setdefault(record, {})
            inner = {"type": inner} if isinstance(inner, str) else inner
            if not isinstance(inner, dict):
                raise ValueError(f"{key} cannot be set: {record} is {inner!r}")
            place[record] = place = inner
        place[last] = _parse_value(value)
    return options


def _parse_value(text: str) -> object:
    if text in ("true", "false", "null"):
        return {"true": True, "false": False, "null": None}[text]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _build(kind: type, what: str, values: object) -> Any:
    """Build a dataclass; a field it lacks, or one that is missing, is a ValueError that lists them."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{what} must be an object of options, got {values!r:.200}")
    if not dataclasses.is_dataclass(kind):
        raise ValueError(f"{what} must be a dataclass, got {kind!r}")
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
    unknown = [str(key) for key in values if key not in fields]
    if unknown:
        raise ValueError(f"{what} has the options {', '.join(fields) or 'none'}, got {', '.join(unknown)}")
    required = [
        name
        for name, field in fields.items()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    missing = [name for name in required if name not in values]
    if missing:
        raise ValueError(f"{what} needs the options {', '.join(required)}; {', '.join(missing)} must be given")
    return kind(**values)


def _changed(record: object) -> dict[str, Any]:
    """Return the fields of a dataclass that differ from their defaults."""
    assert dataclasses.is_dataclass(record)
    values = {field.name: (getattr(record, field.name), field.default) for field in dataclasses.fields(record)}
    return {
        name: value for name, (value, default) in values.items() if default is dataclasses.MISSING or value != default
    }


def _list(field: str, value: object) -> typing.Sequence[Any]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{field} must be a list, got {value!r:.200}")
    return value


def _bin(row: object, verifiers: Mapping[str, Verifier], strategies: Mapping[str, type]) -> Bin:
    if isinstance(row, Bin):
        return row
    if not isinstance(row, Mapping) or "strategy" not in row:
        raise ValueError(f'table must have objects with the option "strategy", got {row!r:.200}')
    inner = strategy_from_dict(row["strategy"], verifiers=verifiers, strategies=strategies)
    built: Bin = _build(Bin, "table", {**row, "strategy": inner})
    return built


def _verifier(value: object, verifiers: Mapping[str, Verifier]) -> Verifier:
    if isinstance(value, str):
        if value not in verifiers:
            known = ", ".join(sorted(verifiers)) or "none is configured"
            raise ValueError(f"verifier must be one of: {known}; got {value!r:.200}")
        return verifiers[value]
    if not callable(value):
        raise ValueError(f"verifier must be a name, got {value!r:.200}")
    verifier: Verifier = value
    return verifier


def _name_of(kind: type, names: Mapping[str, type], what: str) -> str:
    for name, known in names.items():
        if known is kind:
            return name
    raise ValueError(f"{what} must be of one of the classes named {', '.join(sorted(names))}, got {kind.__qualname__}")


def _unnamed(verifier: object) -> str:
    raise ValueError(f"verifier must be among the verifiers given by name, got {verifier!r:.200}")
