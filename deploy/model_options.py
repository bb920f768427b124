"""Options of `expertwire serve` with several models: their names, paths, own options, and shares of the machine."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from typing import NoReturn

from expertwire.deploy.options import ENGINE_FIELDS, add_engine_options, engine_config, set_fields
from expertwire.engine.config.engine_config import EngineConfig

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
_NOT_FOR_ALL = ("served_model_name", "revision")  # of one model only


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for several models."""
    group = parser.add_argument_group("several models", "each has an engine of its own; requests name one")
    text = "models of the server instead of MODEL, the first of which answers requests that name none"
    group.add_argument("--models", metavar="NAME=PATH,...", help=text)
    text = "an option of one model's engine, such as large.ep-size=2; may be repeated. Others are for all models"
    group.add_argument("--model-options", action="append", default=[], metavar="NAME.OPTION=VALUE", help=text)
    text = "shares of the cores, or of GPU memory, such as small=1,large=3 (default: equal ones)"
    group.add_argument("--shares", metavar="NAME=X,...", help=text)


def engine_configs(args: argparse.Namespace) -> list[EngineConfig]:
    """Return the options of each model's engine from the command line.

    Raises:
        ValueError: names the option and what is allowed.
    """
    if args.models is None:
        for option, value in (("--model-options", args.model_options), ("--shares", args.shares)):
            if value:
                raise ValueError(f"{option} needs --models, got {value!r}")
        return [engine_config(args)]
    if args.model is not None:
        raise ValueError(f"MODEL must not be given with --models, got {args.model!r}")
    common = set_fields(args, ENGINE_FIELDS)
    if given := [name for name in _NOT_FOR_ALL if name in common]:
        option = given[0].replace("_", "-")
        raise ValueError(
            f"--{option} must not be given with --models: use NAME=PATH, or --model-options NAME.{option}=X"
        )
    paths = _pairs("--models", args.models)
    own = _own_options(args.model_options, list(paths))
    configs = []
    for name, path in paths.items():
        if "served_model_name" in own[name]:
            raise ValueError(f"--model-options {name}.served-model-name must not be given: the name is {name!r}")
        configs.append(EngineConfig(**{**common, **own[name], "model": path, "served_model_name": name}))
    fixed = [common.keys() | own[name].keys() for name in paths]
    return _share(configs, fixed, _shares(args.shares, list(paths)))


class _OptionParser(argparse.ArgumentParser):
    """Parses the options of one model's engine."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"--model-options {self.prog}: {message}")


def _own_options(texts: Sequence[str], names: Sequence[str]) -> dict[str, dict[str, object]]:
    """Return the options of each model's own."""
    own: dict[str, dict[str, object]] = {name: {} for name in names}
    for text in texts:
        place, equals, value = text.partition("=")
        name = next((name for name in names if place.startswith(f"{name}.")), None)
        if not equals or name is None:
            raise ValueError(f"--model-options must be NAME.OPTION=VALUE with one of {', '.join(names)}, got {text!r}")
        option = place[len(name) + 1 :].replace("_", "-")
        parser = _OptionParser(prog=place, add_help=False, allow_abbrev=False)
        add_engine_options(parser)
        is_switch = value in ("true", "false") and f"--no-{option}" in parser._option_string_actions
        switch = f"--{option}" if value == "true" else f"--no-{option}"
        own[name] |= set_fields(parser.parse_args([switch] if is_switch else [f"--{option}={value}"]), ENGINE_FIELDS)
    return own


def _pairs(option: str, text: str) -> dict[str, str]:
    """Return the values of "name=value,name=value"."""
    pairs: dict[str, str] = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        if not equals or not value or not _NAME.fullmatch(name) or name in pairs:
            raise ValueError(
                f"{option} must be NAME=VALUE,NAME=VALUE with different names of letters, digits, _ . and -, got {text!r}"
            )
        pairs[name] = value
    return pairs


def _shares(text: str | None, names: Sequence[str]) -> dict[str, float]:
    """Return each model's share; they add up to 1."""
    if text is None:
        return dict.fromkeys(names, 1 / len(names))
    given: Mapping[str, str] = _pairs("--shares", text)
    try:
        values = {name: float(given[name]) for name in names}
    except (KeyError, ValueError):
        values = {}
    if not values or given.keys() != values.keys() or not all(0 < value < 1e6 for value in values.values()):
        raise ValueError(f"--shares must have a number > 0 for each of {', '.join(names)}, got {text!r}")
    return {name: value / sum(values.values()) for name, value in values.items()}


def _share(
    configs: Sequence[EngineConfig], fixed: Sequence[set[str]], shares: Mapping[str, float]
) -> list[EngineConfig]:
    """Divide the cores, and the memory of GPUs, among engines that are not told what to take."""
    cores, taken, shared = len(os.sched_getaffinity(0)), 0.0, []
    for config, names, share in zip(configs, fixed, shares.values(), strict=True):
        # What is in use of a GPU counts the engines that have started before.
        taken += share
        if "threads_per_rank" not in names:
            config = dataclasses.replace(config, threads_per_rank=max(1, int(cores * share) // config.ep_size))
        if "gpu_memory_utilization" not in names:
            memory = config.gpu_memory_utilization * min(1.0, taken)
            config = dataclasses.replace(config, gpu_memory_utilization=memory)
        shared.append(config)
    return shared
