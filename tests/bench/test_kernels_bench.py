"""`bench kernels` as far as it goes without a GPU: floors, shapes, plumbing, tables, and one run in the interpreter."""

import json
import subprocess
import sys
import time
from itertools import chain
from xml.etree import ElementTree

import kernels_bench_work
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from triton.runtime.jit import JITFunction

from expertwire.bench import (
    kernels,
    kernels_attention,
    kernels_experts,
    kernels_models,
    kernels_parts,
    kernels_plot,
    kernels_tables,
    kernels_work,
)
from expertwire.bench.kernels_models import DEEPSEEK, GPT_OSS, KIMI, MIXTRAL, QWEN3, Ceilings, Cost, Model
from expertwire.bench.kernels_results import Results, bars, best_peer, figures, invariance_costs
from expertwire.bench.kernels_work import Bits, Check, Draw, Timed, Work
from expertwire.kernels import experts
from expertwire.kernels.experts import Activation
from expertwire.kernels.gpu.device import H200
from expertwire.kernels.gpu.formats import ExpertWeights

CEILINGS = Ceilings(bytes_per_s=4.3e12, flops_per_s={"bf16": 790e12, "fp8": 1580e12})


# Floors.


@pytest.mark.parametrize(
    ("model", "format", "num_tokens", "us", "bound"),
    [
        (QWEN3, "dense", 1, 17.6, "memory"),
        (QWEN3, "dense", 8, 113, "memory"),
        (QWEN3, "dense", 64, 277, "memory"),
        (QWEN3, "dense", 2048, 297, "memory"),
        (QWEN3, "dense", 4096, 391, "compute"),
        (QWEN3, "dense", 8192, 783, "compute"),
        (QWEN3, "fp8_block", 32, 123, "memory"),
        (QWEN3, "fp8_block", 8192, 391, "compute"),
        (MIXTRAL, "dense", 4, 448, "memory"),
        (MIXTRAL, "dense", 1024, 913, "compute"),
        (DEEPSEEK, "fp8_block", 1, 82, "memory"),
        (DEEPSEEK, "fp8_block", 128, 2579, "memory"),
        (DEEPSEEK, "fp8_block", 8192, 3653, "compute"),
        (GPT_OSS, "mxfp4", 1, 12.3, "memory"),
        (GPT_OSS, "mxfp4", 512, 400, "memory"),
        (GPT_OSS, "mxfp4", 4096, 1032, "compute"),
    ],
)
def test_floors_are_the_published_ones(model, format, num_tokens, us, bound):
    cost = kernels_models.experts_cost(model, format, num_tokens)
    found = kernels_models.floor_us(cost, CEILINGS)
    assert found == (pytest.approx(us, rel=6e-3), bound)


def test_touched_experts():
    for num_experts, expected in (
        (128, [8, 15.5, 29, 52, 82, 112, 126, 128]),
        (256, [8, 16, 30, 57, 102, 163, 222, 252]),
    ):
        found = [kernels_models.touched(num_experts, 8, 2**i) for i in range(8)]
        assert found == pytest.approx(expected, abs=0.6)


def test_costs_of_attention():
    shape = {"heads": 32, "kv_heads": 4, "dim": 128}
    decode = kernels_models.attention_cost([8192] * 64, [1] * 64, **shape)
    assert decode.flops == 64 * 8192 * 32 * 128 * 4
    assert decode.bytes == 64 * (8192 * 2 * 4 * 128 * 2 + 2 * 32 * 128 * 2)
    by_hand = sum(min(position + 1, 5) for position in range(7, 10))
    window = kernels_models.attention_cost([10], [3], **shape, window=5)
    assert window.flops == by_hand * 32 * 128 * 4
    assert kernels_models.attention_cost([6], [6], **shape).flops == 21 * 32 * 128 * 4
    latent = kernels_models.latent_cost([1000], [1], heads=128, rank=512, rotated=64)
    assert latent.flops == 1000 * 128 * 2 * (576 + 512)


def test_experts_are_dealt_out_evenly():
    assert KIMI.local_experts(64) == 6
    with pytest.raises(ValueError, match="8 experts of mixtral-8x7b on 64 ranks"):
        MIXTRAL.local_experts(64)


# What is run, and with which inputs.


