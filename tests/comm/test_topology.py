"""Topology files, topologies assembled from reports, and checks of the fabric before allocation across nodes."""

import ctypes
import json
import sys
from collections import Counter
from dataclasses import replace

import pytest
from helpers.ranks import Ranks

from expertwire.comm.topology import fabric as topology_fabric
from expertwire.comm.topology import probe as topology_probe
from expertwire.comm.topology import topology
from expertwire.comm.topology.fabric import Driver
from expertwire.comm.topology.probe import RankReport


@pytest.mark.parametrize(("name", "ranks", "nodes"), [("nvl72", 72, 18), ("nvl36", 36, 9), ("hgx8", 8, 1)])
def test_presets(name, ranks, nodes):
    found = topology.read(name)
    assert (found.name, found.num_ranks, found.num_nodes, found.num_domains) == (name, ranks, nodes, 1)
    assert list(Counter(location.node for location in found.locations).values()) == [ranks // nodes] * nodes
    assert found.ranks_of_domains() == [list(range(ranks))]


@pytest.fixture(scope="module")
def three_ranks():
    with Ranks(3) as ranks:
        yield ranks


def two_racks():
    nodes = [{"name": f"n{i}", "ranks": i + 1} for i in range(3)]
    nodes[1]["failure_domain"] = nodes[2]["failure_domain"] = "shelf"
    return {"name": "x", "domains": [{"name": "a", "nodes": nodes[:2]}, {"name": "b", "nodes": nodes[2:]}]}


def test_a_file_says_where_every_rank_is(tmp_path):
    path = tmp_path / "topology.json"
    path.write_text(json.dumps(two_racks()))
    found = topology.read(str(path))
    assert found.domain_P().tolist() == [0, 0, 0, 1, 1, 1]
    assert [location.node for location in found.locations] == ["n0", "n1", "n1", "n2", "n2", "n2"]
    assert found.failure_domain_P().tolist() == [0, 1, 1, 1, 1, 1]
    assert found.ranks_of_domains() == [[0, 1, 2], [3, 4, 5]]
    assert str(found) == "x: 6 ranks on 3 nodes in 2 NVLink domains of 3"
    assert found.first(4).domain_P().tolist() == [0, 0, 0, 1]
    assert str(found.first(4)) == "x: 4 ranks on 3 nodes in 2 NVLink domains of 1 or 3"
    assert str(found.first(1)) == "x: 1 rank on 1 node in 1 NVLink domain of 1"
    with pytest.raises(ValueError, match=r"ep_size must be in \[1, 6\], the ranks of 'x', got 7"):
        found.first(7)


def broken(path, value):
    data = two_racks()
    at = data
    for key in path[:-1]:
        at = at[key]
    if value is None:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return data


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["name"], "", "name must be a text that is not empty, got ''"),
        (["domains"], [], r"domains must be a list with at least one entry, got \[\]"),
        (["domains"], None, "the file must have domains"),
        (["size"], 3, "the file has 'size'; allowed are domains, name"),
        (["domains", 0], "a", "a domain must be an object with name, nodes, got 'a'"),
        (["domains", 1, "name"], "a", "name of a domain must be unique, got 'a' twice"),
        (["domains", 0, "nodes", 1, "name"], "n0", "name of a node must be unique, got 'n0' twice"),
        (["domains", 1, "nodes", 0, "name"], "n0", "name of a node must be unique, got 'n0' twice"),
        (["domains", 0, "nodes", 0, "ranks"], 0, "ranks of node 'n0' must be an integer >= 1, got 0"),
        (["domains", 0, "nodes", 0, "ranks"], True, "ranks of node 'n0' must be an integer >= 1, got True"),
        (["domains", 0, "nodes", 0, "ranks"], None, "a node of domain 'a' must have ranks"),
        (["domains", 0, "nodes", 0, "gpus"], 1, "has 'gpus'; allowed are failure_domain, name, ranks"),
        (["domains", 0, "nodes", 0, "failure_domain"], 7, "failure_domain of node 'n0' must be a text"),
    ],
)
def test_a_wrong_file_is_refused_by_the_name_of_the_field(path, value, message):
    with pytest.raises(ValueError, match=message):
        topology.parse(broken(path, value))


def test_a_file_that_is_no_json_or_not_there_is_named(tmp_path):
    path = tmp_path / "t.json"
    with pytest.raises(ValueError, match=r"one of nvl72, nvl36, hgx8, got '.*t\.json': .*No such file"):
        topology.read(str(path))
    path.write_text("{")
    with pytest.raises(ValueError, match=r"t\.json' is not JSON"):
        topology.read(str(path))
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"t\.json': the file must be an object with"):
        topology.read(str(path))


