"""The kernels of dispatch and combine, interpreted: simulated ranks in one process, and real ones over shared memory."""

import dataclasses
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from helpers.exchanges import Exchange, as_dtype, take_part, take_part_together
from helpers.ranks import Ranks
from triton.runtime.interpreter import InterpretedFunction

from expertwire.comm import symmetric_memory
from expertwire.comm.all_to_all.base import RankStalled
from expertwire.comm.all_to_all.fp8 import packed
from expertwire.comm.all_to_all.nvlink_gpu import NvlinkGpuAllToAll
from expertwire.comm.all_to_all.symmetric_buffer import BufferLayout
from expertwire.kernels import formats
from expertwire.kernels.gpu import dispatch_combine, dispatch_low_latency
from expertwire.kernels.gpu import experts as gpu_experts
from expertwire.kernels.gpu.device import H200
from expertwire.kernels.ops import experts, quantize
from expertwire.kernels.ops.experts import GroupedMlpWeights


@dataclass
class Member:
    rank: int
    size: int


def make(case, size, few_ids):
    """Return ranks over slices of one tensor."""
    return make_over(room(case, size), case, few_ids)


def room(case, size):
    return symmetric_memory.slices(size, BufferLayout.of(case.spec(Member(0, size))).nbytes)


def make_over(memories, case, few_ids, few_arrived_ids=None):
    """Return ranks over these memories; receiving uses the same path as sending unless given."""
    specs = [case.spec(Member(rank, len(memories))) for rank in range(len(memories))]
    few = {"few_ids": few_ids, "few_arrived_ids": few_ids if few_arrived_ids is None else few_arrived_ids}
    return [NvlinkGpuAllToAll(spec, memories, num_programs=3, **few) for spec in specs]


# Everybody takes the way for many tokens, or everybody that for few.
either_way = pytest.mark.parametrize("few_ids", [-1, 10**6], ids=["many", "few"])


CASES = {
    "fp32": (3, Exchange(tokens=(5, 0, 3), max_tokens=6, num_experts=7, top_k=3, ids="holes")),
    "fp8 and scales": (2, Exchange(tokens=(3, 4), max_tokens=5, form="fp8 and scales, wide", redundant=4)),
    "all to one expert": (3, Exchange(tokens=(2, 3, 1), max_tokens=3, num_experts=6, ids="last", top_k=1, form="bf16")),
    "no token has an expert": (2, Exchange(tokens=(2, 2), max_tokens=2, num_experts=4, ids="none")),
    "22 experts a token": (2, Exchange(tokens=(1, 2), max_tokens=2, num_experts=24, top_k=22)),
    "8 ranks": (8, Exchange(tokens=(1, 0, 2, 1, 0, 0, 1, 1), max_tokens=2, num_experts=9)),
}


@either_way
@pytest.mark.parametrize("name", CASES)
def test_every_byte_arrives_where_it_should(name, few_ids):
    size, case = CASES[name]
    take_part_together(make(case, size, few_ids), case, 0)


