"""The order of the controller's steps while an engine starts, and the memory that caches get."""

import json
import re
import socket
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.fake_cuda import FakeCuda

from expertwire.comm.control.channel import RankTimeout
from expertwire.engine import controller, worker
from expertwire.engine.config.engine_config import EngineConfig
from expertwire.engine.kv_cache import memory_plan
from expertwire.engine.kv_cache.memory_plan import Measured, MemoryPlan
from expertwire.engine.startup import ControllerArgs, start_ranks
from expertwire.scheduler.config import CacheSpec

GB = 10**9


class FakeHub:
    """Writes down what is done, and answers as ranks that have loaded; after `rounds` nobody answers."""

    address = "tcp:here"

    def __init__(self, done, num_ranks=2, rounds=9, cache_bytes=(1 << 20, 3 << 20)):
        self._done, self._num_ranks, self._rounds, self._cache_bytes = done, num_ranks, rounds, cache_bytes

    def wait_joined(self, timeout_s, watch):
        self._done.append("joined")

    def publish(self, arrays):
        self._done.append(" ".join(sorted(arrays)) or "nothing")

    def collect(self, timeout_s):
        self._done.append("collect")
        if self._done.count("collect") > self._rounds:
            raise RankTimeout([0], timeout_s)
        text = lambda words: np.frombuffer(words.encode(), np.uint8)  # noqa: E731
        return [
            {
                "node": text("a"),
                "store": text("s:1"),
                "device": text("cuda"),
                "all_to_all": text(""),
                "place": np.zeros(0, np.int64),
                "cache_bytes": np.array([nbytes]),
            }
            for nbytes in self._cache_bytes
        ]

    def close(self):
        pass


MODEL = SimpleNamespace(
    architecture="A", dtype="bfloat16", kv_cache_dtype="auto", vocab_size=9,
    eos_token_ids=(), num_layers=1, num_experts=0, top_k=0, num_labels=0,
    cache_specs=lambda: (SPEC,),
)  # fmt: skip
SPEC = CacheSpec(name="full", kind="full", bytes_per_token=64, writers=(0,), readers=(0,))


def args(**options):
    config = EngineConfig(model="m", ep_size=2, **options)
    return ControllerArgs(config=config, model=MODEL, max_model_len=1024, hub_address="", token="t")


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("", r"cannot listen on unix:.*/hub: .* \(in its folder, of TMPDIR, \d+ bytes and \d+ files are free\)"),
        ("x" * 100, "a unix socket's path has at most 107 bytes"),
    ],
)
def test_a_folder_without_room_for_the_controllers_socket_is_named(tmp_path, capsys, folder, message):
    (tmp_path / folder).mkdir(exist_ok=True)
    place = tmp_path / folder / "hub"
    if not folder:
        place.mkdir()  # something that cannot be bound, as on a full file system
    args = SimpleNamespace(config=EngineConfig(model="m", ep_size=2), hub_address=f"unix:{place}", token="t")
    ours, theirs = socket.socketpair()
    with ours:
        controller.controller_main(args, theirs.detach())
    failed = json.loads(capsys.readouterr().out)["failed"]
    assert failed["rank"] == -1
    assert re.search(message, failed["message"])


def test_compiled_loops_are_warmed_up_while_the_ranks_start(monkeypatch, capsys):
    """Ranks wait for the controller three times before they compile what they run: it must not wait for its own compiler then."""
    done = []

    def compile_():
        deadline = time.monotonic() + 30
        while done.count("collect") < 4:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        done.append("warm up")
        raise OSError("compiled last")

    monkeypatch.setattr(controller, "ControlHub", lambda *args, **kwargs: FakeHub(done))
    monkeypatch.setattr(controller, "warm_up", compile_)
    ours, theirs = socket.socketpair()
    with ours, pytest.raises(OSError, match="compiled last"):
        controller.controller_main(args(), theirs.detach())
    assert done[-1] == "warm up"


def test_ranks_that_fail_are_reported_while_the_compiler_works(monkeypatch, capsys):
    reported = threading.Event()
    monkeypatch.setattr(controller, "ControlHub", lambda *args, **kwargs: FakeHub([], rounds=1))
    monkeypatch.setattr(controller, "warm_up", lambda: reported.wait(30))
    ours, theirs = socket.socketpair()
    with ours:
        controller.controller_main(args(), theirs.detach())
    reported.set()
    assert '"failed"' in capsys.readouterr().out


def test_ranks_that_load_for_too_long_name_the_option():
    with pytest.raises(RankTimeout, match=r"start_timeout_s is 7$"):
        start_ranks(args(start_timeout_s=7), FakeHub([], rounds=1))


