"""Ranks on a Ray cluster of GPUs: which nodes, in which order, and which of a node's devices; over tables like Ray's."""

from types import SimpleNamespace

import pytest

from expertwire.deploy.ray import launcher
from expertwire.deploy.ray.placement import Node, in_order, layouts, ordinal
from expertwire.engine.launcher import WorkerSpec


def node(name, gpus=4, **labels):
    """As `ray.nodes` lists it."""
    labels = {key.replace("_", "/", 1).replace("_", "-"): value for key, value in labels.items()}
    resources = {"CPU": 64.0} | ({"GPU": float(gpus)} if gpus else {})
    return Node.of({"NodeID": name, "Resources": resources, "Labels": {"ray.io/node-id": name, **labels}})


def rack(name, first, num_nodes=18, gpus=4):
    return [node(f"n{first + i:02}", gpus, **{"ray.io_gpu_domain": name}) for i in range(num_nodes)]


def test_one_node_takes_an_engine_that_it_can_hold():
    nodes = [node("big", 8), node("small", 4), node("head", 0)]
    assert [layout.domains for layout in layouts(nodes, 4)] == [("small",), ("big",)]
    [layout] = layouts(nodes, 8)
    assert layout.selectors == ({"ray.io/node-id": "big"},) * 8


def test_72_ranks_are_in_one_rack_of_two():
    nodes = [*rack("A", 0, num_nodes=17), *rack("B", 20), node("other", 8)]
    [layout] = layouts(nodes, 72)
    assert layout.selectors == ({"ray.io/gpu-domain": "B"},) * 72
    assert [found.domains for found in layouts(nodes, 68)] == [("A",), ("B",)]


def test_the_label_of_kubernetes_counts_too():
    nodes = [node(f"n{i}", **{"nvidia.com/gpu.clique": "7b.0"}) for i in range(2)]
    [layout] = layouts(nodes, 8)
    assert layout.selectors == ({"nvidia.com/gpu.clique": "7b.0"},) * 8


def test_an_engine_larger_than_any_domain_has_as_few_as_can_be_and_equal_parts():
    nodes = [node("a", 4), node("b", 8), node("c", 8), node("d", 8)]
    [layout] = layouts(nodes, 16)
    assert len(layout.domains) == 2
    assert [next(iter(selector.values())) for selector in layout.selectors] == ["d"] * 8 + ["c"] * 8
    [uneven] = layouts(nodes, 27)
    assert len(uneven.domains) == 4
    assert len(uneven.selectors) == 27


def test_too_few_gpus_is_a_clear_error():
    with pytest.raises(ValueError, match="ep_size is 9, but the Ray cluster has 8 GPUs; allowed are at most 8"):
        layouts([node("a", 8), node("head", 0)], 9)


def test_ranks_of_a_node_and_of_a_domain_are_neighbours():
    """Names of nodes interleave the racks; the controller is on n03, in the second."""
    nodes = [node(f"n{i:02}", **{"ray.io_gpu_domain": "AB"[i % 2]}) for i in range(6)]
    bundles = {bundle: f"n{bundle % 6:02}" for bundle in range(24)}
    ordered = [bundles[bundle] for bundle in in_order(bundles, nodes, "n03")]
    assert ordered == [name for name in ("n03", "n01", "n05", "n00", "n02", "n04") for _ in range(4)]
    elsewhere = [bundles[bundle] for bundle in in_order(bundles, nodes, "head")]
    assert elsewhere[::4] == ["n00", "n02", "n04", "n01", "n03", "n05"]


@pytest.mark.parametrize(
    ("assigned", "visible", "expected"),
    [
        ([3], None, 3),
        ([0], "", 0),
        ([], None, 0),  # a CPU rank
        (["6"], "4,5,6,7", 2),  # the node's Ray was started with half of its GPUs
        (["GPU-5c2a"], "GPU-77aa, GPU-5c2a", 1),
        (["MIG-1/0/0"], "MIG-1/0/0", 0),
    ],
)
def test_a_rank_finds_its_gpu_among_those_it_sees(assigned, visible, expected):
    assert ordinal(assigned, visible) == expected


def test_a_gpu_that_cannot_be_seen_is_named():
    with pytest.raises(
        ValueError, match="has assigned GPU 6, but the process sees only those of CUDA_VISIBLE_DEVICES=0,1"
    ):
        ordinal(["6"], "0,1")


@pytest.mark.parametrize(
    ("nodes", "num_ranks", "expected"),
    [
        ([(192, 8), (192, 8)], 16, {"CPU": 1, "GPU": 1}),
        ([(64, 0), (4, 8), (4, 8)], 16, {"CPU": 0.5, "GPU": 1}),  # the head's cores are of no use to ranks elsewhere
        ([(64, 0), (16, 8), (3, 4)], 12, {"CPU": 0.5, "GPU": 1}),
        ([(4, 0), (2, 0)], 12, {"CPU": 0.5}),
    ],
)
def test_a_rank_takes_a_share_of_the_cores_beside_its_gpu(nodes, num_ranks, expected):
    """Otherwise a cluster whose GPUs are all free would have no room: Ray places a rank's CPU and GPU on one node."""
    entries = [{"Resources": {"CPU": float(cpus)} | ({"GPU": float(gpus)} if gpus else {})} for cpus, gpus in nodes]
    spec = WorkerSpec(config=SimpleNamespace(device="auto"), num_ranks=num_ranks, address="", token="")
    assert launcher._resources(spec, entries) == expected


def test_gpus_without_cores_are_named():
    entries = [{"Resources": {"CPU": 8.0}}, {"Resources": {"GPU": 8.0}}]
    spec = WorkerSpec(config=SimpleNamespace(device="cuda"), num_ranks=8, address="", token="")
    with pytest.raises(ValueError, match="has GPUs and no CPUs; start it with --num-cpus"):
        launcher._resources(spec, entries)
