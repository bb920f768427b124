"""An engine of 72 ranks on the 18 nodes of an NVLink rack, by Ray: from the tables of a cluster to the first tokens.

The launcher's placement, the worker's choice of a device, the topology, the choice of the all-to-all, its memory and the
controller are the engine's; Ray, the GPUs and what the ranks compute are simulated, every rank a thread.
"""

import secrets
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers.fake_cuda import FakeCuda, OnCpu
from helpers.fake_symmetric_memory import FakeSymmetricMemory

from expertwire.bench.scheduler.simulation import EOS, SimulatedRanks
from expertwire.comm import symmetric_memory
from expertwire.comm.control.channel import ChannelClosed, ControlHub, ControlLink
from expertwire.comm.group import TorchGroup
from expertwire.comm.topology import fabric
from expertwire.comm.topology import probe as topology_probe
from expertwire.comm.topology.backend_choice import BackendConditions, choose
from expertwire.deploy.ray.placement import Node, in_order, layouts, ordinal
from expertwire.engine import worker
from expertwire.engine.config.engine_config import EngineConfig
from expertwire.engine.rank_loop import Launched, serve
from expertwire.engine.startup import ControllerArgs, scheduler_config, start_ranks
from expertwire.scheduler.config import CacheSpec
from expertwire.scheduler.plan import StepResult
from expertwire.scheduler.request import Request
from expertwire.scheduler.sampling_params import SamplingParams
from expertwire.scheduler.scheduler import Scheduler

RANKS, GPUS, NBYTES = 72, 4, 4096
SPEC = CacheSpec(name="full", kind="full", bytes_per_token=64, writers=(0,), readers=(0,))
MODEL = SimpleNamespace(
    architecture="A", dtype="bfloat16", kv_cache_dtype="auto", vocab_size=32000,
    eos_token_ids=(EOS,), num_labels=0, num_layers=1, num_experts=256, top_k=8, original_max_position_embeddings=None,
    cache_specs=lambda: (SPEC,),
)  # fmt: skip


def cluster():
    """Two racks, of which one is a node short, and a head without GPUs; Ray lists nodes in no order."""
    entries = [{"NodeID": "head", "Resources": {"CPU": 8.0}, "Labels": {"ray.io/node-id": "head"}}]
    for number in range(35):
        labels = {"ray.io/node-id": f"n{number:02}", "ray.io/gpu-domain": "rack-B" if number % 2 else "rack-A"}
        entries.append({"NodeID": f"n{number:02}", "Resources": {"CPU": 144.0, "GPU": 4.0}, "Labels": labels})
    order = np.random.default_rng(0).permutation(len(entries))
    return [Node.of(entries[i]) for i in order]


def ray_places(nodes):
    """The node and device of every rank: as Ray reserves bundles, assigns GPUs, and the launcher puts them in order."""
    [layout] = layouts(nodes, RANKS)
    assert layout.domains == ("rack-A",)
    room = [
        node.node_id for node in nodes for _ in range(node.num_gpus) if {node.label: node.domain} == layout.selectors[0]
    ]
    bundles = dict(enumerate(np.random.default_rng(1).permutation(room[:RANKS]).tolist()))
    free = {node.node_id: [2, 0, 3, 1] for node in nodes}
    return [
        (bundles[bundle], ordinal([free[bundles[bundle]].pop()], None)) for bundle in in_order(bundles, nodes, "head")
    ]


def choice_of(places, rack_of):
    """The number of NVLink domains that ranks at these places find, and the name of the all-to-all that they choose."""
    reports = [
        topology_probe.RankReport(
            node=node,
            gpu=f"{node} {gpu}",
            peers=tuple(f"{node} {i}" for i in range(GPUS)),
            cluster=rack_of[node].encode().hex().rjust(32, "0"),
            fabric_state="completed",
        )
        for node, gpu in places
    ]
    topology = topology_probe.assemble(reports)
    conditions = BackendConditions(topology=topology, device="cuda", step_rows=1 << 20, row_bytes=1 << 14)
    return topology.num_domains, choose("auto", conditions).name


def test_labels_keep_ranks_in_the_rack_that_packing_alone_would_leave():
    """Ray's PACK fills one node after the other, of whatever rack: with two racks of two nodes, Ray 2.60 mixed them in 3 of 8
    placements."""
    nodes = cluster()
    rack_of = {node.node_id: node.domain for node in nodes}
    packed = [(node.node_id, gpu) for node in nodes for gpu in range(node.num_gpus)][:RANKS]
    assert choice_of(packed, rack_of) == (2, "nccl")
    assert choice_of(ray_places(nodes), rack_of) == (1, "nvlink")


class StoreGroup(TorchGroup):
    """A group that exchanges through the store: 72 ranks of gloo would be 5,000 connections of one process."""

    def __init__(self, store, rank):
        super().__init__(
            store=dist.PrefixStore(f"alone {rank}", store),
            rank=0,
            size=1,
            device="cpu",
            local_ip="127.0.0.1",
            timeout_s=60,
        )
        self.store, self.rank, self.size, self._exchanges = store, rank, RANKS, 0

    def exchange(self, out, rows, out_counts, counts):
        self._exchanges += 1
        for peer, row in enumerate(rows.split(list(counts))):
            self.store.set(f"{self._exchanges}/{self.rank}/{peer}", row.numpy().tobytes())
        said = [self.store.get(f"{self._exchanges}/{peer}/{self.rank}") for peer in range(self.size)]
        out.copy_(torch.frombuffer(bytearray(b"".join(said)), dtype=out.dtype).view(out.shape))
        return SimpleNamespace(wait=lambda: None)

    def all_gather(self, out, rows):
        ones = [1] * self.size
        return self.exchange(out, rows.expand(self.size, -1), ones, ones)

    def barrier(self):
        self.exchange(torch.zeros(self.size), torch.zeros(self.size), [1] * self.size, [1] * self.size)