def test_every_item_launches_kernels_of_real_shapes(monkeypatch):
    """Wrappers check shapes before they launch; here nothing is compiled. Full and quick runs know the same bars."""
    launches = []
    monkeypatch.setattr(JITFunction, "run", lambda self, *_, warmup, **__: launches.append((self, warmup)))
    for quick in (False, True):
        keys = []
        for name in kernels.PART_NAMES:
            part = kernels_parts.items(name, quick, False)
            assert part, name
            keys += [(name, item.key) for item in part]
            for item in part:
                before = len(launches)
                if kernels_parts.warms(item):
                    with kernels_parts.compiling_only():
                        kernels_parts.warm(item, H200)
                    assert len(launches) > before, item.key
        assert len(set(keys)) == len(keys)
        timed = {key for name, key in keys if name not in kernels.CHECKS}
        assert {"qwen3-30b decode 64 x 8k", "route deepseek-v3 T128", "deepseek-v3 fp8_block EP8 T8192"} <= timed
        assert {f"qwen3-30b dense EP1 T{n}" for n in (1, 8, 32, 4096, 8192)} <= timed
    assert all(warmup for _, warmup in launches)


def test_part_names_agree():
    assert set(kernels_parts.SECONDS) == set(kernels.PART_NAMES)
    assert sum(full for full, _ in kernels_parts.SECONDS.values()) <= 520


@pytest.mark.parametrize("bytes_each", [1e3, 8e6, 76e6, 1.2e9])
def test_enough_weights_rotate(bytes_each):
    assert kernels_work.replicas(bytes_each) >= 4
    for number in (kernels_work.replicas(bytes_each), kernels_work.copies(bytes_each)):
        assert number == kernels_work.MAX_REPLICAS or number * bytes_each >= 256e6


def draw_on_cpu(key="key", dtype=torch.float32):
    return Draw.of("cpu", H200, dtype, 1, key)


