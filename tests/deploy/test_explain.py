"""`expertwire explain`, of devices that need not be here."""

import json
import subprocess
import sys
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
    assert all(".kernels.gpu." in line for line in found[1:29])
    tokens = [int(line.split("tokens=")[1].split(",")[0]) for line in found if line.startswith("  w13")]
    assert tokens == sorted(tokens), "more tokens take tiles at least as large"
    assert tokens[0] < tokens[-1]


QWEN = str(CONFIGS / "qwen3-30b-a3b")


def test_the_all_to_all_and_what_it_moves(capsys):
    found = lines(capsys, QWEN, "--device", "b200", "--ep-size", "64")
    assert found[-4] == "activations are sent as they are; small steps replay CUDA graphs"
    assert found[-3] == "nvl72: 64 ranks on 16 nodes in 1 NVLink domain of 64"
    assert found[-2].startswith("all-to-all nvlink: all 64 ranks are in one NVLink domain")
    # 128 experts: 8 * 2 KiB rows come back, less those from the rank itself.
    assert "a token goes to 7.78 of 64 ranks" in found[-1]
    assert f"{8 * 4096 * 63 / 64 / 1e3:.1f} KB come back" in found[-1]


def test_a_topology_of_ones_own(capsys, tmp_path):
    path = tmp_path / "boards.json"
    boards = [{"name": name, "nodes": [{"name": name, "ranks": 2}]} for name in "ab"]
    path.write_text(json.dumps({"name": "boards", "domains": boards}))
    found = lines(capsys, QWEN, "--device", "h200", "--ep-size", "4", "--topology", str(path))
    assert found[-2].startswith("all-to-all nccl: the ranks are in 2 NVLink domains")
    assert found[-4].endswith("the all-to-all counts rows on the host, so no step replays a CUDA graph")
    options = [QWEN, "--device", "h200", "--ep-size", "4", "--topology", str(path), "--all2all-backend", "nvlink"]
    assert cli.main(["explain", *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: all2all_backend 'nvlink' cannot be used")
    assert error.rstrip().endswith("allowed here are auto, reference, nccl")


def test_measured_times_decide(capsys, tmp_path):
    """Times of eight GPUs decide on eight GPUs, and are refused on other numbers."""
    times = [
        {"ranks": 8, "tokens": 2048, "backend": name, "nccl": options, "p50_us": us}
        for name, options, us in (("nvlink", {}, 900.0), ("nccl", {"max_ctas": 16}, 800.0), ("padded", {}, 1.0))
    ]
    path = tmp_path / "times.json"
    machine = {"device": "cuda", "name": "an H200"}
    path.write_text(json.dumps({"machine": machine, "row_bytes": 8192, "top_k": 8, "entries": times}))
    options = [QWEN, "--device", "h200", "--all2all-table", str(path)]
    found = lines(capsys, *options, "--ep-size", "8")
    assert found[-2].startswith("all-to-all nccl: the fastest of those in ")
    assert found[-2].endswith("800 us with max_ctas=16, nvlink 900 us")
    for others, message in (
        (["--ep-size", "4"], "measured with 8 ranks, not with 4"),
        (["--ep-size", "8", "--device", "cpu"], "measured on cuda, the ranks are on cpu"),
        (["--ep-size", "8", "--all2all-backend", "nvlink"], "has no effect with all2all_backend 'nvlink'; use 'auto'"),
    ):
        assert cli.main(["explain", *options, *others]) == 2
        assert message in capsys.readouterr().err


def test_rows_go_out_in_fp8_to_experts_that_read_them(capsys):
    """Asked for or not, as it changes no bit; others refuse it."""
    for options in ([], ["--dispatch-dtype", "fp8"]):
        found = lines(capsys, str(CONFIGS / "deepseek-v3"), "--device", "h200", "--ep-size", "8", *options)
        assert found[-4].startswith("activations are sent in fp8")
        copies = float(found[-1].removeprefix("a token goes to ").partition(" ")[0])
        leaving = float(found[-1].partition("saved; ")[2].partition(" KB leave")[0])
        assert leaving == pytest.approx(7.392 * copies * 7 / 8, rel=0.01)
    assert cli.main(["explain", QWEN, "--device", "h200", "--ep-size", "8", "--dispatch-dtype", "fp8"]) == 2
    assert "experts of format fp8_block" in capsys.readouterr().err


def test_more_ranks_than_the_topology_has_are_refused(capsys):
    assert cli.main(["explain", QWEN, "--device", "h200", "--ep-size", "9"]) == 2
    assert "ep_size must be in [1, 8], the ranks of 'hgx8', got 9" in capsys.readouterr().err


def test_a_refusal_loads_nothing_slow():
    """A wrong combination is told within a second or two: torch alone takes that to import."""
    code = (
        "import sys; from expertwire.deploy import cli; "
        f"code = cli.main(['explain', {QWEN!r}, '--device', 'h200', '--ep-size', '9']); print(code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "2 False"


def test_a_gated_delta_net_whose_heads_are_odd_is_said_to_be_slow(capsys, tmp_path):
    config = json.loads((CONFIGS / "qwen3-next-80b-a3b" / "config.json").read_text())
    for dim, said in ((128, False), (40, True)):
        (tmp_path / "config.json").write_text(json.dumps({**config, "linear_key_head_dim": dim}))
        found = [line for line in lines(capsys, str(tmp_path)) if "so this is slow" in line]
        assert [f"keys of {dim}" in line for line in found] == [True] * said