def exact_rows(tokens, width, generator):
    """Return rows that fp8 and a scale a group hold exactly: the interpreter does not round to fp8 as a GPU does."""
    numbers = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    x = numbers[torch.randint(126, (tokens, width // 128, 128), generator=generator)]
    x[..., 5] = quantize.LARGEST
    x *= 1 - 2 * torch.randint(2, x.shape, generator=generator)
    return (x * 2.0 ** torch.randint(-9, 9, x.shape[:2], generator=generator)[..., None]).flatten(1)


@either_way
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_quantising_in_the_dispatch_equals_quantising_before(few_ids, dtype):
    """Compare all ranks' memory, byte by byte, with that of rows which were packed first."""
    case = Exchange(tokens=(3, 4), max_tokens=5, top_k=3, num_experts=5, ids="holes", form="fp8 and scales, wide")
    generator = torch.Generator().manual_seed(3)
    x = [exact_rows(num, 256, generator).to(dtype) for num in case.tokens]
    buffers = []
    for given in (x, [quantize.pack(quantize.reference(rows)) for rows in x]):
        memories = room(case, 2)
        for rank, all_to_all in enumerate(make_over(memories, case, few_ids)):
            all_to_all.dispatch_send(given[rank], torch.from_numpy(case.sent(rank, 0, 2)[1]), case.tokens)
        buffers.append(torch.stack(memories))
    differences = (buffers[0] != buffers[1]).nonzero()
    assert not len(differences), f"byte {differences[0].tolist()} of {len(differences)}"
    assert buffers[0].count_nonzero() > 6 * 256


IDS = torch.tensor([[0, 1, 5], [3, -1, 2], [-1, -1, -1], [4, 0, 3]])
RANK_OFFSETS = torch.tensor([0, 2, 4, 6], dtype=torch.int32)
# Rank * 10 + place at the first expert of a rank, -1 at its others.
TARGETS = [[0, -1, 20], [10, -1, -1], [-1, -1, -1], [21, 1, 11]]


def test_one_copy_of_a_row_for_every_rank_that_needs_it():
    target, counts = torch.full((4, 3), -1, dtype=torch.int32), torch.zeros(3, dtype=torch.int64)
    dispatch_combine.dispatch_plan_kernel[(3,)](
        IDS, RANK_OFFSETS, target, counts, counts, 4, 10, K=3, K_BLOCK=4, TOKENS=16, LIMITED=False
    )
    assert counts.tolist() == [2, 2, 2]
    assert target.tolist() == TARGETS


@triton.jit
def low_latency_targets_kernel(ids_ptr, rank_offsets_ptr, target_ptr):
    t, k_of, token = tl.program_id(0), tl.arange(0, 4), tl.arange(0, 4)[:, None]
    ids = tl.load(ids_ptr + token * 3 + k_of[None, :], mask=k_of[None, :] < 3, other=-1).to(tl.int32)
    own = tl.load(ids_ptr + t * 3 + k_of, mask=k_of < 3, other=-1).to(tl.int32)
    for k in range(3):
        row = dispatch_low_latency.row_of(ids, own, token, rank_offsets_ptr, t, k, k_of, 0, 10, 3, 4, 4)
        tl.store(target_ptr + t * 3 + k, row)


def test_one_copy_in_low_latency_dispatch():
    target = torch.zeros(4, 3, dtype=torch.int32)
    low_latency_targets_kernel[(4,)](IDS, RANK_OFFSETS, target)
    assert target.tolist() == TARGETS


def test_step_after_step():
    """Use other numbers of tokens in each step; each decides between the two paths."""
    case = Exchange(tokens=None, max_tokens=4, top_k=2, num_experts=4, ids="holes")
    ranks = make(case, 2, 5)
    for step in range(6):
        take_part_together(ranks, case, step)


def test_ranks_may_use_different_paths():
    """Mix both paths of sending and receiving: the contents of the symmetric buffers are the same."""
    case = Exchange(tokens=(5, 0, 3), max_tokens=6, num_experts=7, top_k=3, ids="holes")
    for arrives in (-1, 10**6):
        memories = room(case, 3)
        ranks = make_over(memories, case, 10**6, arrives)
        ranks[1:] = make_over(memories, case, -1, arrives)[1:]
        for step in range(2):
            take_part_together(ranks, case, step)


@pytest.mark.parametrize(
    ("own", "peers", "way"),
    [(0, 4, "dispatch_index_kernel"), (4, 0, "dispatch_index_kernel"), (1, 1, "low_latency_receive_kernel")],
)
def test_the_receive_path_follows_all_ranks_tokens(monkeypatch, own, peers, way):
    """An idle rank finds its rows among all that its peers have sent."""
    case = Exchange(tokens=(own, peers, peers), max_tokens=6, num_experts=6)
    launched, run = [], InterpretedFunction.run
    monkeypatch.setattr(
        InterpretedFunction, "run", lambda kernel, *a, **k: launched.append(kernel.fn.__name__) or run(kernel, *a, **k)
    )
    for rank in make_over(room(case, 3), case, 10**6, 3 * 3 * case.top_k):
        rows, ids = case.sent(rank._spec.group.rank, 0, 3)
        x = as_dtype(rows, torch.float32)
        handle = rank.dispatch_send(x, torch.from_numpy(ids), case.tokens)
        launched.clear()
        rank.dispatch_recv(handle)
        assert way in launched


@either_way
def test_padding_is_not_sent(few_ids):
    """Use a CUDA graph's padding, which always has as many rows."""
    case = Exchange(tokens=(3, 0), max_tokens=6, num_experts=4)
    take_part_together(make(case, 2, few_ids), case, 0, padded_to=5)


@either_way
def test_all_ranks_name_a_stalled_rank(few_ids):
    case = Exchange(tokens=(2, 2, 2), num_experts=6)
    ranks = make(case, 3, few_ids)
    take_part_together(ranks, case, 0)
    rows, ids = case.sent(0, 1, 3)
    x = torch.from_numpy(rows.ravel()).view(torch.float32).view(2, -1)
    handles = [rank.dispatch_send(x, torch.from_numpy(ids), [2, 2, 2]) for rank in ranks[:2]]
    ranks[0].dispatch_recv(handles[0])
    for rank in ranks:
        with pytest.raises(RankStalled, match=r"rank 2 has stalled.*dispatch"):
            rank.check()


@either_way
def test_after_a_stall_row_counts_stay_within_bounds(few_ids):
    """The stalled rank sent many rows in the step before, when the plan had room for them."""
    case = Exchange(tokens=(24, 24, 24), num_experts=6)
    ranks = make(case, 3, few_ids)
    take_part_together(ranks, case, 0)
    x, ids = torch.zeros(1, 24), torch.tensor([[0, 2]])
    handles = [rank.dispatch_send(x, ids, [1, 1, 1]) for rank in ranks[:2]]
    for rank, handle in zip(ranks, handles, strict=False):
        arrived = rank.dispatch_recv(handle)
        assert int(arrived.expert_offsets[-1]) <= len(arrived.row_index_R)


def run(group, case, steps):
    spec = case.spec(group)
    memories = symmetric_memory.shared(group, BufferLayout.of(spec).nbytes)
    all_to_all = NvlinkGpuAllToAll(spec, memories, num_programs=2, max_turns=10**9)
    for step in range(steps):
        take_part(all_to_all, case, group.rank, group.size, step, lambda: None)
    all_to_all.check()


def test_ranks_in_processes():
    with Ranks(2) as ranks:
        ranks.run(run, Exchange(tokens=None, max_tokens=4, num_experts=4, ids="holes", form="bf16"), 8)


@pytest.mark.filterwarnings("ignore:overflow")  # scales of padding are undefined
@either_way
def test_experts_give_the_same_bits_for_every_dispatch_dtype(few_ids):
    """Send numbers that the experts quantise, or rows quantised in the dispatch."""
    D, tokens, generator = 256, [3, 2], torch.Generator().manual_seed(2)
    case = Exchange(max_tokens=4, num_experts=4, top_k=2)
    plain = [dataclasses.replace(case.spec(Member(rank, 2)), hidden_size=D, dtype=torch.bfloat16) for rank in range(2)]
    w13 = formats.quantize("fp8_block", torch.randn(4, 2 * D, D, generator=generator) / 16, (D, D))
    w2 = formats.quantize("fp8_block", torch.randn(4, D, D, generator=generator) / 16)
    x = [exact_rows(num, D, generator).bfloat16() for num in tokens]
    ids = [torch.rand(num, 4, generator=generator).argsort(dim=1)[:, :2].contiguous() for num in tokens]
    came_home = []
    for specs in (plain, [packed(spec) for spec in plain]):
        memories = symmetric_memory.slices(2, BufferLayout.of(specs[0]).nbytes)
        few = {"few_ids": few_ids, "few_arrived_ids": few_ids}
        ranks = [NvlinkGpuAllToAll(spec, memories, num_programs=2, **few) for spec in specs]
        handles = [rank.dispatch_send(*sent, tokens) for rank, *sent in zip(ranks, x, ids, strict=True)]
        for i, rank in enumerate(ranks):
            here = GroupedMlpWeights(w13.experts(2 * i, 2 * i + 2), w2.experts(2 * i, 2 * i + 2))
            apply = gpu_experts.prepare(here, device=H200)
            arrived = rank.dispatch_recv(handles[i])
            rows = arrived.row_index_R, arrived.expert_offsets, arrived.home_R
            rank.combine_send(handles[i], apply(arrived.x_UD, *rows))
        came_home.append([rank.combine_recv(handle) for rank, handle in zip(ranks, handles, strict=True)])
    for once, again in zip(*came_home, strict=True):
        assert once.count_nonzero() == once.numel()
        assert torch.equal(once, again)


def test_experts_read_rows_in_the_symmetric_buffer():
    """Run from dispatch to combine over two ranks, as a layer does; memory after the last row is never read."""
    D, F, experts_here = 32, 16, 2
    generator = torch.Generator().manual_seed(1)
    case = Exchange(max_tokens=4, num_experts=4, top_k=2)
    specs = [dataclasses.replace(case.spec(Member(rank, 2)), hidden_size=D) for rank in range(2)]
    memories = symmetric_memory.slices(2, BufferLayout.of(specs[0]).nbytes)
    ranks = [NvlinkGpuAllToAll(spec, memories, num_programs=2) for spec in specs]
    w13 = torch.randn(4, 2 * F, D, generator=generator) / 6
    w2 = torch.randn(4, D, F, generator=generator) / 4
    tokens = [3, 2]
    x = [torch.randn(num, D, generator=generator) for num in tokens]
    ids = [torch.rand(num, 4, generator=generator).argsort(dim=1)[:, :2].contiguous() for num in tokens]
    handles = [rank.dispatch_send(*sent, tokens) for rank, *sent in zip(ranks, x, ids, strict=True)]
    for i, rank in enumerate(ranks):
        here = slice(i * experts_here, (i + 1) * experts_here)
        apply = gpu_experts.prepare(GroupedMlpWeights(w13[here].clone(), w2[here].clone()), device=H200)
        arrived = rank.dispatch_recv(handles[i])
        rank.combine_send(handles[i], apply(arrived.x_UD, arrived.row_index_R, arrived.expert_offsets, arrived.home_R))
    for i, rank in enumerate(ranks):
        home = rank.combine_recv(handles[i])
        for t in range(tokens[i]):
            for k, expert in enumerate(ids[i][t].tolist()):
                one = slice(expert, expert + 1)
                expected = experts.reference(x[i][t : t + 1], torch.tensor([0]), np.array([0, 1]), w13[one], w2[one])
                torch.testing.assert_close(home[t, k], expected[0], rtol=1e-4, atol=1e-4)
