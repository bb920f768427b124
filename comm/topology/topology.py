"""Where the ranks are: NVLink domains, nodes and what fails together, as data.

A *domain* is a set of GPUs that reach each other's memory over NVLink; a *node* is a host; a *failure domain* is what goes down
at once (a node, unless the file says more). A topology is read from a JSON file, or put together from what every rank has found
on its machine (`comm.topology.probe`). The file:

    {"name": "two boards", "domains": [
      {"name": "board0", "nodes": [{"name": "host0", "ranks": 8}]},
      {"name": "board1", "nodes": [{"name": "host1", "ranks": 8, "failure_domain": "row A"}]}]}

Ranks are counted in the file's order.
"""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SHIPPED = ("nvl72", "nvl36", "hgx8")


@dataclass(frozen=True, kw_only=True)
class Place:
    """Of one rank, by name."""

    domain: str
    node: str
    failure_domain: str


@dataclass(frozen=True, kw_only=True)
class Topology:
    """The places of all ranks, by rank.

    Raises:
        ValueError: there are none, or a node is in several failure domains.
    """

    name: str
    places: tuple[Place, ...]

    def __post_init__(self) -> None:
        if not self.places:
            raise ValueError(f"topology {self.name!r} has no ranks; it must have at least one")
        failing: dict[str, str] = {}
        for place in self.places:
            if failing.setdefault(place.node, place.failure_domain) != place.failure_domain:
                raise ValueError(
                    f"failure_domain of node {place.node!r} must be the same for all its ranks, got "
                    f"{failing[place.node]!r} and {place.failure_domain!r}"
                )

    @property
    def num_ranks(self) -> int:
        return len(self.places)

    @property
    def num_domains(self) -> int:
        return len({place.domain for place in self.places})

    @property
    def num_nodes(self) -> int:
        return len({place.node for place in self.places})

    def domain_P(self) -> np.ndarray:
        """i64 [P]: each rank's domain, numbered in the order of their first ranks; likewise below."""
        return _numbers(place.domain for place in self.places)

    def node_P(self) -> np.ndarray:
        return _numbers(place.node for place in self.places)

    def failure_domain_P(self) -> np.ndarray:
        return _numbers(place.failure_domain for place in self.places)

    def ranks_of_domains(self) -> list[list[int]]:
        """The ranks of every domain."""
        domain_P = self.domain_P()
        return [np.flatnonzero(domain_P == domain).tolist() for domain in range(self.num_domains)]

    def rails(self) -> tuple[list[int], list[int]] | None:
        """Each rank's domain and its place there; None if there is one domain, or they differ in size or order of ranks."""
        ranks = self.ranks_of_domains()
        size = len(ranks[0])
        in_order = ranks == [list(range(d * size, (d + 1) * size)) for d in range(len(ranks))]
        if len(ranks) == 1 or size == 1 or not in_order:
            return None
        return self.domain_P().tolist(), [rank % size for rank in range(self.num_ranks)]

    def first(self, num_ranks: int) -> Topology:
        """Of the first ranks only.

        Raises:
            ValueError: there are not as many.
        """
        if not 1 <= num_ranks <= self.num_ranks:
            raise ValueError(f"ep_size must be in [1, {self.num_ranks}], the ranks of {self.name!r}, got {num_ranks}")
        return Topology(name=self.name, places=self.places[:num_ranks])

    def __str__(self) -> str:
        sizes = sorted({len(ranks) for ranks in self.ranks_of_domains()})
        counts = ((self.num_ranks, "rank"), (self.num_nodes, "node"), (self.num_domains, "NVLink domain"))
        ranks, nodes, domains = (f"{count} {noun}{'s' if count > 1 else ''}" for count, noun in counts)
        return f"{self.name}: {ranks} on {nodes} in {domains} of {' or '.join(map(str, sizes))}"


def read(source: str) -> Topology:
    """A topology of a file, or one that is shipped: "nvl72", "nvl36" or "hgx8".

    Raises:
        ValueError: there is no such file, or it says something wrong; the message names the field.
    """
    if source in SHIPPED:
        folder = importlib.resources.files("expertwire.comm.topology") / "presets"
        text = (folder / f"{source}.json").read_text(encoding="utf-8")
    else:
        try:
            text = Path(source).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"topology must be a readable file or one of {', '.join(SHIPPED)}, got {source!r}: {error}"
            ) from None
    try:
        return parse(json.loads(text))
    except json.JSONDecodeError as error:
        raise ValueError(f"topology {source!r} is not JSON: {error}") from None
    except ValueError as error:
        raise ValueError(f"topology {source!r}: {error}") from None


def parse(data: Any) -> Topology:
    """What a file holds.

    Raises:
        ValueError: the field that is wrong, and what it may be.
    """
    check_fields("the file", data, {"name", "domains"})
    domains = check_items("domains", data["domains"])
    places = [place for domain in domains for place in _places(domain)]
    _unique("domain", [domain["name"] for domain in domains])
    _unique("node", [node["name"] for domain in domains for node in domain["nodes"]])
    return Topology(name=check_text("name", data["name"]), places=tuple(places))


def _places(domain: Any) -> Iterator[Place]:
    check_fields("a domain", domain, {"name", "nodes"})
    name = check_text("name of a domain", domain["name"])
    for node in check_items(f"nodes of domain {name!r}", domain["nodes"]):
        check_fields(f"a node of domain {name!r}", node, {"name", "ranks"}, {"failure_domain"})
        node_name = check_text("name of a node", node["name"])
        ranks = node["ranks"]
        if isinstance(ranks, bool) or not isinstance(ranks, int) or ranks < 1:
            raise ValueError(f"ranks of node {node_name!r} must be an integer >= 1, got {ranks!r}")
        failing = check_text(f"failure_domain of node {node_name!r}", node.get("failure_domain", node_name))
        yield from [Place(domain=name, node=node_name, failure_domain=failing)] * ranks


def _unique(kind: str, names: list[str]) -> None:
    if repeated := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"name of a {kind} must be unique, got {min(repeated)!r} twice")


def check_fields(what: str, value: Any, needed: Collection[str], optional: Collection[str] = ()) -> None:
    """Raises ValueError unless the value is an object with the fields that are needed, and no others but those optional ones."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{what} must be an object with {', '.join(sorted(needed or optional))}, got {value!r}")
    if missing := set(needed) - value.keys():
        raise ValueError(f"{what} must have {', '.join(sorted(missing))}")
    if unknown := value.keys() - {*needed, *optional}:
        raise ValueError(f"{what} has {min(unknown)!r}; allowed are {', '.join(sorted({*needed, *optional}))}")


def check_items(what: str, value: Any) -> list[Any]:
    """The value; raises ValueError unless it is a list with something in it."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"{what} must be a list with at least one entry, got {value!r}")
    return value


def check_text(what: str, value: Any) -> str:
    """The value; raises ValueError unless it is a text that is not empty."""
    if not isinstance(value, str) or not value:
        raise ValueError(f"{what} must be a text that is not empty, got {value!r}")
    return value


def _numbers(names: Iterable[str]) -> np.ndarray:
    seen: dict[str, int] = {}
    return np.array([seen.setdefault(name, len(seen)) for name in names], np.int64)
