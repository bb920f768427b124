"""`expertwire bench quantize`: what the quantised model loses is measured against the model as it is."""

import json

import numpy as np
import pytest
import torch
from helpers import tiny_checkpoints as tiny

from expertwire.bench.kernels import quantize
from expertwire.deploy import cli


@pytest.mark.slow
def test_the_demo_model(tmp_path, capsys):
    argv = ["bench", "quantize", "--formats", "fp8", "mxfp4", "--tokens", "60", "--json", str(tmp_path / "found.json")]
    assert cli.main(argv) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    plain, fp8, mxfp4 = found["rows"]
    assert [row["experts"] for row in found["rows"]] == ["as they are", "fp8", "mxfp4"]
    assert (plain["mean_kl"], plain["same_best"]) == (0, 1)
    assert 0 < fp8["mean_kl"] < mxfp4["mean_kl"] < 0.5
    assert mxfp4["expert_bytes"] < 0.6 * fp8["expert_bytes"] < 0.36 * plain["expert_bytes"]
    assert "mxfp4" in capsys.readouterr().out


def test_divergence_is_of_the_quantised_from_the_right_distribution():
    texts = [[1, 2, 3], [4, 5]]
    right = torch.tensor([[0.5, 0.5, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0], [0.25] * 4 + [0, 0]]).clamp(min=1e-9)
    found = torch.tensor([[0.25, 0.75, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0], [0.25] * 4 + [0, 0]]).clamp(min=1e-9)
    model = type("Model", (), {"model": type("Decoder", (), {"layers": []})})
    row = quantize._row("x", model, right.log().double().numpy(), found.log().double().numpy(), texts)
    assert np.isclose(row["mean_kl"], (0.5 * np.log(2) + 0.5 * np.log(2 / 3)) / 3, atol=1e-6)
    assert np.isclose(row["same_best"], 2 / 3)
    assert np.isclose(row["nats_per_token"], -np.log(1e-9), atol=1e-3)


def test_what_has_no_experts_is_refused():
    with pytest.raises(ValueError, match="has no experts to quantise"):
        list(quantize.measure(str(tiny.cached("qwen3")), [[1, 2]], ("fp8",)))
