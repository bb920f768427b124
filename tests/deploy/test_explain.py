"""What `expertwire explain` says of devices that need not be here."""

from pathlib import Path

import pytest

from expertwire.deploy import cli

CONFIGS = Path(__file__).resolve().parents[2] / "bench" / "configs"


def lines(capsys, *options):
    assert cli.main(["explain", *options]) == 0
    return capsys.readouterr().out.splitlines()


def test_the_demo_model_on_this_cpu(capsys):
    found = lines(capsys)
    assert "CPU" in found[0]
    assert any(line.startswith("w13 [192, 128]: ") for line in found)


@pytest.mark.parametrize("model", sorted(folder.name for folder in CONFIGS.iterdir()))
@pytest.mark.parametrize(("device", "capability"), [("h200", "9.0"), ("b200", "10.0")])
def test_a_gpu_by_its_name(capsys, model, device, capability):
    found = lines(capsys, str(CONFIGS / model), "--device", device, "--ep-size", "8")
    assert capability in found[0]
    assert all("expertwire.kernels.gpu." in line for line in found[1:11])
    tokens = [int(line.split("tokens=")[1].split(",")[0]) for line in found if line.startswith("  w13")]
    assert tokens == sorted(tokens), "more tokens take tiles at least as large"
    assert tokens[0] < tokens[-1]
