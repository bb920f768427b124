"""The exchange over NCCL beyond the conformance suite: float8, options, NCCL's contracts."""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from helpers.exchanges import Exchange, as_dtype, assert_equal, build, run_exchange
from helpers.fake_cuda import FakeCuda, OnCpu
from helpers.fake_nccl import FakeProcessGroupNCCL
from helpers.ranks import Ranks
from torch.overrides import TorchFunctionMode

from expertwire.comm import group as groups
from expertwire.comm.all_to_all import backends
from expertwire.comm.group import NcclOptions
from expertwire.comm.topology import probe as topology_probe
from expertwire.kernels import registry


@pytest.fixture(scope="module", params=[1, 3])
def ranks(request):
    with Ranks(request.param) as ranks:
        yield ranks


def count_rows(group, case):
    all_to_all = build("nccl over gloo", case.spec(group))
    rows, physical = case.sent(group.rank, 0, group.size)
    x, ids = as_dtype(rows, torch.float32), torch.from_numpy(physical)
    arrived = all_to_all.dispatch_recv(all_to_all.dispatch_send(x, ids, case.tokens_of(0, group.size)))
    return len(arrived.x_UD), case.dispatched(group.rank, 0, group.size)[3]


def test_a_row_goes_once_to_each_rank_that_needs_it(ranks):
    for came, needed in ranks.run(count_rows, Exchange(top_k=2, ids="holes")):
        assert came == needed


def send_fp8(group):
    """Send float8, which gloo refuses, as bytes."""
    case = Exchange(form="odd widths")
    spec = case.spec(group)
    narrow = {"dtype": torch.float8_e4m3fn, "combine_dtype": torch.float8_e4m3fn, "combine_size": 13}
    all_to_all = build("nccl over gloo", type(spec)(**{**vars(spec), **narrow}))
    rows, physical = case.sent(group.rank, 0, group.size)
    x = torch.from_numpy(rows).view(torch.float8_e4m3fn)
    handle = all_to_all.dispatch_send(x, torch.from_numpy(physical), case.tokens_of(0, group.size))
    arrived = all_to_all.dispatch_recv(handle)
    expected, *_, offsets, _ = case.dispatched(group.rank, 0, group.size)
    found = arrived.x_UD[arrived.row_index_R[: offsets[-1]].long()]
    assert_equal(found.view(torch.uint8).numpy(), expected, "dispatched rows")
    y = found
    if arrived.home_R is not None:
        y = torch.zeros(len(arrived.row_index_R), 13, dtype=torch.uint8).view(torch.float8_e4m3fn)
        y[arrived.home_R[: offsets[-1]].long()] = found
    home = all_to_all.combine_recv(all_to_all.combine_send(handle, y))
    wanted = torch.from_numpy(rows)[:, None].expand(-1, case.top_k, -1)
    assert torch.equal(home.view(torch.uint8), wanted)


def test_float8_is_sent(ranks):
    ranks.run(send_fp8)


def test_a_rank_with_other_tokens_than_planned_is_an_error():
    case = Exchange(tokens=(3,), max_tokens=9)
    all_to_all = build("nccl over gloo", case.spec(groups.SoloGroup()))
    rows, physical = case.sent(0, 0, 1)
    x, ids = as_dtype(rows, torch.float32), torch.from_numpy(physical)
    with pytest.raises(AssertionError, match=r"rank 0 has 3 tokens, plan \[2\]"):
        all_to_all.dispatch_send(x, ids, [2])
    with pytest.raises(AssertionError, match="12 tokens, built for 9"):
        all_to_all.dispatch_send(torch.cat([x] * 4), torch.cat([ids] * 4), [12])


# ---- over a strict fake of NCCL


@pytest.fixture
def nccl(monkeypatch):
    """Yield ranks that are threads, each with a fake GPU."""
    monkeypatch.setattr(dist, "ProcessGroupNCCL", FakeProcessGroupNCCL, raising=False)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    monkeypatch.setattr(topology_probe, "peers_of", lambda mine: [])
    FakeCuda(3).install(monkeypatch)


def on_gpus(function, *args):
    """Return the results of `function(group, *args)` on three ranks."""
    store = dist.HashStore()

    def run(rank):
        torch.cuda.set_device(rank)
        with OnCpu():
            group = groups.TorchGroup(store=store, rank=rank, size=3, device="cuda", local_ip="127.0.0.1", timeout_s=20)
            answer = function(group, *args)
            group.barrier()
            group.close()
        return answer

    with ThreadPoolExecutor(3) as pool:
        return list(pool.map(run, range(3)))


