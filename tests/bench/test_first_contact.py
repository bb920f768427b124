"""`bench first_contact`: whatever a stage does, it is reported, and the rest runs. With stages that are made to fail."""

import importlib.util
import json
import time
from pathlib import Path

import psutil
import pytest

from expertwire.bench.first_contact import one_rank_times, stage_process, stage_record
from expertwire.bench.first_contact import report as first_contact_report
from expertwire.bench.first_contact import run as first_contact
from expertwire.bench.first_contact import stages as first_contact_stages
from expertwire.bench.first_contact.one_rank import Step
from expertwire.bench.first_contact.run import Stage
from expertwire.bench.kernels import results as kernels_results

TESTS = Path(__file__).resolve().parents[1]


def stages(*names, seconds=60.0):
    return [Stage(name=name, target=f"helpers.fake_stages:{name}", seconds=seconds) for name in names]


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Runs the command; returns its exit code, results and output."""
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    monkeypatch.setattr(first_contact, "_CPU_SECONDS", 60.0)

    def run(*names, options=(), budget=300):
        argv = ["--out", str(tmp_path), "--device", "cpu", "--budget", str(budget), *options]
        code = first_contact.run(argv, stages(*names))
        return code, json.loads((tmp_path / first_contact.NAME).read_text())["stages"], capsys.readouterr().out

    return run


def test_every_end_of_a_stage_is_reported_and_the_rest_runs(call, monkeypatch, tmp_path):
    monkeypatch.setattr(first_contact, "_CPU_SECONDS", 8.0)
    names = ("wrong", "fails", "segfault", "dies_at_once", "hangs", "rubbish", "broken_device", "good")
    code, found, text = call(*names)
    assert code == 1
    verdicts = {name: found[name]["verdict"] for name in names}
    assert verdicts == {
        "wrong": "wrong",
        "fails": "failed",
        "segfault": "failed",
        "dies_at_once": "crashed",
        "hangs": "hung",
        "rubbish": "rubbish",
        "broken_device": "failed",
        "good": "passed",
    }
    assert "in the middle" in found["fails"]["errors"][0]["traceback"]
    assert [check["check"] for check in found["fails"]["checks"]] == ["two"]
    # Of the stage that crashes one item is lost, and it is said where it was.
    assert [check["check"] for check in found["segfault"]["checks"]] == ["before", "after"]
    assert [error["error"] for error in found["segfault"]["errors"]] == ["at it"]
    assert "SIGSEGV" in found["segfault"]["errors"][0]["traceback"]
    assert "fake_stages.py" in found["segfault"]["output"]
    assert "last words" in found["dies_at_once"]["output"]
    assert "exited with code 7" in found["dies_at_once"]["errors"][0]["traceback"]
    # Of the one that hangs everything has ended, and it is said where it was.
    assert found["hangs"]["errors"][0]["error"] == "waiting"
    assert "in hangs" in found["hangs"]["output"]
    child = found["hangs"]["facts"]["child"]
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE
    assert found["rubbish"]["unreadable_lines"] >= 3
    assert len(found["rubbish"]["output"]) <= 4000
    assert [error["error"] for error in found["broken_device"]["errors"]][:2] == ["one", "two"]
    assert all("fake_stages" in error["traceback"] for error in found["broken_device"]["errors"])
    assert len(text.rpartition("first contact, ")[2]) <= first_contact_report.MOST_CHARACTERS
    for part in ("in the middle", "SIGSEGV", "1 + 1 is 3", "exited with code 7"):
        assert part in text, part
    assert len(list(tmp_path.iterdir())) <= 8


def test_a_second_call_goes_on_where_the_first_was_cut(call, monkeypatch):
    monkeypatch.setattr(first_contact, "_LEAST_S", 0.0)
    code, found, _ = call("slow", budget=2.0)  # less than its three items take
    assert (code, found["slow"]["verdict"]) == (1, "cut")
    done = found["slow"]["checks"]
    code, found, _ = call("slow")
    assert (code, found["slow"]["verdict"]) == (0, "passed")
    assert found["slow"]["checks"][: len(done)] == done, "what was done has been done again"
    assert len(found["slow"]["checks"]) >= 2


def test_failed_stages_run_again_and_asked_for_ones_anew(call):
    _, before, _ = call("dies_at_once", "good")
    _, again, _ = call("dies_at_once", "good")
    assert again["good"] == before["good"]
    assert again["dies_at_once"]["verdict"] == "crashed"
    code, anew, _ = call("dies_at_once", "good", options=["--stages", "good"])
    assert code == 0
    assert anew["good"]["facts"] == {"colour": "green"}


def test_wrong_options_are_refused(tmp_path, capsys):
    assert first_contact.run(["--out", str(tmp_path), "--stages", "good,bad"], stages("good")) == 2
    assert "unknown 'bad'; allowed are good" in capsys.readouterr().err
    (tmp_path / first_contact.NAME).write_text("[]")
    assert first_contact.run(["--out", str(tmp_path), "--device", "cpu"], stages("good")) == 2
    assert "not a file of this command" in capsys.readouterr().err
    (tmp_path / first_contact.NAME).write_text('{"device": "cuda", "stages": {}}')
    assert first_contact.run(["--out", str(tmp_path), "--device", "cpu"], stages("good")) == 2
    assert "has results of device 'cuda'" in capsys.readouterr().err


def test_nothing_is_timed_in_the_interpreter(tmp_path):
    timed, untimed = (stage_record.Record(tmp_path / name, timed=name == "timed") for name in ("timed", "untimed"))
    for record in (timed, untimed):
        record.figure("speed", 3.0, "m/s")
        record.check("right", True, "")
    rows, rubbish = stage_record.read(tmp_path / "timed")
    assert (len(rows), rubbish) == (2, 0)
    assert [list(row) for row in stage_record.read(tmp_path / "untimed")[0]] == [["check", "ok", "says"]]


# The report.


def stage(verdict="passed", **more):
    empty = {"seconds": 1.0, "figures": [], "checks": [], "facts": {}, "errors": [], "output": ""}
    return {"verdict": verdict, **empty, **more}


def figure(name, value, bar=None, at_most=False):
    more = {} if bar is None else {"bar": bar, "at_most": at_most, "source": "performance.md"}
    return {"figure": name, "value": value, "unit": "tok/s", **more}


def results(**found):
    return {"date": "today", "device": "cuda", "interpreted": False, "stages": found}


def test_the_worst_three_figures_beside_their_bars():
    figures = [
        figure("a", 50, 100),
        figure("b", 200, 100),
        figure("c", 30, 10, at_most=True),
        figure("d", None, 5),
        figure("e", 1),
    ]
    text = first_contact_report.summary(results(engine=stage(figures=figures)), ["engine"])
    lines = text.splitlines()
    place = lines.index("bars: 1 of 4 met; the worst 3:")
    assert [line.split(":")[0].strip() for line in lines[place + 1 : place + 4]] == ["d", "c", "a"]
    assert "50 of >= 100 tok/s (performance.md), 50%" in lines[place + 3]


def test_a_report_is_short_whatever_there_is_to_say():
    errors = [{"error": f"item {i}", "traceback": "line\n" * 2000 + f"Error number {i}\n"} for i in range(5)]
    many = {
        f"stage{i}": stage(
            "failed", errors=errors, figures=[figure(f"f{j}", j, 10) for j in range(100)], output="o" * 4000
        )
        for i in range(11)
    }
    text = first_contact_report.summary(results(**many), list(many))
    assert len(text) <= first_contact_report.MOST_CHARACTERS
    assert text.count("Error number 0") == 11
    assert "Error number 1" not in text


def test_what_has_not_run_is_said():
    assert "b                   not run" in first_contact_report.summary(results(a=stage()), ["a", "b"])


# A profiler's trace.


def event(name, ts, dur, cat="kernel"):
    return {"ph": "X", "name": name, "cat": cat, "ts": ts, "dur": dur}


def test_a_trace_in_short():
    events = [
        {"ph": "M", "name": "process_name"},
        event("cudaGraphLaunch", 0, 3, "cuda_runtime"),
        event("cuLaunchKernelEx", 4, 2, "cuda_driver"),
        event("aten::mm", 0, 50, "cpu_op"),
        event("gemm", 10, 40),
        event("norm", 45, 10),  # begins before the other ends
        event("gemm", 75, 30),
        event("copy", 106, 4, "gpu_memcpy"),
    ]
    found = one_rank_times.summary(events, 2)
    assert (found["launches_per_step"], found["kernels_per_step"]) == (1.0, 2.0)
    assert found["busy_us_per_step"] == (40 + 10 + 30 + 4) / 2
    assert found["gap_us_per_step"] == (20 + 1) / 2
    assert [(kernel["name"], kernel["us"], kernel["per_step"]) for kernel in found["kernels"]] == [
        ("gemm", 35.0, 1.0),
        ("norm", 10.0, 0.5),
        ("copy", 4.0, 0.5),
    ]
    assert found["gaps"][0] == {"us": 20, "after": "norm", "before": "gemm"}
    assert one_rank_times.summary([], 2)["kernels"] == []


# The real stages.


def test_the_target_of_a_gpu(monkeypatch):
    """That everything is called as it is defined; on a CPU nothing else would notice."""
    pytest.importorskip("triton")
    from expertwire.bench.first_contact import one_rank
    from expertwire.kernels import registry

    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr("torch.cuda.graph_pool_handle", lambda: None)
    monkeypatch.setattr(one_rank.registry, "choose", lambda device, fast: registry.plain())
    captured = one_rank.Target.gpu("cuda")
    assert captured.device == "cuda:0"
    assert captured.capture is not None
    assert one_rank.Target.gpu("cuda", graphs=False).capture is None


def test_the_stages_that_take_seconds_run_on_a_cpu(tmp_path, capsys):
    pytest.importorskip("triton")
    argv = ["--out", str(tmp_path), "--device", "cpu", "--stages", "environment,serve,flashinfer,kernels_timed"]
    assert first_contact.run(argv) == 0, capsys.readouterr().out
    text = (tmp_path / "first_contact.txt").read_text()
    assert "INTERPRETED ON A CPU" in text
    found = json.loads((tmp_path / first_contact.NAME).read_text())["stages"]
    assert not any(each["figures"] for each in found.values())
    assert found["environment"]["facts"]["interpreted"]
    assert {name: each["verdict"] for name, each in found.items()} == {
        "environment": "passed", "serve": "not run", "kernels_timed": "not run",
        "flashinfer": "not run" if importlib.util.find_spec("flashinfer") is None else "passed",
    }  # fmt: skip


@pytest.mark.full
@pytest.mark.timeout(900)
def test_all_of_it_runs_on_a_cpu(tmp_path, capsys):
    pytest.importorskip("triton")
    assert first_contact.run(["--out", str(tmp_path), "--device", "cpu", "--budget", "880"]) == 0, (
        capsys.readouterr().out
    )
    found = json.loads((tmp_path / first_contact.NAME).read_text())["stages"]
    assert list(found) == [stage.name for stage in first_contact.STAGES]
    assert not any(each["figures"] for each in found.values())
    assert len(list(tmp_path.iterdir())) <= 8


# What is written down on a GPU.


def on_a_gpu(tmp_path):
    record = stage_record.Record(tmp_path / "rows", timed=True)
    return stage_process.Run(device="cuda", out=tmp_path, until=time.time() + 100, record=record)


def steps(tokens, sequences, number, *, apart_s):
    return [
        Step(tokens=tokens, sequences=sequences, host_us=500.0 + i, device_us=2000, done_s=apart_s * i)
        for i in range(number)
    ]


def test_figures_of_steps_beside_their_bars(tmp_path):
    run = on_a_gpu(tmp_path)
    bars = {64: 3800.0}
    first_contact_stages._step_figures(run, "decode 64", steps(64, 64, 11, apart_s=0.016), bars)
    first_contact_stages._step_figures(run, "decode 64, no graphs", steps(64, 64, 3, apart_s=0.032), bars)
    first_contact_stages._step_figures(run, "prefill 8192", steps(8192, 1, 5, apart_s=1.0), bars)
    figures = {row["figure"]: row for row in stage_record.read(tmp_path / "rows")[0] if "figure" in row}
    assert figures["decode 64"]["value"] == pytest.approx(4000)
    assert (figures["decode 64"]["bar"], figures["decode 64"]["source"]) == (3800.0, "performance.md")
    assert figures["decode 64, no graphs"]["value"] == pytest.approx(2000)
    assert "bar" not in figures["decode 64, no graphs"]
    assert figures["prefill 8192"]["value"] == pytest.approx(8192 / 2e-3)
    assert figures["decode 64: host"]["value"] == 505.0


def test_an_item_that_fails_ends_its_process_and_is_not_begun_again(tmp_path):
    run, made = on_a_gpu(tmp_path), []

    def measure(rank):
        raise ValueError("out of luck")

    with pytest.raises(RuntimeError, match="no use after decode 64"):
        first_contact_stages._run_items(run, lambda: made.append(1), {"decode 64": measure}, {})
    again = on_a_gpu(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(first_contact_stages, "_forget", lambda run: None)
        first_contact_stages._run_items(again, lambda: made.append(2), {"decode 64": measure}, {})
    assert made == [1]


def test_bars_of_kernels():
    cost = {"bytes": 1e9, "flops": 4e11, "rate": "bf16", "peers": []}
    pair = {"us": {"ours": {"median": 500.0}}, **cost}
    attention = {"us": {"ours": {"median": 2000.0}, "ours, fast": {"median": 800.0}}, **cost}
    items = {"qwen3-30b dense EP1 T4096": pair, "qwen3-30b prefill 8k": attention}
    data = {"ceilings": {"bytes_per_s": 4e12, "bf16": 8e14}, "suites": {"a": {"items": items}}}
    found = {row["what"]: row["value"] for row in kernels_results.issue_bars(kernels_results.Results(Path("."), data))}
    assert found["grouped GEMM bf16, 4096 tokens"] == pytest.approx(800)
    assert found["grouped GEMM bf16, 8192 tokens"] is None
    assert found["prefill attention 8k, fast"] == pytest.approx(500)
    assert found["prefill attention 8k, invariant"] == pytest.approx(200)
