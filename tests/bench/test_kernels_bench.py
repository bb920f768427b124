"""`bench kernels` without a GPU: floors, shapes, suites, tables, and one run in the interpreter."""

import json
import subprocess
import sys
from contextlib import contextmanager
from itertools import chain

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from triton.runtime.jit import JITFunction

from expertwire.bench.kernels import attention as kernels_attention
from expertwire.bench.kernels import experts as kernels_experts
from expertwire.bench.kernels import measure as kernels_measure
from expertwire.bench.kernels import models
from expertwire.bench.kernels import run as kernels
from expertwire.bench.kernels import suites as kernels_suites
from expertwire.bench.kernels.measure import Bits, Check, TensorRng, Timed, TimedCalls
from expertwire.bench.kernels.models import DEEPSEEK, GPT_OSS, KIMI, MIXTRAL, QWEN3, Ceilings, Cost, Model
from expertwire.kernels.gpu.device import H200
from expertwire.kernels.gpu.formats import ExpertWeights
from expertwire.kernels.ops import experts
from expertwire.kernels.ops.experts import Activation

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
    cost = models.experts_cost(model, format, num_tokens)
    found = models.floor_us(cost, CEILINGS)
    assert found == (pytest.approx(us, rel=6e-3), bound)


def test_touched_experts():
    for num_experts, expected in (
        (128, [8, 15.5, 29, 52, 82, 112, 126, 128]),
        (256, [8, 16, 30, 57, 102, 163, 222, 252]),
    ):
        found = [models.touched(num_experts, 8, 2**i) for i in range(8)]
        assert found == pytest.approx(expected, abs=0.6)


def test_costs_of_attention():
    shape = {"heads": 32, "kv_heads": 4, "dim": 128}
    decode = models.attention_cost([8192] * 64, [1] * 64, **shape)
    assert decode.flops == 64 * 8192 * 32 * 128 * 4
    assert decode.bytes == 64 * (8192 * 2 * 4 * 128 * 2 + 2 * 32 * 128 * 2)
    by_hand = sum(min(position + 1, 5) for position in range(7, 10))
    window = models.attention_cost([10], [3], **shape, window=5)
    assert window.flops == by_hand * 32 * 128 * 4
    assert models.attention_cost([6], [6], **shape).flops == 21 * 32 * 128 * 4
    latent = models.latent_cost([1000], [1], heads=128, rank=512, rotated=64)
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
        for name in kernels.SUITE_NAMES:
            part = kernels_suites.items(name, quick, False)
            assert part, name
            keys += [(name, item.key) for item in part]
            for item in part:
                before = len(launches)
                if kernels_suites.warms(item):
                    with kernels_suites.compiling_only():
                        kernels_suites.warm(item, H200)
                    assert len(launches) > before, item.key
        assert len(set(keys)) == len(keys)
        timed = {key for name, key in keys if name not in kernels.CHECKS}
        assert {"qwen3-30b decode 64 x 8k", "route deepseek-v3 T128", "deepseek-v3 fp8_block EP8 T8192"} <= timed
        assert {f"qwen3-30b dense EP1 T{n}" for n in (1, 8, 32, 4096, 8192)} <= timed
    assert all(warmup for _, warmup in launches)


def test_suite_names_agree():
    assert set(kernels_suites.SECONDS) == set(kernels.SUITE_NAMES)
    assert sum(full for full, _ in kernels_suites.SECONDS.values()) <= 520


@pytest.mark.parametrize("bytes_each", [1e3, 8e6, 76e6, 1.2e9])
def test_enough_weights_rotate(bytes_each):
    assert kernels_measure.replicas(bytes_each) >= 4
    for number in (kernels_measure.replicas(bytes_each), kernels_measure.copies(bytes_each)):
        assert number == kernels_measure.MAX_REPLICAS or number * bytes_each >= 256e6


def draw_on_cpu(key="key", dtype=torch.float32):
    return TensorRng.of("cpu", H200, dtype, 1, key)


