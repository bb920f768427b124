"""Results of `bench kernels`: written item by item, resumed, and made into figures, tables and a plot."""

import importlib.util
import time
from types import SimpleNamespace

import pytest
import torch
from helpers import kernels_bench_work

pytest.importorskip("triton")


from expertwire.bench.kernels import plot, tables
from expertwire.bench.kernels import run as kernels
from expertwire.bench.kernels import suites as kernels_suites
from expertwire.bench.kernels.measure import Bits, Check, TensorRng
from expertwire.bench.kernels.models import Ceilings
from expertwire.bench.kernels.results import Results, bars, best_peer, figures, invariance_costs
from expertwire.kernels.gpu.device import H200

CEILINGS = Ceilings(bytes_per_s=4.3e12, flops_per_s={"bf16": 790e12, "fp8": 1580e12})


# Results, and taking a run up again.


def options(out, *more):
    return kernels.make_parser().parse_args(["--out", str(out), *more])


CPU = {"device": "cpu", "gpu": "CPU", "cuda": None, "versions": {"torch": "1"}}


@pytest.fixture
def results(tmp_path):
    return kernels.open_results(options(tmp_path), CPU)


def test_an_item_that_ended_its_process_has_failed(tmp_path, results):
    results.begin("bits", "a")
    results.finish("bits", "a", {"ok": True, "classes": {}})
    results.begin("bits", "b")
    after = Results.read(tmp_path)
    assert after.fail_running("gone") == ["b"]
    assert Results.read(tmp_path).find("b") == {"error": "gone"}
    again = kernels.open_results(options(tmp_path, "--resume"), CPU)
    assert [key for _, key, _ in again.items()] == ["a"]
    assert again.data["seed"] == results.data["seed"]


def run_suites(results, items, device="cpu", seconds=1e9, deadline=float("inf")):
    kernels_suites.run_suite(results, "bits", items, H200, torch.float32, device, seconds, deadline)


def counted(key, calls, error=None):
    def run(rng):
        calls.append(key)
        if error:
            raise error
        return {"x": (0.0, 0.0)}

    return Check(key, run)


def test_what_is_there_is_not_run_again(results):
    calls = []
    items = [counted("a", calls), counted("b", calls, RuntimeError("out of luck")), counted("c", calls)]
    run_suites(results, items)
    run_suites(results, items)
    assert calls == ["a", "b", "c"]
    assert results.find("b")["error"] == "RuntimeError: out of luck"
    results.forget_failures()
    run_suites(results, items)
    assert calls == ["a", "b", "c", "b"]


def test_a_suite_ends_with_its_time(results, monkeypatch):
    monkeypatch.setattr(kernels_suites, "_settle", lambda: True)
    clock = SimpleNamespace(now=1000.0)
    clock.time = lambda: clock.now
    monkeypatch.setattr(kernels_suites, "time", clock)

    def takes_twenty_seconds(_):
        clock.now += 20
        return {"x": (0.0, 0.0)}

    calls = []
    items = [*(Check(key, takes_twenty_seconds) for key in "ab"), counted("c", calls)]
    monkeypatch.setattr(TensorRng, "of", lambda *_: None)
    run_suites(results, items, "cuda", seconds=30)
    assert [key for _, key, _ in results.items()] == ["a", "b"]
    run_suites(results, items, "cuda", deadline=clock.now - 1)
    assert calls == []


def test_a_broken_device_ends_the_process_with_its_item_failed(results, monkeypatch):
    monkeypatch.setattr(kernels_suites, "_settle", lambda: False)
    monkeypatch.setattr(TensorRng, "of", lambda *_: None)
    with pytest.raises(SystemExit) as ended:
        run_suites(results, [counted("a", [], RuntimeError("illegal access")), counted("b", [])], "cuda")
    assert ended.value.code == 3
    assert [(key, item.get("error")) for _, key, item in results.items()] == [("a", "RuntimeError: illegal access")]


def test_missing_items_are_listed(results):
    every = [item.key for item in kernels_suites.items("routing", True, False)]
    assert kernels_suites.missing(results, ["routing"], True, False) == {"routing": every}
    results.finish("routing", every[0], {})
    assert kernels_suites.missing(results, ["routing"], True, False) == {"routing": every[1:]}


def test_a_new_process_continues_after_an_item_that_ended_one(tmp_path, results, monkeypatch, capsys):
    monkeypatch.setattr(kernels, "work", kernels_bench_work.dies_once)
    kernels.supervise(tmp_path, ["bits"], True, time.time() + 60)
    after = Results.read(tmp_path)
    assert after.find("first") == {"error": "ended its process with exit code 7"}
    assert after.find("second")["ok"]
    assert "first: ended its process" in capsys.readouterr().out


