"""The strategies and verifiers that clients of a server may name: ours, those of a module of the user's, and services."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from expertwire.deploy.grpc.credentials import ssl_credentials
from expertwire.deploy.grpc.grpc_verifier import GrpcVerifier, check_address
from expertwire.deploy.grpc.strategy_messages import to_options
from expertwire.deploy.proto import expertwire_v1_pb2 as pb
from expertwire.scheduler.sampling_params import MAX_BRANCHES
from expertwire.strategies.base import Strategy
from expertwire.strategies.registry import NO_VERIFIERS, STRATEGIES, parse_strategy, strategy_from_dict
from expertwire.strategies.verifiers import Verifier

MAX_VERIFIER_S = 300.0  # for which a client may let a verifier's call last, which keeps others waiting
MAX_ROWS = 64  # of a table
# Options that say how many branches or rounds there are.
_COUNTS = ("n", "width", "chains", "concurrency", "revisions", "max_steps", "lookahead", "max_retries")
_MAX_COUNT = MAX_BRANCHES
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,63}")


@dataclass(frozen=True, kw_only=True)
class Catalog:
    """Strategies and verifiers by name.

    Args:
        strategies: classes of strategies.
        verifiers: verifiers; each is called by threads.
    """

    strategies: Mapping[str, type] = field(default_factory=lambda: STRATEGIES)
    verifiers: Mapping[str, Verifier] = field(default_factory=lambda: NO_VERIFIERS)

    @property
    def strategy_names(self) -> list[str]:
        """The names of the strategies, in order."""
        return sorted(self.strategies)

    @property
    def verifier_names(self) -> list[str]:
        """The names of the verifiers, in order."""
        return sorted(self.verifiers)

    def parse(self, text: str) -> Strategy:
        """Return the strategy that a command line names.

        Raises:
            ValueError: names the option and the values it allows.
        """
        return strategy_from_dict(parse_strategy(text), verifiers=self.verifiers, strategies=self.strategies)

    def strategy(self, message: pb.Strategy) -> Strategy:
        """Return the strategy that a message asks for.

        Raises:
            ValueError: names the field and the values it allows.
        """
        options = to_options(message)
        check_limits(options)
        return strategy_from_dict(options, verifiers=self.verifiers, strategies=self.strategies)


def check_limits(options: Mapping[str, Any]) -> None:
    """Check what a client's strategy may cost a server, before it is made; wrong types are left to `strategy_from_dict`.

    Raises:
        ValueError: names the option and the values it allows.
    """
    for name in _COUNTS:
        value = options.get(name)
        if isinstance(value, int) and value > _MAX_COUNT:
            raise ValueError(f"{name} must be at most {_MAX_COUNT} in a request, got {value}")
    policy = options.get("verifier_policy")
    timeout_s = policy.get("timeout_s") if isinstance(policy, Mapping) else None
    if isinstance(timeout_s, int | float) and timeout_s > MAX_VERIFIER_S:
        raise ValueError(
            f"verifier_policy.timeout_s must be at most {MAX_VERIFIER_S:g} in a request, got {timeout_s:g}"
        )
    table = options.get("table")
    if isinstance(table, Sequence):
        if len(table) > MAX_ROWS:
            raise ValueError(f"table must have at most {MAX_ROWS} rows in a request, got {len(table)}")
        for row in table:
            inner = row.get("strategy") if isinstance(row, Mapping) else None
            if isinstance(inner, Mapping):
                check_limits(inner)


def open_catalog(module: str | None, services: Sequence[str], ca_certs: str | None) -> Catalog:
    """Return the catalog of a server.

    Args:
        module: name of a module, or path of a .py file, with a dictionary STRATEGIES of classes, VERIFIERS of callables, or both;
            None: there is none.
        services: "NAME=HOST:PORT" of each verifier that is a gRPC service.
        ca_certs: PEM file of the authorities of these services; None: they have no TLS.

    Raises:
        ValueError: names the option, the module and what is wrong with it.
    """
    if ca_certs is not None and not services:
        raise ValueError("verifier_ca_certs has no effect without verifier")
    strategies, verifiers = ({}, {}) if module is None else _members(module)
    credentials = None if ca_certs is None else ssl_credentials(ca_certs)
    for service in services:
        name, equals, address = service.partition("=")
        if not equals or not _NAME.fullmatch(name):
            raise ValueError(f"verifier must be NAME=HOST:PORT, got {service!r:.200}")
        check_address(f"verifier {name}", address)
        if name in verifiers:
            raise ValueError(f"verifier must have names of which each is given once, got {name!r} twice")
        verifiers[name] = GrpcVerifier(address, credentials=credentials)
    return Catalog(strategies={**STRATEGIES, **strategies}, verifiers=verifiers)


def _members(name: str) -> tuple[dict[str, type], dict[str, Verifier]]:
    module = _import(name)
    if not hasattr(module, "STRATEGIES") and not hasattr(module, "VERIFIERS"):
        raise ValueError(f"strategies: module {name} must have a dictionary STRATEGIES or VERIFIERS, got neither")
    strategies = _dictionary(name, module, "STRATEGIES", _why_no_strategy)
    verifiers = _dictionary(name, module, "VERIFIERS", lambda value: "" if callable(value) else "must be callable")
    if taken := sorted(strategies.keys() & STRATEGIES.keys()):
        raise ValueError(f"strategies: STRATEGIES of module {name} must have other names than ours, got {taken[0]!r}")
    return strategies, verifiers


def _import(name: str) -> ModuleType:
    """Import a module by its name or its file; whatever it raises is a ValueError that names it."""
    try:
        return _import_file(name) if name.endswith(".py") else importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise ValueError(f"strategies: module {name} cannot be imported: {type(error).__name__}: {error}") from error


def _import_file(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None, path
    assert spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def _dictionary(name: str, module: ModuleType, kind: str, why_not: Callable[[Any], str]) -> dict[str, Any]:
    """Return a module's dictionary of strategies or verifiers."""
    values = getattr(module, kind, {})
    if not isinstance(values, Mapping):
        raise ValueError(f"strategies: {kind} of module {name} must be a dictionary, got {values!r:.200}")
    for key, value in values.items():
        if not isinstance(key, str) or not _NAME.fullmatch(key):
            text = "must have names of letters, digits and _ . -"
            raise ValueError(f"strategies: {kind} of module {name} {text}, got {key!r:.200}")
        if why := why_not(value):
            raise ValueError(f"strategies: {kind}[{key!r}] of module {name} {why}, got {value!r:.200}")
    return dict(values)


def _why_no_strategy(value: object) -> str:
    """Return why a value is no class of strategies, or ""."""
    if not isinstance(value, type) or not dataclasses.is_dataclass(value):
        return "must be a dataclass"
    missing = [name for name in ("needs", "decide", "select") if not hasattr(value, name)]
    return f"must have {', '.join(missing)}" if missing else ""