@pytest.mark.parametrize("ep", [1, 4])
def test_routing(ep):
    """Rows of the rank's experts in their order, each with a slot of its own, in the order of tokens; another one every time."""
    model = Model(name="tiny", num_experts=16, top_k=3, D=8, F=8)
    draw = draw_on_cpu()
    one, two = (kernels_experts.route(draw, model, ep, 10) for _ in range(2))
    assert not torch.equal(one.ids_TK, two.ids_TK)
    assert one.planned == 30
    local = one.ids_TK[(one.ids_TK < 16 // ep).any(1)]
    assert one.num_tokens == len(local)
    assert one.counts == [int((local == e).sum()) for e in range(16 // ep)]
    assert sorted(one.home_R.tolist()) == list(range(sum(one.counts)))
    experts_R = torch.repeat_interleave(torch.arange(16 // ep), torch.tensor(one.counts))
    assert (local[one.row_index_R.long()] == experts_R[:, None]).any(1).all()
    assert one.row_index_R[one.home_R.argsort()].tolist() == sorted(one.row_index_R.tolist())


def test_an_items_numbers_are_its_own():
    a, b, other = (draw_on_cpu(key).normal(5) for key in ("one", "one", "two"))
    assert torch.equal(a, b)
    assert not torch.equal(a, other)


@pytest.mark.parametrize("format", ["dense", "fp8_block", "fp8_row", "int4", "mxfp4", "nvfp4"])
def test_random_weights_have_the_shapes_of_their_format(format):
    draw = draw_on_cpu(dtype=torch.bfloat16)
    found, shape = (
        kernels_experts.random_weights(draw, format, 2, 32, 256),
        kernels_experts.formats.meta(format, 2, 32, 256),
    )
    assert found.shape == (2, 32, 256)
    assert (found.data.dtype, found.data.shape) == (shape.data.dtype, shape.data.shape)
    assert (found.scales is None) == (shape.scales is None)
    assert shape.scales is None or (found.scales.dtype, found.scales.shape) == (shape.scales.dtype, shape.scales.shape)
    assert found.data.view(torch.uint8).float().std() > 1


@pytest.mark.parametrize("peer", [kernels_experts.grouped_mm, kernels_experts.matmul_loop])
def test_peers_compute_the_experts(peer):
    draw, model = draw_on_cpu(), Model(name="tiny", num_experts=4, top_k=2, D=16, F=32)
    routed = kernels_experts.route(draw, model, 1, 9)
    w13, w2 = draw.normal(4, 64, 16, scale=0.25), draw.normal(4, 16, 32, scale=0.2)
    packed = [ExpertWeights(format="dense", data=data) for data in (w13, w2)]
    layer = kernels_experts.Layer(w13=packed[0], w2=packed[1], activation=Activation())
    x = draw.normal(9, 16)
    hidden = experts.w13_reference(x, routed.row_index_R, routed.offsets, w13, Activation())
    identity = torch.arange(18)
    expected = experts.w2_reference(hidden, routed.offsets, w2, identity, torch.empty(18, 16))
    torch.testing.assert_close(peer(layer, routed, x)(), expected, rtol=1e-4, atol=1e-5)


def test_transformers_computes_the_experts():
    pytest.importorskip("transformers")
    draw, model = draw_on_cpu(), Model(name="tiny", num_experts=4, top_k=2, D=16, F=32)
    routed = kernels_experts.route(draw, model, 1, 9)
    w13, w2, x = draw.normal(4, 64, 16, scale=0.25), draw.normal(4, 16, 32, scale=0.2), draw.normal(9, 16)
    packed = [ExpertWeights(format="dense", data=data) for data in (w13, w2)]
    layer = kernels_experts.Layer(w13=packed[0], w2=packed[1], activation=Activation())
    module = kernels_experts.transformers_layer()(model, layer)
    found = kernels_experts.transformers_call(module, routed, x)()
    expected = torch.zeros(9, 16)
    for t, ids in enumerate(routed.ids_TK.tolist()):
        for e in ids:
            gate, up = (w13[e] @ x[t]).chunk(2)
            expected[t] += w2[e] @ (F.silu(gate) * up) / 2
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_block_tables_name_every_block_once():
    seqs, blocks = kernels_attention.sequences(draw_on_cpu(), [(1, 17), (1, 16), (5, 40)])
    assert seqs.num_single == 2
    assert seqs.cu_queries.tolist() == [0, 1, 2, 7]
    used = [seqs.block_table[b, : -(-length // 16)].tolist() for b, length in enumerate((17, 16, 40))]
    assert sorted(chain.from_iterable(used)) == list(range(1, blocks))


# Times, checks and bits as results.


def test_a_peers_failure_is_its_result_ours_is_not(monkeypatch):
    def median_us(calls):
        return {"median": calls[0]()}

    def fail():
        raise RuntimeError("not on this device\nat all")

    monkeypatch.setattr(kernels_work, "median_us", median_us)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    cost = Cost(bytes=8, flops=4)
    work = Work(
        calls={"ours": [lambda: 3.0], "peer": [fail]}, cost=cost, peers=frozenset({"peer"}), facts={"tokens": 1}
    )
    result = kernels_work.run_item(Timed("a", lambda _: work), draw_on_cpu())
    assert result["us"] == {"ours": {"median": 3.0}, "peer": {"error": "RuntimeError: not on this device"}}
    assert (result["bytes"], result["flops"], result["tokens"], result["peers"]) == (8, 4, 1, ["peer"])
    with pytest.raises(RuntimeError, match="not on this device"):
        kernels_work.run_item(Timed("a", lambda _: Work(calls={"ours": [fail]}, cost=cost)), draw_on_cpu())


@pytest.mark.parametrize(("found", "ok"), [(0.1, True), (0.3, False), (float("nan"), False), (float("inf"), False)])
def test_findings(found, ok):
    result = kernels_work.run_item(Check("a", lambda _: {"x": (found, 0.2)}), draw_on_cpu())
    assert result["ok"] is ok
    json.dumps(result, allow_nan=False)


def test_equal_bits():
    one, nan = torch.tensor([1.0, 0.0]), torch.tensor([1.0, float("nan")])
    ways = {"a": one, "b": one.clone(), "sign": torch.tensor([1.0, -0.0]), "nan": nan, "nan too": nan.clone()}
    result = kernels_work.run_item(Bits("a", lambda _: {"rows": ways}), draw_on_cpu())
    assert result["classes"] == {"rows": [["a", "b"], ["sign"], ["nan"], ["nan too"]]}
    assert not result["ok"]


def test_replays():
    assert [kernels_work.num_replays(ms) for ms in (1e-9, 1.0, 100.0)] == [50, 25, 5]


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


def run_parts(results, items, device="cpu", seconds=1e9, deadline=float("inf")):
    kernels_parts.run_part(results, "bits", items, H200, torch.float32, device, seconds, deadline)


def counted(key, calls, error=None):
    def run(draw):
        calls.append(key)
        if error:
            raise error
        return {"x": (0.0, 0.0)}

    return Check(key, run)


def test_what_is_there_is_not_run_again(results):
    calls = []
    items = [counted("a", calls), counted("b", calls, RuntimeError("out of luck")), counted("c", calls)]
    run_parts(results, items)
    run_parts(results, items)
    assert calls == ["a", "b", "c"]
    assert results.find("b")["error"] == "RuntimeError: out of luck"
    results.forget_failures()
    run_parts(results, items)
    assert calls == ["a", "b", "c", "b"]


def test_a_part_ends_with_its_time(results, monkeypatch):
    monkeypatch.setattr(kernels_parts, "_settle", lambda: True)
    calls = []
    items = [Check(key, lambda _: time.sleep(0.02) or {"x": (0.0, 0.0)}) for key in "ab"] + [counted("c", calls)]
    monkeypatch.setattr(Draw, "of", lambda *_: None)
    run_parts(results, items, "cuda", seconds=0.03)
    assert [key for _, key, _ in results.items()] == ["a", "b"]
    run_parts(results, items, "cuda", deadline=time.time() - 1)
    assert calls == []


def test_a_broken_device_ends_the_process_with_its_item_failed(results, monkeypatch):
    monkeypatch.setattr(kernels_parts, "_settle", lambda: False)
    monkeypatch.setattr(Draw, "of", lambda *_: None)
    with pytest.raises(SystemExit) as ended:
        run_parts(results, [counted("a", [], RuntimeError("illegal access")), counted("b", [])], "cuda")
    assert ended.value.code == 3
    assert [(key, item.get("error")) for _, key, item in results.items()] == [("a", "RuntimeError: illegal access")]


def test_missing_items_are_listed(results):
    every = [item.key for item in kernels_parts.items("routing", True, False)]
    assert kernels_parts.missing(results, ["routing"], True, False) == {"routing": every}
    results.finish("routing", every[0], {})
    assert kernels_parts.missing(results, ["routing"], True, False) == {"routing": every[1:]}


def test_a_new_process_goes_on_behind_an_item_that_ended_one(tmp_path, results, monkeypatch, capsys):
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
    assert Results.read(tmp_path).part("bits")["running"] is None


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
    """Here, without a GPU, every one of them fails, and says so."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    tasks = kernels_parts.to_compile(results, ["routing", "sampling"], True)
    assert tasks[:3] == [("routing", 0), ("sampling", 0), ("routing", 1)]
    failures, done = kernels_parts.compile_all(tasks[:2], True, 1, time.time() + 60)
    assert (len(failures), done) == (2, 2)
    results.finish("routing", kernels_parts.items("routing", True, False)[0].key, {})
    assert ("routing", 0) not in kernels_parts.to_compile(results, ["routing"], True)


# Options.


def test_names_of_parts():
    assert kernels.part_names(None, "cuda") == list(kernels.PART_NAMES)
    assert kernels.part_names("bits, attention", "cuda") == ["attention", "bits"]
    assert kernels.part_names(None, "cpu") == [name for name in kernels.PART_NAMES if name in kernels.CHECKS]
    with pytest.raises(ValueError, match=r"unknown 'gemm'; allowed are experts-qwen3, .*, experts-more"):
        kernels.part_names("bits,gemm", "cuda")
    with pytest.raises(ValueError, match="cpu times nothing, so not attention"):
        kernels.part_names("bits,attention", "cpu")


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


def timed(us, *, bytes=4.3e9, flops=7.9e9, rate="bf16", peers=(), **facts):
    times = {name: {"median": time, "fastest": time, "slowest": time} for name, time in us.items()}
    return {"us": times, "bytes": bytes, "flops": flops, "rate": rate, "peers": list(peers), **facts}


@pytest.fixture
def measured(results):
    """Made-up figures for everything: memory bounds each item, and ours takes twice its floor, 1000 us."""
    results.data["ceilings"] = {"bytes_per_s": 4.3e12, "bf16": 790e12, "fp8": 1580e12}
    results.data["environment"] = {"gpu": "a GPU", "versions": {"torch": "2"}, "device": "cuda"}
    results.data["compiled"] = {"items": 3, "of": 3, "seconds": 4, "processes": 5, "failures": []}
    for name in kernels.PART_NAMES:
        for item in kernels_parts.items(name, False, False):
            if isinstance(item, Check):
                result = {"findings": {"out": [1e-3, 1e-2]}, "ok": True}
            elif isinstance(item, Bits):
                result = {"classes": {"rows": [["a", "b"], ["c"]]}, "ok": False}
            else:
                tokens = int(item.key.rpartition(" T")[2]) if name.startswith("experts-") else None
                facts = {"model": "m"} | ({} if tokens is None else {"tokens": tokens})
                us = {
                    "ours": 2000.0,
                    "ours, fast": 1000.0,
                    "w13": 800.0,
                    "w2": 400.0,
                    "grouped_mm": 3000.0,
                    "slow": 4000.0,
                }
                result = timed(us, peers=["grouped_mm", "slow"], **facts)
            results.part(name)["items"][item.key] = result
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
    key = kernels_parts.items("check-experts", False, False)[0].key
    measured.finish("check-experts", key, {"findings": {"w13": [None, 0.01], "w2": [0.5, 0.01]}, "ok": False})
    measured.finish("latent", "deepseek-v3 latent prefill 2k", {"error": "RuntimeError: no"})
    measured.data["not_reached"] = {"around": ["norm", "combine"]}
    text = kernels_tables.short_table(measured)
    assert len(text) < 12_000
    assert f"WRONG {key}: w13 not a number > 0.01, w2 0.5 > 0.01" in text
    assert "deepseek-v3 latent prefill 2k: RuntimeError: no" in text
    assert "not reached in time: around: 2 items, from 'norm' on" in text
    assert "a, b | c" in text
    assert "50% 1.50x" in text
    lines = text.splitlines()
    assert lines[-1].startswith("engine decode")
    assert lines[-2].startswith("routing and metadata")
    long = kernels_tables.long_table(measured)
    assert long.endswith(text)
    assert all(item.key in long for name in kernels.PART_NAMES for item in kernels_parts.items(name, False, False))


def test_the_report_is_written(tmp_path, measured, capsys):
    kernels.write_report(tmp_path, measured, list(kernels.PART_NAMES))
    written = Results.read(tmp_path).data
    assert written["not_reached"] == {}
    assert len(written["bars"]) == len(bars(measured))
    assert written["figures"]["route deepseek-v3 T128"]["ours"]["us"] == 2000.0
    assert (tmp_path / "report.txt").read_text().endswith(capsys.readouterr().out)
    assert (tmp_path / "roofline.svg").exists()


def test_the_plot(measured):
    series = kernels_plot.points(measured, CEILINGS)
    assert len(series["qwen3-30b dense EP1"]) == 14
    root = ElementTree.fromstring(kernels_plot.roofline_svg(series, CEILINGS, "a < b"))
    circles = root.findall(".//{http://www.w3.org/2000/svg}circle")
    assert len(circles) == sum(map(len, series.values())) + len(series)
    assert all(0 < float(c.get("cx")) < 1100 and 0 < float(c.get("cy")) < 700 for c in circles)


def test_the_plot_as_png(tmp_path, measured):
    pytest.importorskip("matplotlib")
    series = kernels_plot.points(measured, CEILINGS)
    assert kernels_plot.save_png(tmp_path / "a.png", series, CEILINGS, "t")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_faster_points_lie_higher():
    points = [kernels_plot.Point(1.0, 1e12, "slow"), kernels_plot.Point(1.0, 2e12, "fast")]
    root = ElementTree.fromstring(kernels_plot.roofline_svg({"a": points}, CEILINGS, "t"))
    slow, fast = root.findall(".//{http://www.w3.org/2000/svg}circle")[:2]
    assert slow.get("cx") == fast.get("cx")
    assert float(fast.get("cy")) < float(slow.get("cy"))


# The command.


def test_the_command_in_the_interpreter(tmp_path):
    """With nothing but torch, Triton and numpy."""
    code = (
        "import sys\n"
        "for name in ('ray', 'grpc', 'numba', 'transformers', 'matplotlib', 'psutil', 'google.protobuf'):\n"
        "    sys.modules[name] = None\n"
        "from expertwire.bench.__main__ import main\n"
        f"sys.exit(main(['kernels', '--device', 'cpu', '--only', 'check-experts,check-attention', '--out', {str(tmp_path)!r}]))"
    )
    environment = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "10 of 10 checks passed" in done.stdout
    data = json.loads((tmp_path / "kernels.json").read_text())
    assert "ceilings" not in data
    assert data["parts"]["check-attention"]["items"]["latent mixed"]["ok"]


def test_other_benchmarks_are_those_of_the_command_line():
    done = subprocess.run(
        [sys.executable, "-m", "expertwire.bench", "control", "--help"], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0
    assert "--channels" in done.stdout