# ---- from reports


def gpu_ranks(nodes, peers=True, **fabric):
    """Return reports of ranks on these nodes, each with a GPU that reaches those of its node."""
    gpus = [f"GPU-{rank}" for rank in range(len(nodes))]
    return [
        RankReport(
            node=node,
            gpu=gpus[rank],
            peers=tuple(gpus[other] for other in range(len(nodes)) if peers and other != rank and nodes[other] == node),
            **fabric,
        )
        for rank, node in enumerate(nodes)
    ]


FABRIC = {"cluster": "ab" * 16, "clique": 3, "fabric_state": "completed"}


@pytest.mark.parametrize(
    ("reports", "domains"),
    [
        (gpu_ranks("aabb", **FABRIC), [0, 0, 0, 0]),
        (gpu_ranks("aabb"), [0, 0, 1, 1]),
        (gpu_ranks("abab"), [0, 1, 0, 1]),
        (gpu_ranks("aab", peers=False), [0, 1, 2]),
        ([replace(r, fabric_state="in progress") for r in gpu_ranks("ab", **FABRIC)], [0, 1]),
        ([replace(r, fabric_error=9) for r in gpu_ranks("ab", **FABRIC)], [0, 1]),
        ([replace(r, cluster="00" * 16) for r in gpu_ranks("ab", **FABRIC)], [0, 1]),
        ([replace(r, clique=rank) for rank, r in enumerate(gpu_ranks("ab", **FABRIC))], [0, 1]),
        ([RankReport(node="a"), RankReport(node="b"), RankReport(node="a")], [0, 1, 0]),
        ([RankReport(node="a", gpu="GPU-0")] * 2, [0, 0]),
        ([gpu_ranks("aa")[0], gpu_ranks("aa", peers=False)[1]], [0, 1]),
    ],
)
def test_domains_follow_from_reports(reports, domains):
    found = topology_probe.assemble(reports)
    assert found.domain_P().tolist() == domains
    assert [location.node for location in found.locations] == [report.node for report in reports]


def test_domains_join_through_others():
    """Ranks 0 and 2 do not reach each other directly; rank 1 reaches both."""
    one, two, three = gpu_ranks("aab", **FABRIC)
    one = replace(one, fabric_state="not supported")
    assert topology_probe.assemble([one, three, two]).domain_P().tolist() == [0, 0, 0]


def test_without_a_gpu_a_rank_reports_its_node_only():
    report = topology_probe.probe("host", "cpu")
    assert report == RankReport(node="host", shared_bytes=report.shared_bytes)
    assert report.shared_bytes > 0


def gather(group, reports):
    return topology_probe.gather_reports(group, reports[group.rank], "cpu")


def test_every_rank_learns_all_reports(three_ranks):
    reports = gpu_ranks("aab", **FABRIC)
    assert three_ranks.run(gather, reports) == [reports] * 3


class FabricInfo(ctypes.Structure):
    """Fields of pynvml.c_nvmlGpuFabricInfo_t, nvidia-ml-py 12 and 13."""

    _fields_ = (
        ("clusterUuid", ctypes.c_ubyte * 16), ("status", ctypes.c_uint), ("cliqueId", ctypes.c_uint), ("state", ctypes.c_uint),
    )  # fmt: skip


class Nvml:
    """A fake pynvml; `state` None: a driver without fabric information."""

    NVMLError, c_nvmlGpuFabricInfo_t = OSError, FabricInfo

    def __init__(self, state, status=0):
        self._state, self._status = state, status

    def nvmlDeviceGetHandleByUUID(self, gpu):
        if gpu != "GPU-1":
            raise self.NVMLError("Not Found")
        return 5

    def nvmlDeviceGetGpuFabricInfo(self, handle, info):
        assert handle == 5
        if self._state is None:
            raise self.NVMLError("Not Supported")
        info._obj.clusterUuid[:] = bytes(range(16))
        info._obj.status, info._obj.cliqueId, info._obj.state = self._status, 32766, self._state


def test_nvml_is_asked_for_the_fabric():
    assert topology_probe.fabric_info(Nvml(3), "GPU-1") == {
        "cluster": "000102030405060708090a0b0c0d0e0f", "clique": 32766, "fabric_state": "completed", "fabric_error": 0,
    }  # fmt: skip
    assert topology_probe.fabric_info(Nvml(2, status=1), "GPU-1")["fabric_state"] == "in progress"
    assert topology_probe.fabric_info(Nvml(None), "GPU-1") == {}
    with pytest.raises(ValueError, match=r"NVML knows no GPU-2 \(Not Found\)"):
        topology_probe.fabric_info(Nvml(3), "GPU-2")