def swap_with(group, counts_PP):
    counts_P, receive_P = counts_PP[group.rank], [counts_P[group.rank] for counts_P in counts_PP]
    out = torch.full((sum(receive_P), 2), -1.0)
    group.exchange(out, torch.full((sum(counts_P), 2), float(group.rank)), receive_P, counts_P).wait()
    return [rows[:, 0].tolist() for rows in out.split(receive_P)]


@pytest.mark.parametrize(
    "counts_PP",
    [[[2, 0, 0], [0, 0, 0], [0, 0, 3]], [[0, 1, 0], [2, 0, 0], [0, 0, 0]], [[1, 2, 3], [4, 5, 6], [7, 8, 9]]],
    ids=["nothing travels", "one rank has no part", "all"],
)
def test_rows_sent_between_gpus_arrive(nccl, counts_PP):
    """Every rank takes part, also one that neither sends nor receives."""
    for rank, received in enumerate(on_gpus(swap_with, counts_PP)):
        assert received == [[float(peer)] * counts_PP[peer][rank] for peer in range(3)]


@pytest.mark.parametrize("tokens", [(5, 3, 7), (0, 1, 0), (0, 0, 0), (1, 32, 0)])
def test_exchanges_between_gpus(nccl, tokens):
    on_gpus(run_exchange, "nccl over gloo", Exchange(tokens=tokens, ids="holes"), 2)


def test_ranks_are_connected_before_memory_is_measured_and_only_for_rows(nccl):
    """The communicator of all ranks gathers texts without; one that exchanges rows has connections of its own."""

    def run(group):
        before = groups.all_gather_text(group, f"rank {group.rank}"), set(group._group.connected)
        nccl, _ = backends.build("nccl", Exchange().spec(group), registry.plain(), "node", f"cuda:{group.rank}")
        exchanging = nccl[0]._group._group
        return before, set(group._group.connected), exchanging.connected, vars(exchanging.options.config)

    for before, after, exchanging, options in on_gpus(run):
        assert before == (["rank 0", "rank 1", "rank 2"], set())
        assert (after, exchanging, options) == (set(), {0, 1, 2}, {})


def test_a_layer_takes_three_calls(nccl):
    """Ids, rows, and rows that return, whatever the number of ranks: calls for each rank would be the host's work."""

    def count(group):
        before = group._group.num_calls
        run_exchange(group, "nccl over gloo", Exchange(tokens=(5, 3, 7), top_k=2), 1)
        return group._group.num_calls - before

    assert on_gpus(count) == [3, 3, 3]


# What the host learns a number of the device by, on a GPU.
ASKING = (torch.Tensor.cpu, torch.Tensor.nonzero, torch.nonzero, torch.bincount, torch.Tensor.item, torch.unique)


class Counting(TorchFunctionMode):
    def __init__(self):
        self.asked = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.asked += function in ASKING
        return function(*args, **kwargs or {})


def test_the_host_waits_for_the_device_once_a_layer(nccl):
    def count(group):
        case = Exchange(tokens=(5, 3, 7), top_k=2)
        all_to_all = build("nccl over gloo", case.spec(group))
        rows, physical = case.sent(group.rank, 0, 3)
        x, ids = as_dtype(rows, torch.float32), torch.from_numpy(physical)
        with Counting() as counting:
            handle = all_to_all.dispatch_send(x, ids, case.tokens_of(0, 3))
            arrived = all_to_all.dispatch_recv(handle)
            all_to_all.combine_recv(all_to_all.combine_send(handle, arrived.x_UD[arrived.row_index_R]))
        return counting.asked

    assert on_gpus(count) == [1, 1, 1]


# ---- a communicator's options


def test_options_reach_the_configuration():
    config = SimpleNamespace()
    groups.configure(config, NcclOptions(min_ctas=4, max_ctas=16))
    assert vars(config) == {"min_ctas": 4, "max_ctas": 16}
    config = SimpleNamespace()
    groups.configure(config, NcclOptions())
    assert vars(config) == {}, "what is not asked for is left to NCCL"


def test_invalid_options_are_refused():
    with pytest.raises(ValueError, match=r"min_ctas must be in \[1, 64\], got 0"):
        NcclOptions(min_ctas=0)
    with pytest.raises(ValueError, match="min_ctas must be at most max_ctas = 4, got 8"):
        NcclOptions(min_ctas=8, max_ctas=4)