@pytest.mark.parametrize("ep", [1, 4])
def test_routing(ep):
    """Check that rows come in the order of experts, slots in the order of tokens, and every routing differs."""
    model = Model(name="tiny", num_experts=16, top_k=3, D=8, F=8)
    rng = draw_on_cpu()
    one, two = (kernels_experts.route(rng, model, ep, 10) for _ in range(2))
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
    rng = draw_on_cpu(dtype=torch.bfloat16)
    found, shape = (
        kernels_experts.random_weights(rng, format, 2, 32, 256),
        kernels_experts.reference_formats.meta_weights(format, 2, 32, 256),
    )
    assert found.shape == (2, 32, 256)
    assert (found.data.dtype, found.data.shape) == (shape.data.dtype, shape.data.shape)
    assert (found.scales is None) == (shape.scales is None)
    assert shape.scales is None or (found.scales.dtype, found.scales.shape) == (shape.scales.dtype, shape.scales.shape)
    assert found.data.view(torch.uint8).float().std() > 1


@pytest.mark.parametrize("peer", [kernels_experts.grouped_mm, kernels_experts.matmul_loop])
def test_peers_compute_the_experts(peer):
    rng, model = draw_on_cpu(), Model(name="tiny", num_experts=4, top_k=2, D=16, F=32)
    routed = kernels_experts.route(rng, model, 1, 9)
    w13, w2 = rng.normal(4, 64, 16, scale=0.25), rng.normal(4, 16, 32, scale=0.2)
    packed = [ExpertWeights(format="dense", data=data) for data in (w13, w2)]
    layer = kernels_experts.Layer(w13=packed[0], w2=packed[1], activation=Activation())
    x = rng.normal(9, 16)
    hidden = experts.w13_reference(x, routed.row_index_R, routed.offsets, w13, Activation())
    identity = torch.arange(18)
    expected = experts.w2_reference(hidden, routed.offsets, w2, identity, torch.empty(18, 16))
    torch.testing.assert_close(peer(layer, routed, x)(), expected, rtol=1e-4, atol=1e-5)


def test_transformers_computes_the_experts():
    pytest.importorskip("transformers")
    rng, model = draw_on_cpu(), Model(name="tiny", num_experts=4, top_k=2, D=16, F=32)
    routed = kernels_experts.route(rng, model, 1, 9)
    w13, w2, x = rng.normal(4, 64, 16, scale=0.25), rng.normal(4, 16, 32, scale=0.2), rng.normal(9, 16)
    packed = [ExpertWeights(format="dense", data=data) for data in (w13, w2)]
    layer = kernels_experts.Layer(w13=packed[0], w2=packed[1], activation=Activation())
    module = kernels_experts.transformers_layer(model, layer)
    found = kernels_experts.transformers_call(module, routed, x)()
    expected = torch.zeros(9, 16)
    for t, ids in enumerate(routed.ids_TK.tolist()):
        for e in ids:
            gate, up = (w13[e] @ x[t]).chunk(2)
            expected[t] += w2[e] @ (F.silu(gate) * up) / 2
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_a_peer_that_cannot_be_made_does_not_fail_our_own_timing(monkeypatch):
    """Check that the error of a peer whose interface has changed is reported."""

    def changed(*_):
        raise AttributeError("there is no gate_up_proj any more")

    monkeypatch.setattr(kernels_experts, "transformers_layer", changed)
    monkeypatch.setattr(kernels_experts, "as_rows", lambda *_: None)  # which launches a kernel
    model = Model(name="tiny", num_experts=4, top_k=2, D=16, F=32)
    work = kernels_experts.layer_work(draw_on_cpu(), model, "dense", 1, 3, quick=False)
    assert "ours" in work.calls
    assert "transformers" not in work.calls
    assert "no gate_up_proj" in work.labels["not compared"]