def test_a_machine_without_nvml_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(ValueError, match="nvidia-ml-py is not installed"):
        topology_probe.load_nvml()


# ---- before allocating across nodes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fabric_state": "in progress"}, "rank 1 on b has its NVLink fabric in progress"),
        ({"fabric_error": 9}, r"rank 1 on b is in no fabric \(status 9"),
        ({"cluster": "00" * 16}, "rank 1 on b is in no fabric"),
        ({"clique": 4}, "rank 1 on b is in clique 4 of fabric abab.*, but rank 0 is in clique 3"),
        ({"cluster": "cd" * 16}, "rank 1 on b is in clique 3 of fabric cdcd"),
    ],
)
def test_ranks_without_a_common_fabric_are_refused(change, message):
    reports = gpu_ranks("ab", **FABRIC)
    topology_fabric.check_fabric(reports)
    with pytest.raises(ValueError, match=f"(?s){message}.*use all2all_backend 'nccl' or 'reference'"):
        topology_fabric.check_fabric([reports[0], replace(reports[1], **change)])


def test_one_node_needs_no_fabric():
    topology_fabric.check_fabric(gpu_ranks("aa"))


class Cuda:
    """A driver whose exported memory is a handle with the word in it; calls are noted.

    `refuse` is answered with an error; `wrong`: the memory holds something else.
    """

    def __init__(self, refuse=None, wrong=False):
        self._refuse, self._wrong, self.calls, self._words = refuse, wrong, [], {}

    def __getattr__(self, name):
        def call(*args):
            self.calls.append(name)
            if name == self._refuse:
                return 999
            handler = getattr(type(self), "on_" + name, None)
            return handler(self, *args) if handler else 0

        return call

    def on_cuMemGetAllocationGranularity(self, size, prop, flags):
        prop = prop._obj
        assert (prop.type, prop.handle_types, prop.location.type, prop.location.id) == (1, 8, 1, 2)
        size._obj.value = 2 << 20
        return 0

    def on_cuMemCreate(self, allocation, size, prop, flags):
        assert size.value == 2 << 20
        allocation._obj.value = 7
        return 0

    def on_cuMemMap(self, address, size, offset, allocation, flags):
        address.value = 100 + allocation.value
        return 0

    def on_cuMemsetD32_v2(self, address, word, count):
        self._words[address.value] = word.value
        return 0

    def on_cuMemExportToShareableHandle(self, handle, allocation, kind, flags):
        handle[:4] = (self._words[100 + allocation.value] ^ self._wrong).to_bytes(4, "little")
        return 0

    def on_cuMemImportFromShareableHandle(self, allocation, handle, kind):
        allocation._obj.value = 8
        self._words[108] = int.from_bytes(bytes(handle[:4]), "little")
        return 0

    def on_cuMemcpyDtoH_v2(self, word, address, size):
        word._obj.value = self._words[address.value]
        return 0


def try_import(group, refusing, wrong):
    cuda = Cuda(refusing if group.rank == 1 else None, wrong and group.rank == 1)
    try:
        topology_fabric.check_import(group, Driver(cuda, device=2), "cpu")
    except ValueError as error:
        return str(error), cuda.calls
    return "", cuda.calls


def test_a_real_page_of_the_next_rank_is_imported(three_ranks):
    assert ctypes.sizeof(topology_fabric.AllocationProp) == 32
    assert ctypes.sizeof(topology_fabric.AccessDesc) == 12
    for problem, calls in three_ranks.run(try_import, None, False):
        assert problem == ""
        assert calls.count("cuMemImportFromShareableHandle") == 1
        assert calls.count("cuMemRelease") == calls.count("cuMemMap") == calls.count("cuMemUnmap") == 2


@pytest.mark.parametrize(
    ("refusing", "wrong", "message"),
    [
        ("cuMemGetAllocationGranularity", False, "rank 1: cuMemGetAllocationGranularity answered 999"),
        ("cuMemCreate", False, "rank 1: cuMemCreate answered 999"),
        (
            "cuMemImportFromShareableHandle",
            False,
            "rank 1: cuMemImportFromShareableHandle answered 999 for the memory of rank 2",
        ),
        (None, True, "rank 0: the memory of rank 1 holds 0x5eed0000 instead of 0x5eed0001"),
    ],
)
def test_all_ranks_refuse_if_one_cannot_import(three_ranks, refusing, wrong, message):
    for problem, _ in three_ranks.run(try_import, refusing, wrong):
        assert message in problem
        assert "one IMEX domain" in problem