class SharedRanks:
    """A step's results, computed once; `ranks`: by whom."""

    ranks: SimulatedRanks

    def __init__(self):
        self._lock, self._step, self._results = threading.Lock(), None, []

    def of(self, plan, rank) -> StepResult:
        with self._lock:
            if plan.step != self._step:
                self._step, self._results = plan.step, self.ranks.run(plan)[0]
            return self._results[rank]


class Rank:
    """The life of a rank; `depth` and `launch` are the runner's."""

    depth = 1

    def __init__(self, rank, place, config, memory, store, shared):
        self.rank, (self.node, self.gpu), self.config = rank, place, config
        self._memory, self._store, self._shared = memory, store, shared

    def run(self, address, token):
        link = ControlLink(address, token, rank=self.rank, node=self.node, hello={})
        try:
            with OnCpu():
                self._start(link)
            serve(link, self)
        except ChannelClosed:
            pass
        finally:
            link.close()

    def _start(self, link):
        link.recv()
        device = worker.choose_device(self.config, self.gpu)
        link.send({"node": text(self.node), "store": text("")})
        link.recv()
        self._memory.enter(self.node)
        group = StoreGroup(self._store, self.rank)
        report = topology_probe.RankReport(
            node=self.node,
            gpu=f"{self.node} {device}",
            peers=tuple(f"{self.node} cuda:{i}" for i in range(GPUS)),
            cluster="5f" * 16,
            fabric_state="completed",
        )
        reports = topology_probe.gather_reports(group, report, "cpu")
        fabric.check_fabric(reports)
        found = topology_probe.assemble(reports)
        choice = choose("auto", BackendConditions(topology=found, device="cuda", step_rows=1 << 20, row_bytes=1 << 14))
        self.domain, self.nodes = found.num_domains, [location.node for location in found.locations]
        memories = symmetric_memory.symmetric(group, NBYTES, torch.device(device))
        for memory in memories:
            memory[self.rank] = 1
        group.barrier()
        self.arrived = int(memories[self.rank].sum())
        empty = np.zeros(0, np.int64)
        link.send({"device": text("cuda"), "all_to_all": text(str(choice)), "place": empty})
        link.recv()
        link.send({"cache_bytes": np.array([1 << 20])})
        link.recv()
        link.send({})

    def launch(self, plan):
        return Launched(lambda: self._shared.of(plan, self.rank))


def text(words):
    return np.frombuffer(words.encode(), np.uint8)


@pytest.fixture
def memory(monkeypatch):
    FakeCuda(GPUS).install(monkeypatch)
    memory = FakeSymmetricMemory(timeout_s=60)
    monkeypatch.setattr(symmetric_memory, "_SymmetricMemory", memory)
    return memory


@pytest.mark.slow
def test_72_ranks_of_a_rack_reach_their_first_tokens(memory):
    places = ray_places(cluster())
    assert len(set(places)) == RANKS, "two ranks on one GPU"
    config = EngineConfig(model="m", device="cuda", ep_size=RANKS, max_num_seqs=2, enable_prefix_caching=False)
    token = secrets.token_hex(8)
    hub = ControlHub(RANKS, token=token)
    args = ControllerArgs(config=config, model=MODEL, max_model_len=64, hub_address="", token=token)
    store, shared = dist.HashStore(), SharedRanks()
    ranks = [Rank(rank, place, config, memory, store, shared) for rank, place in enumerate(places)]
    with ThreadPoolExecutor(RANKS) as pool:
        running = [pool.submit(rank.run, hub.address, token) for rank in ranks]
        try:
            info, _ = start_ranks(args, hub)
            shared.ranks = SimulatedRanks(scheduler_config(args, info))
            tokens = first_tokens(args, info, hub)
        finally:
            hub.close()
        for done in running:
            done.result(60)
    assert info.all_to_all == "nvlink: all 72 ranks are in one NVLink domain and reach each other's memory"
    assert {rank.domain for rank in ranks} == {1}
    in_turn = list(dict.fromkeys(ranks[0].nodes))
    assert ranks[0].nodes == [node for node in in_turn for _ in range(GPUS)], "neighbours share a node"
    assert len(in_turn) == 18
    assert [rank.arrived for rank in ranks] == [RANKS] * RANKS
    assert sorted(tokens) == list(range(RANKS))


def first_tokens(args, info, hub):
    scheduler = Scheduler(scheduler_config(args, info), MODEL.cache_specs())
    for key in range(RANKS):
        request = Request(
            key=key, prompt=np.arange(1, 9, dtype=np.int32), params=SamplingParams(max_tokens=2), seed=key
        )
        assert scheduler.submit(request, 0.0) is None
    tokens = {}
    while len(tokens) < RANKS:
        plan = scheduler.plan(0.0)
        hub.publish(plan.to_arrays())
        outputs = scheduler.commit(plan, [StepResult.from_arrays(answer) for answer in hub.collect(60)], 0.0)
        for key, value in zip(outputs.key_O.tolist(), outputs.token_O.tolist(), strict=True):
            tokens.setdefault(key, value)
    return tokens
