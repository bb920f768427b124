"""NVLink domains, nodes and failure domains of the ranks.

A *domain* is a set of GPUs that reach each other's memory over NVLink; a *node* is a host; a *failure domain* fails
as a whole (a node, unless the file says otherwise). A topology is read from a JSON file, or assembled from the reports
of all ranks (`comm.topology.probe`). The file:

    {"name": "two boards", "domains": [
      {"name": "board0", "nodes": [{"name": "host0", "ranks": 8}]},
      {"name": "board1", "nodes": [{"name": "host1", "ranks": 8, "failure_domain": "row A"}]}]}

P ranks, counted in the file's order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from expertwire.comm.topology.json_fields import check_fields, list_of, positive_int, read_file, text_of

PRESETS = ("nvl72", "nvl36", "hgx8")
_PRESETS = Path(__file__).parent / "presets"


@dataclass(frozen=True, kw_only=True)
class RankLocation:
    """Names of a rank's NVLink domain, node and failure domain."""

    domain: str
    node: str
    failure_domain: str


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Locations of all ranks, by rank.

    Raises:
        ValueError: there are none, or a node is in several failure domains.
    """

    name: str
    locations: tuple[RankLocation, ...]

    def __post_init__(self) -> None:
        if not self.locations:
            raise ValueError(f"topology {self.name!r} has no ranks; it must have at least one")
        failing: dict[str, str] = {}
        for location in self.locations:
            if failing.setdefault(location.node, location.failure_domain) != location.failure_domain:
                raise ValueError(
                    f"failure_domain of node {location.node!r} must be the same for all its ranks, got "
                    f"{failing[location.node]!r} and {location.failure_domain!r}"
                )

    @property
    def num_ranks(self) -> int:
        return len(self.locations)

    @property
    def num_domains(self) -> int:
        return len({location.domain for location in self.locations})

    @property
    def num_nodes(self) -> int:
        return len({location.node for location in self.locations})

    def domain_P(self) -> np.ndarray:
        """Return each rank's domain, i64 [P], numbered in the order of first ranks; likewise below."""
        return _numbers(location.domain for location in self.locations)

    def failure_domain_P(self) -> np.ndarray:
        return _numbers(location.failure_domain for location in self.locations)

    def ranks_of_domains(self) -> list[list[int]]:
        """Return the ranks of every domain."""
        domain_P = self.domain_P()
        return [np.flatnonzero(domain_P == domain).tolist() for domain in range(self.num_domains)]

    def rails(self) -> tuple[list[int], list[int]] | None:
        """Return each rank's domain and its index there; None for one domain, or if domains differ in size or rank order."""
        ranks = self.ranks_of_domains()
        size = len(ranks[0])
        in_order = ranks == [list(range(d * size, (d + 1) * size)) for d in range(len(ranks))]
        if len(ranks) == 1 or size == 1 or not in_order:
            return None
        return self.domain_P().tolist(), [rank % size for rank in range(self.num_ranks)]

    def first(self, num_ranks: int) -> Topology:
        """Return the topology of the first ranks.

        Raises:
            ValueError: there are fewer.
        """
        if not 1 <= num_ranks <= self.num_ranks:
            raise ValueError(f"ep_size must be in [1, {self.num_ranks}], the ranks of {self.name!r}, got {num_ranks}")
        return Topology(name=self.name, locations=self.locations[:num_ranks])

    def __str__(self) -> str:
        sizes = sorted({len(ranks) for ranks in self.ranks_of_domains()})
        counts = ((self.num_ranks, "rank"), (self.num_nodes, "node"), (self.num_domains, "NVLink domain"))
        ranks, nodes, domains = (f"{count} {noun}{'s' if count > 1 else ''}" for count, noun in counts)
        return f"{self.name}: {ranks} on {nodes} in {domains} of {' or '.join(map(str, sizes))}"


def read(source: str) -> Topology:
    """Return the topology of a file or of a preset: "nvl72", "nvl36" or "hgx8".

    Raises:
        ValueError: the file cannot be read, or has an error; names the field.
    """
    path = str(_PRESETS / f"{source}.json") if source in PRESETS else source
    return read_file("topology", path, parse, f" or one of {', '.join(PRESETS)}")


def parse(data: Any) -> Topology:
    """Return the topology of a file's content.

    Raises:
        ValueError: a field is wrong; names it and what is allowed.
    """
    check_fields("the file", data, {"name", "domains"})
    domains = list_of("domains", data["domains"])
    locations = [location for domain in domains for location in _locations(domain)]
    _unique("domain", [domain["name"] for domain in domains])
    _unique("node", [node["name"] for domain in domains for node in domain["nodes"]])
    return Topology(name=text_of("name", data["name"]), locations=tuple(locations))


def _locations(domain: Any) -> Iterator[RankLocation]:
    check_fields("a domain", domain, {"name", "nodes"})
    name = text_of("name of a domain", domain["name"])
    for node in list_of(f"nodes of domain {name!r}", domain["nodes"]):
        check_fields(f"a node of domain {name!r}", node, {"name", "ranks"}, {"failure_domain"})
        node_name = text_of("name of a node", node["name"])
        ranks = positive_int(f"ranks of node {node_name!r}", node["ranks"])
        failing = text_of(f"failure_domain of node {node_name!r}", node.get("failure_domain", node_name))
        yield from [RankLocation(domain=name, node=node_name, failure_domain=failing)] * ranks


def _unique(kind: str, names: list[str]) -> None:
    if repeated := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"name of a {kind} must be unique, got {min(repeated)!r} twice")


def _numbers(names: Iterable[str]) -> np.ndarray:
    seen: dict[str, int] = {}
    return np.array([seen.setdefault(name, len(seen)) for name in names], np.int64)
