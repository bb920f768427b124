"""A mixture-of-experts layer's launches on a GPU: how many, which, and that none of them is compiled while serving."""

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels have no variants", allow_module_level=True)

from helpers.fake_launches import FakeLaunches, meta, names

from expertwire.comm.all_to_all.base import AllToAllSpec
from expertwire.comm.all_to_all.fp8 import packed
from expertwire.comm.all_to_all.local import LocalAllToAll
from expertwire.comm.all_to_all.nvlink_gpu import OVERLAP_PROGRAMS, NvlinkGpuAllToAll
from expertwire.comm.all_to_all.symmetric_buffer import BufferLayout
from expertwire.kernels import registry
from expertwire.kernels.formats import QuantizedWeight
from expertwire.kernels.gpu.device import H200
from expertwire.kernels.ops.experts import GroupedMlpWeights
from expertwire.kernels.ops.variants import Routing
from expertwire.moe.eplb.placement import place
from expertwire.moe.layer import MoeLayer, prepare

D, F, E, K = 2048, 768, 128, 8
MAX_TOKENS = 2048


@dataclass
class Member:
    rank: int
    size: int


def quantised(e, parts, columns, by_row):
    """fp8 by blocks of 128 x 128, or by row, [e, rows of all parts, columns]."""
    rows = sum(parts)
    scales = meta(e, rows) if by_row else meta(e, -(-rows // 128), -(-columns // 128))
    data = meta(e, rows, columns, dtype=torch.float8_e4m3fn)
    return QuantizedWeight(format="fp8_row" if by_row else "fp8_block", data=data, scales=scales.float(), parts=parts)


def layer(
    ranks: int,
    *,
    fp8: bool = False,
    by_row: bool = False,
    redundant: int = 0,
    num_micro_batches: int = 1,
    **options: Any,
) -> MoeLayer:
    """Return an MoE layer of Qwen3-30B-A3B, on rank 0. With experts of fp8 rows travel in fp8, unless its scales are of rows."""
    placement, ops = place(E, ranks, redundant), registry.triton(H200)
    group: Any = Member(0, ranks)
    spec = AllToAllSpec(
        group=group,
        rank_offsets=placement.rank_offsets,
        max_tokens=options.get("exchange_tokens", MAX_TOKENS),
        hidden_size=D,
        top_k=K,
        dtype=torch.bfloat16,
        num_micro_batches=num_micro_batches,
    )
    if fp8 and not by_row and ranks > 1:
        spec = packed(spec)
    all_to_alls: list[Any]
    if ranks == 1:
        all_to_alls = [LocalAllToAll(spec, ops.permute)]
    else:
        memories = [meta(BufferLayout.of(spec).nbytes, dtype=torch.uint8)] * ranks
        all_to_alls = [NvlinkGpuAllToAll(spec, memories, num_programs=H200.num_sms) for _ in range(num_micro_batches)]
    e = len(placement.experts_of(0))
    w13, w2 = meta(e, 2 * F, D), meta(e, D, F)
    if fp8:
        w13, w2 = quantised(e, (F, F), D, by_row), quantised(e, (D,), F, by_row)
    return prepare(
        meta(E, D),
        GroupedMlpWeights(w13, w2),
        meta(D),
        ops=ops,
        routing=Routing(top_k=K, renormalize=True),
        eps=1e-6,
        placement=placement,
        rank=0,
        all_to_alls=all_to_alls,
        **options,
    )


def run(moe, num_tokens_P):
    x_TD = meta(num_tokens_P[0], D)
    moe_stages = moe.micro_batch(x_TD, x_TD, num_tokens_P, num_valid=meta(1, dtype=torch.int32))
    for _ in moe_stages:
        pass


def test_launches_of_a_layer():
    """Between the choice of experts and the sending of rows there is nothing, and load is counted on the way."""
    experts = ["tile_map", "grouped_gemm", "grouped_gemm"]
    quantising = ["tile_map", "tile_scales", "grouped_gemm", "quantize_tiles", "grouped_gemm"]
    few, many = (
        ["low_latency_send", "low_latency_receive"],
        ["dispatch_plan", "dispatch_send", "wait_for_signals", "dispatch_count", "dispatch_index"],
    )
    home = ["combine_send", "wait_for_signals", "combine", "rms_norm"]
    expected = {
        (8, False, 4): ["route", *few, *experts, *home],
        (8, True, 4): ["route", *few, *quantising, *home],
        (8, True, 2000): ["route", *many, *quantising, *home],
        (1, False, 4): ["route", "place", "grouped_gemm", "grouped_gemm", "combine", "rms_norm"],
    }
    with FakeLaunches() as fake:
        for (ranks, fp8, tokens), kernels in expected.items():
            for redundant in (0, 8) if ranks > 1 else (0,):
                moe = layer(ranks, fp8=fp8, redundant=redundant)
                fake.take()
                run(moe, [tokens] * ranks)
                found = names(fake.take())
                assert found[found.index("route") :] == kernels, (ranks, fp8, tokens, redundant)


def arrival(fake, moe, num_tokens_P):
    run(moe, num_tokens_P)
    return names(fake.take())


@pytest.mark.parametrize("own", [0, 1, 64])
def test_an_idle_ranks_arrival_is_that_of_its_peers_tokens(own):
    """Looking for one's rows among 86,000 ids takes one program a source and a chunk, not one an expert."""
    with FakeLaunches() as fake:
        moe = layer(8)
        for peers, way in ((8, "low_latency_receive"), (2048, "dispatch_index")):
            fake.take()
            found = arrival(fake, moe, [own] + [peers] * 7)
            assert way in found, found
            assert "low_latency_send" in found, found
            assert len({"low_latency_receive", "dispatch_index"} & set(found)) == 1, found


def warmed_up(fake, moe, ranks, most):
    """As a rank's warm-up does it: every rank has as many tokens, doubling from 1."""
    size = 1
    while size <= most:
        run(moe, [size] * ranks)
        size = most if size < most < 2 * size else 2 * size
    return {(launch.kernel, launch.variant) for launch in fake.take()}


@pytest.mark.parametrize("ranks", [1, 8])
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("exchange_tokens", [None, 512], ids=["whole", "in parts"])
def test_nothing_is_compiled_after_warm_up(ranks, fp8, exchange_tokens):
    rng = np.random.default_rng(0)
    options = {} if exchange_tokens is None or ranks == 1 else {"exchange_tokens": exchange_tokens}
    with FakeLaunches() as fake:
        moe = layer(ranks, fp8=fp8, redundant=8 if ranks > 1 else 0, **options)
        known = warmed_up(fake, moe, ranks, MAX_TOKENS)
        steps = [[1] + [0] * (ranks - 1), [0] * (ranks - 1) + [1], [0] + [MAX_TOKENS] * (ranks - 1), [1000] * ranks]
        steps += [(2 ** (11 * rng.random(ranks))).astype(int).tolist() for _ in range(60)]
        steps += [np.where(rng.random(ranks) < 0.7, 0, step).tolist() for step in steps[-20:]]
        for step in steps:
            run(moe, step)
            late = [launch.kernel for launch in fake.take() if (launch.kernel, launch.variant) not in known]
            assert not late, f"{step}: compiled while serving: {late}"


def test_rows_are_quantised_where_they_have_come():
    """Experts whose scales are of rows get rows as they are, in a buffer for 8 x 2,048 tokens."""
    with FakeLaunches() as fake:
        moe = layer(8, fp8=True, by_row=True)
        known = warmed_up(fake, moe, 8, MAX_TOKENS)
        for tokens, programs in ((4, 8 * 4 * K), (64, 4096), (MAX_TOKENS, 8 * MAX_TOKENS)):
            run(moe, [tokens] * 8)
            of_step = fake.take()
            of_x, _ = (launch.grid[0] for launch in of_step if launch.kernel == "quantize_kernel")
            assert of_x == programs, tokens
            assert not [launch.kernel for launch in of_step if (launch.kernel, launch.variant) not in known]


def test_experts_leave_multiprocessors_to_the_rows_of_the_other_part():
    with FakeLaunches() as fake:
        alone, overlapped = layer(8), layer(8, num_micro_batches=2)
        grids = []
        for moe in (alone, overlapped):
            fake.take()
            run(moe, [2000] * 8)
            grids.append({launch.kernel: launch.grid for launch in fake.take()})
    blocks = grids[0]["grouped_gemm_kernel"][0] // H200.num_sms
    assert grids[0]["grouped_gemm_kernel"] == (blocks * H200.num_sms,)
    assert grids[1]["grouped_gemm_kernel"] == (blocks * (H200.num_sms - H200.exchange_sms),)
    assert 12 <= H200.exchange_sms <= 24
    assert grids[1]["dispatch_send_kernel"] == grids[1]["combine_send_kernel"] == (OVERLAP_PROGRAMS,)
    assert 4 * H200.exchange_sms >= OVERLAP_PROGRAMS


def test_of_two_parts_one_warp_waits():
    """A program an expert would wait on multiprocessors that the other part's experts have been told to be theirs."""
    with FakeLaunches() as fake:
        moe = layer(8, num_micro_batches=2)
        fake.take()
        run(moe, [1] * 8)
        found = fake.take()
    assert "low_latency_receive" not in names(found)
    assert all(launch.grid == (1,) for launch in found if launch.kernel == "wait_for_signals_kernel")
