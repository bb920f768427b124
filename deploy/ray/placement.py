"""Placement of GPU ranks on a Ray cluster: within one NVLink domain if one is large enough.

Ray's `PACK` fills nodes and does not know domains, which labels of the nodes name: `ray.io/gpu-domain`, set by `ray_cluster.sh`
and used by Ray's own topology strategy, or `nvidia.com/gpu.clique`, set by NVIDIA's GPU feature discovery on Kubernetes. A node
without either is its own domain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

DOMAIN_LABELS = ("ray.io/gpu-domain", "nvidia.com/gpu.clique")
_NODE_LABEL = "ray.io/node-id"  # every node has it


@dataclass(frozen=True, kw_only=True)
class Node:
    """A node of the cluster, as `ray.nodes` lists it.

    Args:
        label, domain: the label that names its NVLink domain, and the label's value.
    """

    node_id: str
    num_gpus: int
    label: str
    domain: str

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> Node:
        labels = entry.get("Labels", {})
        label = next((label for label in DOMAIN_LABELS if labels.get(label)), _NODE_LABEL)
        domain = entry["NodeID"] if label == _NODE_LABEL else labels[label]
        num_gpus = int(entry["Resources"].get("GPU", 0))
        return cls(node_id=entry["NodeID"], num_gpus=num_gpus, label=label, domain=domain)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A placement of the ranks. `selectors`: for each rank, the label that its node must have."""

    selectors: tuple[dict[str, str], ...]
    domains: tuple[str, ...]  # in the order of the ranks


def layouts(nodes: Sequence[Node], num_ranks: int) -> list[Layout]:
    """Return placements of the ranks, the best first.

    These are the domains that are large enough, the smallest first; if there is none, as few domains as possible, with equally
    many ranks in each if they fit.

    Raises:
        ValueError: the cluster has too few GPUs.
    """
    gpus: dict[tuple[str, str], int] = {}
    for node in nodes:
        gpus[node.label, node.domain] = gpus.get((node.label, node.domain), 0) + node.num_gpus
    total = sum(gpus.values())
    if total < num_ranks:
        raise ValueError(f"ep_size is {num_ranks}, but the Ray cluster has {total} GPUs; allowed are at most {total}")
    by_size = sorted(gpus, key=lambda domain: (gpus[domain], domain))
    if enough := [domain for domain in by_size if gpus[domain] >= num_ranks]:
        return [_layout([(domain, num_ranks)]) for domain in enough]
    largest, fewest, found = by_size[::-1], 0, 0
    while found < num_ranks:
        found += gpus[largest[fewest]]
        fewest += 1
    each, rest = divmod(num_ranks, fewest)
    if not rest and gpus[largest[fewest - 1]] >= each:
        return [_layout([(domain, each) for domain in largest[:fewest]])]
    counts, left = [], num_ranks
    for domain in largest[:fewest]:
        counts.append((domain, min(left, gpus[domain])))
        left -= counts[-1][1]
    return [_layout(counts)]


def _layout(counts: Sequence[tuple[tuple[str, str], int]]) -> Layout:
    selectors = [{label: name} for (label, name), count in counts for _ in range(count)]
    return Layout(selectors=tuple(selectors), domains=tuple(name for (_, name), _ in counts))


def in_order(bundle_nodes: Mapping[int, str], nodes: Sequence[Node], here: str) -> list[int]:
    """Return the bundles in the order of the ranks, grouped by domain and node; those of the node `here` come first.

    Args:
        bundle_nodes: bundle -> id of its node.
        nodes: the cluster's nodes.
        here: id of the controller's node.
    """
    domain_of = {node.node_id: (node.label, node.domain) for node in nodes}
    first = domain_of.get(here)

    def place(bundle: int) -> tuple[Any, ...]:
        node = bundle_nodes[bundle]
        domain = domain_of.get(node, (_NODE_LABEL, node))
        return domain != first, domain, node != here, node, bundle

    return sorted(bundle_nodes, key=place)


def ordinal(gpu_ids: Sequence[int | str], visible: str | None) -> int:
    """Return the index, among the devices that this process sees, of the GPU that Ray has assigned to it; 0 if there is none.

    Ray assigns indices on its node or, if CUDA_VISIBLE_DEVICES was set when it started there, entries of that list, which may be
    numbers or UUIDs (`get_accelerator_ids_for_accelerator_resource`, ray 2.50 to 2.60). CUDA counts the list's entries.

    Args:
        gpu_ids: `ray.get_gpu_ids()`.
        visible: the process's CUDA_VISIBLE_DEVICES.

    Raises:
        ValueError: the process does not see the GPU.
    """
    if not gpu_ids:
        return 0
    assert len(gpu_ids) == 1, f"a rank has one GPU, Ray has assigned {gpu_ids}"
    mine = str(gpu_ids[0])
    if not visible:
        return int(mine)
    names = [name.strip() for name in visible.split(",")]
    if mine not in names:
        raise ValueError(
            f"Ray has assigned GPU {mine}, but the process sees only those of CUDA_VISIBLE_DEVICES={visible}"
        )
    return names.index(mine)