def test_ranks_have_all_loaded_before_any_runs_its_largest_step():
    done = []
    info, _ = start_ranks(args(), FakeHub(done))
    assert done == [
        "joined", "nothing", "collect", "sharers store", "collect", "max_model_len", "collect",
        "eos_token_ids max_model_len num_blocks", "collect",
    ]  # fmt: skip
    assert info.cache_bytes["full"] <= (1 << 20) + 64 * 16, "the rank with least room decides"
    assert info.cache_bytes["full"] > (1 << 20) - 64 * 16


def test_the_step_is_larger_on_a_gpu_unless_it_was_asked_for():
    assert EngineConfig(model="m").on("cpu").step_tokens == 2048
    assert EngineConfig(model="m").on("cuda:3").step_tokens == 8192
    assert EngineConfig(model="m", max_num_batched_tokens=100).on("cuda").step_tokens == 100


# ---- memory of a GPU


DENSE = SimpleNamespace(sparse_layers=(False,))


def options(**values):
    return EngineConfig(model="m", max_num_seqs=1, max_num_batched_tokens=1, **values)


class Memory(FakeCuda):
    """A GPU on which a rank holds 60 GB: `take` is what a step takes besides."""

    def __init__(self):
        super().__init__(8, total_bytes=100 * GB, used_bytes=2 * GB)
        self.peak = 0

    def memory_allocated(self, device=None):
        return 60 * GB

    def memory_reserved(self, device=None):
        return 70 * GB  # kept from loading; free to be allocated

    def reset_peak_memory_stats(self, device=None):
        self.peak = self.memory_allocated()

    def max_memory_allocated(self, device=None):
        return self.peak

    def take(self, nbytes):
        self.peak = max(self.peak, self.memory_allocated() + nbytes)


def test_caches_get_what_the_largest_step_leaves(monkeypatch):
    """Each of 8 GPUs of a node is measured alone; memory that other processes use is not counted as ours."""
    gpu = Memory().install(monkeypatch)
    found = memory_plan.measured("cuda:0", lambda: gpu.take(GB), lambda: gpu.take(9 * GB))
    assert found == Measured(total=100 * GB, peak=69 * GB, largest_graph=GB, outside=2 * GB)
    config = options(ep_size=8)
    graphs = GB + 2 * (16 << 20)  # of one decode, and of a mixed step of as many tokens
    assert found.room(config, DENSE) == 90 * GB - 69 * GB - 2 * GB - graphs
    full = options(gpu_memory_utilization=1.0)
    assert found.room(full, DENSE) == 100 * GB - 69 * GB - 2 * GB - graphs


@pytest.mark.parametrize("sharers", [1, 8])
def test_a_ranks_caches_get_the_room_of_its_own_gpu_however_many_share_the_node(monkeypatch, sharers):
    gpu, released = Memory().install(monkeypatch), []
    runner = SimpleNamespace(
        run_largest_graph=lambda *sizes: gpu.take(GB),
        run_peak=lambda *sizes: gpu.take(9 * GB),
        settle=lambda: released.append("settle"),
    )
    monkeypatch.setattr(worker, "_model_runner", lambda *args: runner)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: released.append("cache"))
    context = SimpleNamespace(device="cuda:0", ops=SimpleNamespace(on_device=True))
    config = SimpleNamespace(sparse_layers=(False,), cache_specs=lambda: (SPEC,))
    model = SimpleNamespace(context=context, config=config, allocate=lambda **sizes: [])
    found = worker._available_bytes(options(ep_size=8), model, 1024, num_ranks=8, sharers=sharers)
    assert found == 90 * GB - 69 * GB - 2 * GB - (GB + 2 * (16 << 20))
    assert released == ["settle", "cache"]


def test_caches_that_cannot_be_had_are_refused_before_they_are_allocated():
    found = Measured(total=100 * GB, peak=69 * GB, largest_graph=GB, outside=2 * GB)
    with pytest.raises(
        ValueError, match=r"kv_cache_memory_bytes is 30000000000, but 17.97 GB are left.*utilization 0.9 of 100.00"
    ):
        found.room(options(kv_cache_memory_bytes=30 * GB), DENSE)
    with pytest.raises(ValueError, match=r"-42\.03 GB are left for caches.*a lower max_num_batched_tokens"):
        found.room(options(gpu_memory_utilization=0.3), DENSE)


def test_what_cannot_fit_is_refused_before_loading_with_a_table():
    plan = MemoryPlan(
        total=80 * GB, utilization=0.9, weights={"experts": 60 * GB, "attention": 10 * GB}, symmetric_buffers=GB, slots=0,
        activations=GB, graphs=GB,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"does not fit into gpu_memory_utilization 0\.9") as refused:
        memory_plan.check(plan)
    for line in ("weights: experts 60.00 GB", "all-to-all buffers 1.00 GB", "left for caches -2.07 GB"):
        assert line in " ".join(str(refused.value).split())