def test_a_process_that_hangs_is_ended(tmp_path, results, monkeypatch):
    monkeypatch.setattr(kernels, "work", kernels_bench_work.hangs)
    monkeypatch.setattr(kernels, "WRITING_SECONDS", 0.0)
    kernels.supervise(tmp_path, ["bits"], True, time.time() + 3)
    assert Results.read(tmp_path).find("endless") in ({"error": "was cut off at the end of the time"}, None)
    assert Results.read(tmp_path).suite("bits")["running"] is None


def test_an_item_that_hangs_is_ended_after_a_while(tmp_path, monkeypatch):
    class Process:
        alive = True

        def is_alive(self):
            return self.alive

        def join(self, seconds=None):
            time.sleep(seconds or 0)

        def kill(self):
            self.alive = False

    monkeypatch.setattr(kernels, "ITEM_SECONDS", 0.2)
    file = tmp_path / "file"
    file.touch()
    assert kernels.watch(Process(), file, time.time() + 100).startswith("did not return in")


def test_a_process_that_does_nothing_is_not_started_again(tmp_path, results, monkeypatch):
    monkeypatch.setattr(kernels, "work", kernels_bench_work.dies_at_once)
    with pytest.raises(ValueError, match="exit code 9 and has measured nothing"):
        kernels.supervise(tmp_path, ["bits"], True, time.time() + 60)


