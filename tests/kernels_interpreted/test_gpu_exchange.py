"""The kernels of dispatch and combine, interpreted: simulated ranks in one process, and real ones over shared memory."""

import dataclasses
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from exchanges import Exchange, take_part, take_part_in_turns
from ranks import Ranks

from expertwire.comm import peer_memory
from expertwire.comm.a2a_nvlink_gpu import NvlinkGpuAllToAll
from expertwire.comm.all_to_all import RankStalled
from expertwire.comm.arena import ArenaLayout
from expertwire.kernels import experts
from expertwire.kernels.gpu import exchange, exchange_few
from expertwire.kernels.gpu import experts as gpu_experts
from expertwire.kernels.gpu.device import H200


@dataclass
class Member:
    rank: int
    size: int


def make(case, size, few_ids):
    """Ranks over slices of one tensor."""
    specs = [case.spec(Member(rank, size)) for rank in range(size)]
    memories = peer_memory.slices(size, ArenaLayout.of(specs[0]).nbytes)
    return [NvlinkGpuAllToAll(spec, memories, num_programs=3, few_ids=few_ids) for spec in specs]


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
    take_part_in_turns(make(case, size, few_ids), case, 0)


IDS = torch.tensor([[0, 1, 5], [3, -1, 2], [-1, -1, -1], [4, 0, 3]])
RANK_OFFSETS = torch.tensor([0, 2, 4, 6], dtype=torch.int32)
# Rank * 10 + place at the first expert of a rank, -1 at its others.
TARGETS = [[0, -1, 20], [10, -1, -1], [-1, -1, -1], [21, 1, 11]]


def test_one_copy_of_a_row_for_every_rank_that_needs_it():
    target, counts = torch.full((4, 3), -1, dtype=torch.int32), torch.zeros(3, dtype=torch.int64)
    exchange.plan_kernel[(3,)](
        IDS, RANK_OFFSETS, target, counts, counts, 0, 4, 10, K=3, K_BLOCK=4, TOKENS=16, LIMITED=False
    )
    assert counts.tolist() == [2, 2, 2]
    assert target.tolist() == TARGETS


@triton.jit
def few_targets_kernel(ids_ptr, rank_offsets_ptr, target_ptr):
    t, k_of, token = tl.program_id(0), tl.arange(0, 4), tl.arange(0, 4)[:, None]
    ids = tl.load(ids_ptr + token * 3 + k_of[None, :], mask=k_of[None, :] < 3, other=-1).to(tl.int32)
    own = tl.load(ids_ptr + t * 3 + k_of, mask=k_of < 3, other=-1).to(tl.int32)
    for k in range(3):
        row = exchange_few.row_of(ids, own, token, rank_offsets_ptr, t, k, k_of, 0, 10, 3, 4, 4)
        tl.store(target_ptr + t * 3 + k, row)


def test_one_copy_also_of_few_rows():
    target = torch.zeros(4, 3, dtype=torch.int32)
    few_targets_kernel[(4,)](IDS, RANK_OFFSETS, target)
    assert target.tolist() == TARGETS


def test_step_after_step():
    """Other numbers of tokens in each, and each one's number decides which way it takes."""
    case = Exchange(tokens=None, max_tokens=4, top_k=2, num_experts=4, ids="holes")
    ranks = make(case, 2, 5)
    for step in range(6):
        take_part_in_turns(ranks, case, step)


@either_way
def test_only_the_rows_that_count_travel(few_ids):
    """As in a CUDA graph, which always has as many rows."""
    case = Exchange(tokens=(3, 0), max_tokens=6, num_experts=4)
    valid = torch.tensor([3, 0], dtype=torch.int32)
    take_part_in_turns(make(case, 2, few_ids), case, 0, padded_to=6, num_tokens_P=valid)


@either_way
def test_a_rank_that_does_not_come_is_named_by_all(few_ids):
    case = Exchange(tokens=(2, 2, 2), num_experts=6)
    ranks = make(case, 3, few_ids)
    take_part_in_turns(ranks, case, 0)
    rows, ids = case.sent(0, 1, 3)
    x = torch.from_numpy(rows.ravel()).view(torch.float32).view(2, -1)
    handles = [rank.dispatch_send(x, torch.from_numpy(ids), [2, 2, 2]) for rank in ranks[:2]]
    ranks[0].dispatch_recv(handles[0])
    for rank in ranks:
        with pytest.raises(RankStalled, match=r"rank 2 has stalled.*dispatch"):
            rank.check()


def run(group, case, steps):
    spec = case.spec(group)
    memories = peer_memory.shared(group, ArenaLayout.of(spec).nbytes)
    all_to_all = NvlinkGpuAllToAll(spec, memories, num_programs=2, max_turns=10**9)
    for step in range(steps):
        take_part(all_to_all, case, group.rank, group.size, step, lambda: None)
    all_to_all.check()


def test_ranks_of_their_own():
    with Ranks(2) as ranks:
        ranks.run(run, Exchange(tokens=None, max_tokens=4, num_experts=4, ids="holes", form="bf16"), 8)


def test_experts_read_rows_where_they_arrived():
    """From dispatch to combine over two ranks, as a layer does it; what follows the last row is never looked at."""
    D, F, experts_here = 32, 16, 2
    generator = torch.Generator().manual_seed(1)
    case = Exchange(max_tokens=4, num_experts=4, top_k=2)
    specs = [dataclasses.replace(case.spec(Member(rank, 2)), hidden_size=D) for rank in range(2)]
    memories = peer_memory.slices(2, ArenaLayout.of(specs[0]).nbytes)
    ranks = [NvlinkGpuAllToAll(spec, memories, num_programs=2) for spec in specs]
    w13 = torch.randn(4, 2 * F, D, generator=generator) / 6
    w2 = torch.randn(4, D, F, generator=generator) / 4
    tokens = [3, 2]
    x = [torch.randn(num, D, generator=generator) for num in tokens]
    ids = [torch.rand(num, 4, generator=generator).argsort(dim=1)[:, :2].contiguous() for num in tokens]
    handles = [rank.dispatch_send(*sent, tokens) for rank, *sent in zip(ranks, x, ids, strict=True)]
    for i, rank in enumerate(ranks):
        here = slice(i * experts_here, (i + 1) * experts_here)
        apply = gpu_experts.prepare(w13[here].clone(), w2[here].clone(), device=H200)
        arrived = rank.dispatch_recv(handles[i])
        rank.combine_send(handles[i], apply(arrived.x_UD, arrived.row_index_R, arrived.expert_offsets, arrived.home_R))
    for i, rank in enumerate(ranks):
        home = rank.combine_recv(handles[i])
        for t in range(tokens[i]):
            for k, expert in enumerate(ids[i][t].tolist()):
                one = slice(expert, expert + 1)
                expected = experts.reference(x[i][t : t + 1], torch.tensor([0]), np.array([0, 1]), w13[one], w2[one])
                torch.testing.assert_close(home[t, k], expected[0], rtol=1e-4, atol=1e-4)
