"""The bench's loopback, interpreted: one rank plays its part against buffers in which the others have done theirs. And its ranks
that share a GPU."""

import numpy as np
import pytest
import torch
from helpers.fake_graphs import FakeCapture

from expertwire.bench.all_to_all import loopback as all_to_all_loopback
from expertwire.bench.all_to_all import shared
from expertwire.bench.all_to_all.loopback import Loopback
from expertwire.comm.all_to_all.symmetric_buffer import BufferLayout

RANKS, T, K, D = 3, 4, 2, 8
EXPERTS = [2, 2, 1]


@pytest.fixture
def loopback():
    return Loopback(RANKS, T, experts_P=EXPERTS, top_k=K, hidden_size=D, device="cpu", num_programs=2)


def holders(ids):
    """[T, P]: whether a rank has one of a token's experts."""
    return np.stack(
        [((ids >= first) & (ids < first + e)).any(1) for first, e in zip((0, 2, 4), EXPERTS, strict=True)], 1
    )


def test_rows_reach_every_destination_and_slots_every_home(loopback):
    layout = BufferLayout.of(loopback.rank._spec)
    for step in range(3):
        loopback.y_RD[:] = step + 1
        home = loopback.step()
        loopback.rank.check()
        x, ids = (part.numpy() if part.dtype == torch.int64 else part for part in loopback.inputs(0))
        for peer in range(RANKS):
            tokens = np.flatnonzero(holders(ids)[:, peer])
            region = layout.dispatch_rows
            rows = loopback.memories[peer][region.offset :][: region.nbytes].view(torch.bfloat16).view(RANKS, T, D)
            assert torch.equal(rows[0, : len(tokens)], x[tokens]), f"rank {peer}"
            # The slots of rank 0's experts at every home, and no others.
            peer_ids = loopback.inputs(peer)[1].numpy()
            slots = (
                loopback.memories[peer][layout.combine_rows.offset :][: layout.combine_rows.nbytes]
                .view(torch.bfloat16)
                .view(T, K, D)
            )
            assert np.array_equal((slots == step + 1).all(2).numpy(), peer_ids < EXPERTS[0]), f"home {peer}"
        assert np.array_equal((home == step + 1).all(2).numpy(), ids < EXPERTS[0])


def test_figures_add_up(loopback):
    kernels = {
        f"{name}_kernel": us
        for name, us in zip(
            ("dispatch_plan", "dispatch_send", "wait_for_signals", "dispatch_count", "dispatch_index", "combine_send"),
            range(1, 7),
            strict=True,
        )
    }
    found = all_to_all_loopback.figures(loopback, 30.0, kernels, programs=2)
    assert found["us"] == {"plan": 1, "send": 2, "wait": 3, "index": 9, "combine": 6}
    copies = holders(loopback.inputs(0)[1].numpy()).sum()
    assert found["send_gb_s_per_program"] == pytest.approx(copies * D * 2 / 2e-6 / 1e9 / 2)
    wire = (copies - holders(loopback.inputs(0)[1].numpy())[:, 0].sum()) * D * 2
    assert found["modelled_nvl72_us"]["dispatch"] == pytest.approx(1 + 2 + 1.5 + 9 + wire / 770e3)
    few = {
        "low_latency_send_kernel": 2,
        "low_latency_receive_kernel": 4,
        "wait_for_signals_kernel": 3,
        "combine_send_kernel": 6,
    }
    modelled = all_to_all_loopback.figures(loopback, 30.0, few, programs=2)["modelled_nvl72_us"]
    assert modelled["dispatch"] == pytest.approx(2 + 4 + wire / 770e3)
    assert modelled["combine"] - modelled["dispatch"] == pytest.approx(6 + 3 - 6, abs=0.1)
    del kernels["dispatch_index_kernel"], kernels["dispatch_count_kernel"]
    with pytest.raises(ValueError, match="seen no kernel of index"):
        all_to_all_loopback.figures(loopback, 30.0, kernels, programs=2)


def test_rows_can_go_out_in_fp8():
    shape = {"experts_P": EXPERTS, "top_k": K, "hidden_size": 256, "device": "cpu", "num_programs": 2}
    plain, fp8 = (Loopback(RANKS, T, format=format, **shape) for format in ("bf16", "fp8"))
    assert torch.equal(plain.step(), fp8.step())
    (out, back), (out_fp8, back_fp8) = plain.traffic(), fp8.traffic()
    assert back == back_fp8
    assert out_fp8.wire / out.wire == pytest.approx((256 + 2 * 4) / 512)


def test_ranks_that_share_a_gpu_are_checked(monkeypatch):
    shape = {"num_experts": 6, "top_k": 2, "hidden_size": 32, "device": "cpu"}
    capture = FakeCapture()
    rows = list(shared.run(3, 3, "bf16", steps=2, capture=capture.alone, **shape))
    assert [row["graph"] for row in rows] == [False, True]
    assert capture.replays == 2 * 2
    lost = lambda home_TKD, *rest: check(home_TKD * (torch.arange(len(home_TKD)) != 1)[:, None, None], *rest)  # noqa: E731
    check = shared.check
    monkeypatch.setattr(shared, "check", lost)
    with pytest.raises(AssertionError, match="is not the one that was sent"):
        list(shared.run(3, 3, "bf16", steps=1, **shape))


def test_memory_is_that_of_arenas_and_rows():
    """4,096 tokens fit for 8 ranks on 141 GB, not for 64."""
    assert all_to_all_loopback.needed_bytes(8, 4096, 7168, 8, 32) < 20e9
    assert all_to_all_loopback.needed_bytes(64, 4096, 7168, 8, 4) > 141e9