def test_kernels_are_compiled_by_other_processes(results):
    """Check that without a GPU every one of them fails with a message."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    tasks = kernels_suites.to_compile(results, ["routing", "sampling"], True)
    assert tasks[:3] == [("routing", 0), ("sampling", 0), ("routing", 1)]
    failures, done = kernels_suites.compile_all(tasks[:2], True, 1, time.time() + 60)
    assert (len(failures), done) == (2, 2)
    results.finish("routing", kernels_suites.items("routing", True, False)[0].key, {})
    assert ("routing", 0) not in kernels_suites.to_compile(results, ["routing"], True)


# Options.


def test_names_of_suites():
    assert kernels.suite_names(None, "cuda") == list(kernels.SUITE_NAMES)
    assert kernels.suite_names("bits, attention", "cuda") == ["attention", "bits"]
    assert kernels.suite_names(None, "cpu") == [name for name in kernels.SUITE_NAMES if name in kernels.CHECKS]
    with pytest.raises(ValueError, match=r"unknown 'gemm'; allowed are experts-qwen3, .*, experts-more"):
        kernels.suite_names("bits,gemm", "cuda")
    with pytest.raises(ValueError, match="cpu times nothing, so not attention"):
        kernels.suite_names("bits,attention", "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_device(tmp_path, capsys):
    for arguments, message in (([], "there is no CUDA device"), (["--device", "cpu"], "set TRITON_INTERPRET=1")):
        assert kernels.run(["--out", str(tmp_path / "new"), *arguments]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_written(tmp_path):
    file = tmp_path / "file"
    file.touch()
    for out in (file, file / "below"):
        with pytest.raises(OSError, match=r"--out .*file"):
            kernels.open_results(options(out), CPU)


def test_resuming_what_is_not_there_or_of_other_conditions(tmp_path, results):
    with pytest.raises(ValueError, match="there is no"):
        kernels.open_results(options(tmp_path / "none", "--resume"), CPU)
    for more, found in (((), {**CPU, "gpu": "another"}), (("--quick",), CPU)):
        with pytest.raises(ValueError, match="--resume"):
            kernels.open_results(options(tmp_path, "--resume", *more), found)
    (tmp_path / "kernels.json").write_text("[1]")
    with pytest.raises(ValueError, match="no results of this command"):
        kernels.open_results(options(tmp_path, "--resume"), CPU)


# Figures, bars, tables, plot.


def timed(us, *, bytes=4.3e9, flops=7.9e9, rate="bf16", peers=(), **labels):
    times = {name: {"median": time, "fastest": time, "slowest": time} for name, time in us.items()}
    return {"us": times, "bytes": bytes, "flops": flops, "rate": rate, "peers": list(peers), **labels}


@pytest.fixture
def measured(results):
    """Return invented figures for everything: memory bounds each item, and ours takes twice its floor, 1000 us."""
    results.data["ceilings"] = {"bytes_per_s": 4.3e12, "bf16": 790e12, "fp8": 1580e12}
    results.data["environment"] = {"gpu": "a GPU", "versions": {"torch": "2"}, "device": "cuda"}
    results.data["compiled"] = {"items": 3, "of": 3, "seconds": 4, "processes": 5, "failures": []}
    for name in kernels.SUITE_NAMES:
        for item in kernels_suites.items(name, False, False):
            if isinstance(item, Check):
                result = {"findings": {"out": [1e-3, 1e-2]}, "ok": True}
            elif isinstance(item, Bits):
                result = {"classes": {"rows": [["a", "b"], ["c"]]}, "ok": False}
            else:
                tokens = int(item.key.rpartition(" T")[2]) if name.startswith("experts-") else None
                labels = {"model": "m"} | ({} if tokens is None else {"tokens": tokens})
                us = {
                    "ours": 2000.0,
                    "ours, fast": 1000.0,
                    "w13": 800.0,
                    "w2": 400.0,
                    "grouped_mm": 3000.0,
                    "slow": 4000.0,
                }
                result = timed(us, peers=["grouped_mm", "slow"], **labels)
            results.suite(name)["items"][item.key] = result
    return results


def test_figures(measured):
    found = figures(measured.find("qwen3-30b dense EP1 T1"), measured.ceilings())
    ours = found["ours"]
    assert (ours["us"], ours["tflops"], ours["gbs"]) == (2000.0, pytest.approx(3.95), pytest.approx(2150))
    assert ours["floor"] == pytest.approx(0.5)
    assert not ours["compute_bound"]
    assert found["w13"]["tflops"] == pytest.approx(2 / 3 * 7.9e9 / 800e-6 / 1e12)
    assert best_peer(found, ["grouped_mm", "slow"]) == ("grouped_mm", 1.5)
    assert best_peer(found, ["absent"]) is None
    assert invariance_costs(measured)["qwen3-30b decode 64 x 8k"] == 2.0


def test_bars(measured):
    found = {row["what"].strip(): row for row in bars(measured)}
    assert found["bf16 pair, Qwen3-30B, 4096 tokens"]["met"] is False
    assert found["beside grouped_mm, its gather and activation, 8192 tokens"]["value"] == 1.5
    assert found["bf16 pair, Qwen3-30B, 1 tokens"]["value"] == pytest.approx(50)
    assert found["fp8 blocks, DeepSeek-V3 EP8, 8192 tokens, products alone"]["value"] == pytest.approx(
        7.9e9 / 1200e-6 / 1e12
    )
    assert found["MXFP4 pair, gpt-oss-120b, 8 tokens"] == {
        "what": "MXFP4 pair, gpt-oss-120b, 8 tokens", "bar": "<= 160 us", "value": 2000.0, "met": False,
    }  # fmt: skip
    measured.finish("routing", "route deepseek-v3 T128", timed({"ours": 9.0}))
    assert {row["what"]: row["met"] for row in bars(measured)}["routing and metadata, 256 experts, 128 tokens"] is True


def test_bars_that_were_not_measured(results):
    assert all(row["value"] is None and row["met"] is None for row in bars(results))


def test_the_short_table_fits_and_ends_with_the_bars(measured):
    key = kernels_suites.items("check-experts", False, False)[0].key
    measured.finish("check-experts", key, {"findings": {"w13": [None, 0.01], "w2": [0.5, 0.01]}, "ok": False})
    measured.finish("latent", "deepseek-v3 latent prefill 2k", {"error": "RuntimeError: no"})
    measured.data["not_reached"] = {"layer-ops": ["norm", "combine"]}
    text = tables.short_table(measured)
    assert len(text) < 12_000
    assert f"WRONG {key}: w13 not a number > 0.01, w2 0.5 > 0.01" in text
    assert "deepseek-v3 latent prefill 2k: RuntimeError: no" in text
    assert "not reached in time: layer-ops: 2 items, from 'norm' on" in text
    assert "a, b | c" in text
    assert "50% 1.50x" in text
    lines = text.splitlines()
    assert lines[-1].startswith("engine decode")
    assert lines[-2].startswith("routing and metadata")
    long = tables.long_table(measured)
    assert long.endswith(text)
    assert all(item.key in long for name in kernels.SUITE_NAMES for item in kernels_suites.items(name, False, False))


def test_the_report_is_written(tmp_path, measured, capsys):
    kernels.write_report(tmp_path, measured, list(kernels.SUITE_NAMES))
    written = Results.read(tmp_path).data
    assert written["not_reached"] == {}
    assert len(written["bars"]) == len(bars(measured))
    assert written["figures"]["route deepseek-v3 T128"]["ours"]["us"] == 2000.0
    assert (tmp_path / "report.txt").read_text().endswith(capsys.readouterr().out)
    assert (tmp_path / "roofline.svg").exists() == (importlib.util.find_spec("matplotlib") is not None)


def test_the_plot(tmp_path, measured):
    pytest.importorskip("matplotlib")
    series = plot.points(measured, CEILINGS)
    assert len(series["qwen3-30b dense EP1"]) == 14
    axes = plot.roofline(series, CEILINGS, "a < b").axes[0]
    drawn = {line.get_label(): line for line in axes.lines}
    for name, points in series.items():
        assert len(drawn[name].get_xdata()) == len(points)
    assert len(axes.lines) == len(series) + len(CEILINGS.flops_per_s)
    assert plot.save_roofline(tmp_path, series, CEILINGS, "t")
    assert (tmp_path / "roofline.png").read_bytes().startswith(b"\x89PNG")


def test_faster_points_lie_higher():
    pytest.importorskip("matplotlib")
    points = [plot.Point(1.0, 1e12), plot.Point(1.0, 2e12)]
    line = next(line for line in plot.roofline({"a": points}, CEILINGS, "t").axes[0].lines if line.get_label() == "a")
    assert list(line.get_ydata()) == [1.0, 2.0]
