"""The benchmark of the experts on a CPU: what it compares is equal, and its figures are those of the times."""

import pytest
import torch
from helpers.slow import slow_but

from expertwire.bench.kernels import experts_cpu
from expertwire.bench.kernels.experts_cpu import D, E, F, K


@pytest.mark.parametrize("dtype", slow_but([torch.float32], experts_cpu.DTYPES), ids=str)
def test_rows_of_a_measurement(dtype):
    with torch.inference_mode():
        rows = experts_cpu.measure([experts_cpu.random_layer(seed, dtype) for seed in range(2)], 3, rounds=2)
    assert [(row["what"], row["tokens"]) for row in rows] == [("experts", 3), ("layer", 3)]
    for row in rows:
        assert set(row["us"]) == {"ours", "eager", "grouped_mm", "batched_mm"}
        assert row["fastest_peer"] in set(row["us"]) - {"ours"}
        for name, us in row["us"].items():
            assert us > 0
            assert row["gflops"][name] * us * 1e3 == pytest.approx(3 * K * 6 * D * F)
        times = row["us_of_rounds"]
        ratios = [other / own for other, own in zip(times[row["fastest_peer"]], times["ours"], strict=True)]
        assert row["ratios"] == pytest.approx(ratios)
        assert str(dtype).removeprefix("torch.") in experts_cpu.table(rows)


def test_steps_are_routed_by_their_layer_and_fresh():
    layers = [experts_cpu.random_layer(seed, torch.float32) for seed in range(2)]
    first, second = experts_cpu.random_steps(layers, 20, 1)
    assert first.ids_TK.shape == (20, K)
    assert int(first.ids_TK.max()) < E
    assert torch.equal((first.x_TD @ layers[0].router.T).topk(K).indices, first.ids_TK)
    assert not torch.equal(first.x_TD, second.x_TD)
    assert not torch.equal(first.x_TD, experts_cpu.random_steps(layers, 20, 2)[0].x_TD)


def test_a_wrong_result_is_refused():
    layers = [experts_cpu.random_layer(0, torch.float32)]
    steps = experts_cpu.random_steps(layers, 5, 1)
    call = experts_cpu.our_experts(layers)["ours"]
    assert experts_cpu.check(call, "experts", layers, steps) < 1e-5
    with pytest.raises(ValueError, match="experts is off by"):
        experts_cpu.check(lambda step: 1.01 * call(step), "experts", layers, steps)
