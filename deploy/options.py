"""Command-line options of a dataclass: one option a field, with its type, its choices and its help from the docstring."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.resources
import inspect
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from expertwire.engine.config.engine_config import EngineConfig

ENGINE_FIELDS = tuple(field.name for field in dataclasses.fields(EngineConfig) if field.name != "model")
EXPLAINED_FIELDS = ("all2all_backend", "all2all_table", "dispatch_dtype", "enable_two_batch_overlap", "kv_cache_dtype")
_FIELD = re.compile(r"^    (\w+): (.+(?:\n {8,}.+)*)", re.MULTILINE)


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """`MODEL` and the options of `EngineConfig`."""
    text = "folder of a Hugging Face checkpoint (default: the demo model)"
    parser.add_argument("model", metavar="MODEL", nargs="?", help=text)
    add_options(parser.add_argument_group("engine"), EngineConfig, ENGINE_FIELDS)


def engine_config(args: argparse.Namespace) -> EngineConfig:
    """What the command line says about the engine; the demo model if it names none.

    Raises:
        ValueError: an option is not usable.
    """
    return EngineConfig(**{**given(args, ENGINE_FIELDS), "model": model_folder(args)})


def model_folder(args: argparse.Namespace) -> str:
    """What the command line says, or the demo model's."""
    return args.model or str(importlib.resources.files("expertwire") / "demo_model")


def add_options(parser: argparse.ArgumentParser | argparse._ArgumentGroup, kind: type, fields: Iterable[str]) -> None:
    """An option for each of the `fields` of the dataclass `kind`.

    Options of seconds have no suffix: `start_timeout_s` is --start-timeout. What is true or false can be turned off:
    `enable_prefix_caching` is --enable-prefix-caching and --no-enable-prefix-caching. A mapping is NAME=X,NAME=X.
    """
    hints, helps = typing.get_type_hints(kind), help_texts(kind)
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}
    for name in fields:
        default = "" if defaults[name] is None else f" (default: {defaults[name]})"
        text = helps[name].replace("None", "unset") + default
        parser.add_argument(
            "--" + name.removesuffix("_s").replace("_", "-"),
            dest=name,
            default=argparse.SUPPRESS,
            help=text.replace("%", "%%"),
            **_kind_of(hints[name]),
        )


def given(args: argparse.Namespace, fields: Iterable[str]) -> dict[str, Any]:
    """Those of the fields that the command line sets."""
    return {name: getattr(args, name) for name in fields if hasattr(args, name)}


def help_texts(kind: type) -> dict[str, str]:
    """What the `Args:` of a class's docstring say about each field."""
    docstring = inspect.getdoc(kind) or ""
    arguments = docstring.partition("Args:\n")[2].partition("\n\n")[0]
    return {name: " ".join(text.split()).rstrip(".") for name, text in _FIELD.findall(arguments)}


def _kind_of(hint: Any) -> dict[str, Any]:
    """How argparse reads a value of a type; of a union, the first member counts."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        members = typing.get_args(hint)
        if list[str] in members:
            return {"action": "append", "metavar": "TEXT"}
        hint = members[0]
    if typing.get_origin(hint) is Literal:
        return {"choices": typing.get_args(hint)}
    if typing.get_origin(hint) is Mapping:
        return {"type": _pairs, "metavar": "NAME=X,..."}
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    return {"type": hint, "metavar": {int: "N", float: "X", str: "TEXT"}[hint]}


def _pairs(text: str) -> dict[str, float]:
    """Names and numbers of "a=1,b=3"."""
    pairs = [pair.rpartition("=") for pair in text.split(",")]
    try:
        values = {name: float(value) for name, _, value in pairs}
    except ValueError:
        values = {}
    if len(values) < len(pairs) or not all(equals for _, equals, _ in pairs):
        raise argparse.ArgumentTypeError(f"must be NAME=NUMBER,NAME=NUMBER with every name once, got {text!r}")
    return values
