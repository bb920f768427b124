"""Command-line options from dataclasses: the fields' types and choices, with help from the docstring."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.resources
import inspect
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from expertwire.deploy.grpc.config import Limits, ServerConfig
from expertwire.engine.config.engine_config import EngineConfig

if TYPE_CHECKING:
    from expertwire.deploy.grpc.catalog import Catalog

# The groups of the engine's options in --help; "engine" has those that are in no other.
ENGINE_GROUPS: Mapping[str, tuple[str, ...]] = {
    "model": (
        "revision", "served_model_name", "dtype", "device", "load_format", "generation_config",
        "quantization", "numerics", "attention_backend", "max_model_len", "seed",
    ),
    "ranks": ("ep_size", "launcher", "ray_address", "threads_per_rank", "start_timeout_s", "step_timeout_s"),
    "scheduling": (
        "max_num_seqs", "max_num_batched_tokens", "chunked_prefill_size", "max_queued_requests",
        "max_queued_requests_per_tenant", "scheduling_policy", "aging",
    ),
    "KV cache": (
        "enable_prefix_caching", "block_size", "kv_cache_dtype", "snapshot_every", "snapshot_share", "kv_cache_memory_bytes",
        "gpu_memory_utilization",
    ),
    "experts": (
        "num_redundant_experts", "topology", "eplb_step_interval", "all2all_backend", "all2all_table", "dispatch_dtype",
        "enable_two_batch_overlap",
    ),
}  # fmt: skip
ENGINE_FIELDS = tuple(field.name for field in dataclasses.fields(EngineConfig) if field.name != "model")
_QUOTAS = ("tenant_quotas", "default_tenant_quota")  # the command line takes them from the file of tenants
SERVER_FIELDS = tuple(field.name for field in dataclasses.fields(ServerConfig) if field.name != "limits")
LIMIT_FIELDS = tuple(field.name for field in dataclasses.fields(Limits))
BRANCH_FIELDS = ("temperature", "top_p", "top_k", "min_p", "max_tokens", "stop")
CATALOG_FIELDS = ("strategies", "verifier", "verifier_ca_certs")
EXPLAINED_FIELDS = ("all2all_backend", "all2all_table", "dispatch_dtype", "enable_two_batch_overlap", "kv_cache_dtype")
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_FIELD = re.compile(r"^    (\w+): (.+(?:\n {8,}.+)*)", re.MULTILINE)


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Add `MODEL` and the options of `EngineConfig`."""
    text = "folder of a Hugging Face checkpoint, or its name on the hub (default: the demo model)"
    parser.add_argument("model", metavar="MODEL", nargs="?", help=text)
    for title, fields in engine_groups().items():
        add_options(parser.add_argument_group(title), EngineConfig, fields)


def engine_groups() -> dict[str, tuple[str, ...]]:
    """Return the engine's options by the title of their group."""
    grouped = {*_QUOTAS, *(name for fields in ENGINE_GROUPS.values() for name in fields)}
    others = tuple(name for name in ENGINE_FIELDS if name not in grouped)
    return {**ENGINE_GROUPS, **({"engine": others} if others else {})}


def engine_config(args: argparse.Namespace) -> EngineConfig:
    """Return the engine's options from the command line, by default for the demo model.

    Raises:
        ValueError: an option is not usable.
    """
    return EngineConfig(**{**set_fields(args, ENGINE_FIELDS), "model": model_folder(args)})


def model_folder(args: argparse.Namespace) -> str:
    """Return the model's folder from the command line, by default the demo model's."""
    return args.model or str(importlib.resources.files("expertwire") / "demo_model")


def add_options(parser: argparse.ArgumentParser | argparse._ArgumentGroup, kind: type, fields: Iterable[str]) -> None:
    """Add an option for each of the `fields` of the dataclass `kind`.

    `start_timeout_s` becomes --start-timeout. A bool `x` becomes --x and --no-x. A number of bytes
    is also written as 512M or 4G.
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
            **({"type": parse_size, "metavar": "SIZE"} if name.endswith("_bytes") else _kind_of(hints[name])),
        )


def set_fields(args: argparse.Namespace, fields: Iterable[str]) -> dict[str, Any]:
    """Return those of the fields that the command line sets."""
    return {name: getattr(args, name) for name in fields if hasattr(args, name)}


def help_texts(kind: type) -> dict[str, str]:
    """Return the text of each field under `Args:` in a class's docstring."""
    docstring = inspect.getdoc(kind) or ""
    arguments = docstring.partition("Args:\n")[2].partition("\n\n")[0]
    return {name: " ".join(text.split()).rstrip(".") for name, text in _FIELD.findall(arguments)}


def _kind_of(hint: Any) -> dict[str, Any]:
    """Return the arguments of `add_argument` for a type; of a union, for its first member."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        members = typing.get_args(hint)
        if list[str] in members:
            return {"action": "append", "metavar": "TEXT"}
        hint = members[0]
    if typing.get_origin(hint) is Literal:
        return {"choices": typing.get_args(hint)}
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    return {"type": hint, "metavar": {int: "N", float: "X", str: "TEXT"}[hint]}


def parse_size(text: str) -> int:
    """Return the number of bytes that a text like "4096", "512M" or "1.5G" means; K, M, G and T are powers of 1,024."""
    match = re.fullmatch(r"(-?\d+(?:\.\d+)?)([KMGT]?)(?:i?B)?", text, re.IGNORECASE)
    if match is None:
        raise argparse.ArgumentTypeError(f"must be a number of bytes such as 4096, 512M or 1.5G, got {text!r}")
    return (
        int(float(match[1]) * _UNITS[match[2].upper()]) if "." in match[1] else int(match[1]) * _UNITS[match[2].upper()]
    )


def catalog_of(args: argparse.Namespace) -> Catalog:
    """Return the strategies and verifiers that `CATALOG_FIELDS` name.

    Raises:
        ValueError: names the option, the module and what is wrong with it.
    """
    from expertwire.deploy.grpc.catalog import open_catalog

    fields = set_fields(args, CATALOG_FIELDS)
    return open_catalog(fields.get("strategies"), fields.get("verifier", ()), fields.get("verifier_ca_certs"))


def sentence(text: str) -> str:
    """Return a help text as a sentence."""
    return f"{text[0].upper()}{text[1:]}."