def test_block_tables_name_every_block_once():
    seqs, blocks = kernels_attention.sequences(draw_on_cpu(), [(1, 17), (1, 16), (5, 40)])
    assert seqs.max_decodes == 2
    assert seqs.cu_seqlens_q.tolist() == [0, 1, 2, 7]
    used = [seqs.block_table[b, : -(-length // 16)].tolist() for b, length in enumerate((17, 16, 40))]
    assert sorted(chain.from_iterable(used)) == list(range(1, blocks))


# Times, checks and bits as results.


def test_a_peers_failure_is_its_result_ours_is_not(monkeypatch):
    def median_us(calls):
        return {"median": calls[0]()}

    def fail():
        raise RuntimeError("not on this device\nat all")

    monkeypatch.setattr(kernels_measure, "median_us", median_us)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    cost = Cost(bytes=8, flops=4)
    work = TimedCalls(
        calls={"ours": [lambda: 3.0], "peer": [fail]}, cost=cost, peers=frozenset({"peer"}), labels={"tokens": 1}
    )
    result = kernels_measure.run_item(Timed("a", lambda _: work), draw_on_cpu())
    assert result["us"] == {"ours": {"median": 3.0}, "peer": {"error": "RuntimeError: not on this device"}}
    assert (result["bytes"], result["flops"], result["tokens"], result["peers"]) == (8, 4, 1, ["peer"])
    with pytest.raises(RuntimeError, match="not on this device"):
        kernels_measure.run_item(Timed("a", lambda _: TimedCalls(calls={"ours": [fail]}, cost=cost)), draw_on_cpu())


@pytest.mark.parametrize(("found", "ok"), [(0.1, True), (0.3, False), (float("nan"), False), (float("inf"), False)])
def test_findings(found, ok):
    result = kernels_measure.run_item(Check("a", lambda _: {"x": (found, 0.2)}), draw_on_cpu())
    assert result["ok"] is ok
    json.dumps(result, allow_nan=False)


def test_equal_bits():
    one, nan = torch.tensor([1.0, 0.0]), torch.tensor([1.0, float("nan")])
    ways = {"a": one, "b": one.clone(), "sign": torch.tensor([1.0, -0.0]), "nan": nan, "nan too": nan.clone()}
    result = kernels_measure.run_item(Bits("a", lambda _: {"rows": ways}), draw_on_cpu())
    assert result["classes"] == {"rows": [["a", "b"], ["sign"], ["nan"], ["nan too"]]}
    assert not result["ok"]


class FakeCuda:
    """Streams, events and graphs on a clock that the calls advance; a graph's calls run when it is replayed."""

    def __init__(self, monkeypatch):
        self.now_ms, self.recording = 0.0, None
        names = {
            "Stream": Whatever,
            "current_stream": Whatever,
            "stream": lambda _: Whatever(),
            "synchronize": lambda: None,
        }
        for name, value in {**names, "Event": self.event, "CUDAGraph": Graph, "graph": self.capture}.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def call(self, ms):
        def run():
            if self.recording is None:
                self.now_ms += ms
            else:
                self.recording.calls.append(run)

        return run

    def event(self, enable_timing):
        event = Whatever()
        event.record = lambda: setattr(event, "at", self.now_ms)
        event.elapsed_time = lambda other: other.at - event.at
        return event

    @contextmanager
    def capture(self, graph):
        self.recording = graph
        yield
        self.recording = None


class Graph:
    def __init__(self):
        self.calls = []

    def replay(self):
        for call in self.calls:
            call()


class Whatever:
    def wait_stream(self, other):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def test_times_are_of_one_call_in_a_graph(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    found = kernels_measure.median_us([cuda.call(ms) for ms in (1.0, 2.0, 3.0)])
    assert found["median"] == found["slowest"] == pytest.approx(2000)
    assert (found["replays"], found["replicas"]) == (5, 3)


def test_replays():
    assert [kernels_measure.num_replays(ms) for ms in (1e-9, 1.0, 100.0)] == [50, 25, 5]


# The command.


@pytest.mark.slow
def test_the_command_in_the_interpreter(tmp_path):
    """Run with nothing but torch, Triton and numpy."""
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
    number = sum(len(kernels_suites.items(name, False, True)) for name in ("check-experts", "check-attention"))
    assert f"{number} of {number} checks passed" in done.stdout
    data = json.loads((tmp_path / "kernels.json").read_text())
    assert "ceilings" not in data
    assert data["suites"]["check-attention"]["items"]["latent mixed"]["ok"]


def test_other_benchmarks_are_those_of_the_command_line():
    done = subprocess.run(
        [sys.executable, "-m", "expertwire.bench", "control", "--help"], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0
    assert "--channels" in done.stdout
