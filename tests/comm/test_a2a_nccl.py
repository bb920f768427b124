"""What the conformance suite does not ask of sending and receiving: the graph-safe variant, narrow types, options.

The graph-safe variant gives counts and places on the device; here they are looked at, as the experts' kernels do.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from exchanges import Exchange, as_dtype, assert_equal, build, run_exchange
from ranks import Ranks

from expertwire.comm import group as groups
from expertwire.comm.a2a_nccl import PaddedNcclAllToAll
from expertwire.comm.group import NcclOptions
from expertwire.kernels import registry


@pytest.fixture(scope="module", params=[1, 3])
def ranks(request):
    with Ranks(request.param) as ranks:
        yield ranks


@pytest.mark.parametrize(
    "case",
    [
        Exchange(form="bf16", top_k=3, ids="holes", redundant=5),
        Exchange(form="odd widths", top_k=1),
        Exchange(ids="none"),
        Exchange(ids="last", top_k=3),
        Exchange(tokens=(0, 32, 0, 1)),
        Exchange(tokens=None, max_tokens=6, num_experts=5, top_k=4),
    ],
    ids=str,
)
def test_the_padded_variant_conforms(ranks, case):
    ranks.run(run_exchange, "nccl over gloo, padded", case, 6)


def count_rows(group, case):
    all_to_all = build("nccl over gloo", case.spec(group))
    rows, physical = case.sent(group.rank, 0, group.size)
    x, ids = as_dtype(rows, torch.float32), torch.from_numpy(physical)
    arrived = all_to_all.dispatch_recv(all_to_all.dispatch_send(x, ids, case.tokens_of(0, group.size)))
    return len(arrived.x_UD), case.arriving(group.rank, 0, group.size)[3]


def test_a_row_goes_once_to_each_rank_that_needs_it(ranks):
    for came, needed in ranks.run(count_rows, Exchange(top_k=2, ids="holes")):
        assert came == needed


def count_on_device(group, case, steps):
    """A batch is larger than what counts of it; its last rows ask for experts too."""
    all_to_all = build("nccl over gloo, padded", case.spec(group))
    for step in range(steps):
        rows, physical = case.sent(group.rank, step, group.size)
        expected, experts, offsets, _ = case.arriving(group.rank, step, group.size)
        x = torch.cat([as_dtype(rows, torch.float32), torch.full((2, 24), 7.0)])
        ids = torch.cat([torch.from_numpy(physical), torch.zeros(2, case.top_k, dtype=torch.int64)])
        sizes = [num + 2 for num in case.tokens_of(step, group.size)]
        handle = all_to_all.dispatch_send(x, ids, sizes, torch.tensor([len(rows)], dtype=torch.int32))
        arrived = all_to_all.dispatch_recv(handle)
        assert arrived.expert_offsets.tolist() == offsets.tolist()
        here = slice(0, offsets[-1])
        found = arrived.x_UD[arrived.row_index_R[here].long()].view(torch.uint8).numpy()
        assert_equal(found, expected, f"step {step}")
        y = torch.full((len(arrived.row_index_R), 24), float("nan"))
        y[arrived.home_R[here].long()] = as_dtype(case.expert_rows(found, experts), torch.float32)
        home = all_to_all.combine_recv(all_to_all.combine_send(handle, y))
        assert_equal(
            home[: len(rows)].view(torch.uint8).numpy(), case.coming_home(group.rank, step, group.size), f"{step}"
        )
        assert not home[len(rows) :].any(), "rows beyond the count come home"


def test_tokens_counted_on_the_device(ranks):
    ranks.run(count_on_device, Exchange(top_k=3, ids="holes"), 4)


def send_fp8(group, backend):
    """Gloo refuses float8; bytes travel."""
    case = Exchange(form="odd widths")
    spec = case.spec(group)
    narrow = {"dtype": torch.float8_e4m3fn, "home_dtype": torch.float8_e4m3fn, "home_size": 13}
    all_to_all = build(backend, type(spec)(**{**vars(spec), **narrow}))
    rows, physical = case.sent(group.rank, 0, group.size)
    x = torch.from_numpy(rows).view(torch.float8_e4m3fn)
    handle = all_to_all.dispatch_send(x, torch.from_numpy(physical), case.tokens_of(0, group.size))
    arrived = all_to_all.dispatch_recv(handle)
    expected, *_, offsets, _ = case.arriving(group.rank, 0, group.size)
    found = arrived.x_UD[arrived.row_index_R[: offsets[-1]].long()]
    assert_equal(found.view(torch.uint8).numpy(), expected, "what arrived")
    y = found
    if arrived.home_R is not None:
        y = torch.zeros(len(arrived.row_index_R), 13, dtype=torch.uint8).view(torch.float8_e4m3fn)
        y[arrived.home_R[: offsets[-1]].long()] = found
    home = all_to_all.combine_recv(all_to_all.combine_send(handle, y))
    wanted = torch.from_numpy(rows)[:, None].expand(-1, case.top_k, -1)
    assert torch.equal(home.view(torch.uint8), wanted)


@pytest.mark.parametrize("backend", ["nccl over gloo", "nccl over gloo, padded"])
def test_float8_travels(ranks, backend):
    ranks.run(send_fp8, backend)


@pytest.mark.parametrize("backend", ["nccl over gloo", "nccl over gloo, padded"])
def test_a_rank_with_other_tokens_than_planned_is_an_error(backend):
    case = Exchange(tokens=(3,), max_tokens=9)
    all_to_all = build(backend, case.spec(groups.SoloGroup()))
    rows, physical = case.sent(0, 0, 1)
    x, ids = as_dtype(rows, torch.float32), torch.from_numpy(physical)
    with pytest.raises(AssertionError, match=r"rank 0 has 3 tokens, plan \[2\]"):
        all_to_all.dispatch_send(x, ids, [2])
    with pytest.raises(AssertionError, match="12 tokens, built for 9"):
        all_to_all.dispatch_send(torch.cat([x] * 4), torch.cat([ids] * 4), [12])


# ---- a communicator's options


def test_options_reach_the_configuration():
    library = SimpleNamespace(NCCL_CTA_POLICY_ZERO=2)
    config = SimpleNamespace()
    groups.configure(config, NcclOptions(min_ctas=4, max_ctas=16, zero_ctas=True), library)
    assert vars(config) == {"min_ctas": 4, "max_ctas": 16, "cta_policy": 2}
    config = SimpleNamespace()
    groups.configure(config, NcclOptions(), library)
    assert vars(config) == {}, "what is not asked for is left to NCCL"


def test_options_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"min_ctas must be in \[1, 64\], got 0"):
        NcclOptions(min_ctas=0)
    with pytest.raises(ValueError, match="min_ctas must be at most max_ctas = 4, got 8"):
        NcclOptions(min_ctas=8, max_ctas=4)
    with pytest.raises(ValueError, match=r"zero_ctas needs a torch .* NCCL 2.28 or later; allowed here is False"):
        groups.configure(SimpleNamespace(), NcclOptions(zero_ctas=True), SimpleNamespace())


# ---- a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
def test_one_gpu_replays_the_padded_variant_from_a_graph(tmp_path):
    """A communicator of one rank with options; what is replayed follows the inputs."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    where = {"store": store, "rank": 0, "size": 1, "device": "cuda", "local_ip": "127.0.0.1", "timeout_s": 60.0}
    group = groups.TorchGroup(**where, nccl=NcclOptions(max_ctas=8))
    case = Exchange(tokens=(5,), max_tokens=8, top_k=3, form="bf16", ids="holes")
    all_to_all = PaddedNcclAllToAll(case.spec(group), registry.choose("cuda").permute, "cuda")
    sent = [case.sent(0, step, 1) for step in range(2)]
    x_TD, ids_TK = as_dtype(sent[0][0], torch.bfloat16).cuda(), torch.from_numpy(sent[0][1]).cuda()

    def echo():
        handle = all_to_all.dispatch_send(x_TD, ids_TK, [5])
        arrived = all_to_all.dispatch_recv(handle)
        y = torch.zeros(len(arrived.row_index_R) + 1, x_TD.shape[1], dtype=torch.bfloat16, device="cuda")
        y[arrived.home_R.long()] = arrived.x_UD[arrived.row_index_R.long()]  # -1 is the row too many
        return all_to_all.combine_recv(all_to_all.combine_send(handle, y[:-1]))

    echo()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        home = echo()
    for rows, ids in sent:
        x_TD.copy_(as_dtype(rows, torch.bfloat16))
        ids_TK.copy_(torch.from_numpy(ids))
        graph.replay()
        assert torch.equal(home, torch.where((ids_TK >= 0)[..., None], x_TD[:, None], 0))
    group.close()
