"""The demo model with wider experts: the same function, more to compute."""

import json
import sys

import pytest
import safetensors.torch
import torch

from expertwire.bench.serving.early_stop import main, widened


def expert(folder, x_H):
    """Return the output of one expert."""
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    gate, up, down = (
        weights[f"model.layers.1.mlp.experts.3.{name}_proj.weight"].double() for name in ("gate", "up", "down")
    )
    return down @ (torch.nn.functional.silu(gate @ x_H) * (up @ x_H)), gate.shape


def test_wider_experts_compute_the_same():
    x_H = torch.randn(128, dtype=torch.float64)
    with widened(1) as plain, widened(3) as wide:
        (expected, plain_shape), (got, wide_shape) = expert(plain, x_H), expert(wide, x_H)
        assert json.loads((wide / "config.json").read_text())["moe_intermediate_size"] == 288
    assert (plain_shape, wide_shape) == ((96, 128), (288, 128))
    torch.testing.assert_close(got, expected)
    assert expected.abs().max() > 0


def test_a_width_below_one_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["early_stop", "--widen", "0"])
    with pytest.raises(SystemExit):
        main()
    assert "--widen must be at least 1, got 0" in capsys.readouterr().err
