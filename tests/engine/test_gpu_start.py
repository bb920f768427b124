"""An engine on GPUs starts and gives its first tokens, over strict fakes of what torch, NCCL and Ray promise. What is computed is
computed by the CPU's ops; `tests/kernels_interpreted/test_gpu_start.py` starts one rank with the GPU's kernels."""

import functools
import tempfile

import pytest
import torch
from helpers import tiny_checkpoints
from helpers.fake_cuda import FakeCuda
from helpers.gpu_ranks import install, serve
from helpers.slow import slow_but

from expertwire.comm.all_to_all import backends, nvlink_gpu
from expertwire.comm.all_to_all.nvlink import NvlinkAllToAll
from expertwire.comm.control.channel import RankError
from expertwire.deploy.ray.placement import ordinal
from expertwire.engine import worker
from expertwire.engine.config.engine_config import EngineConfig
from expertwire.engine.loader import rank_model, weights
from expertwire.kernels import registry


@pytest.fixture
def node(monkeypatch):
    """One node of eight GPUs."""
    memory = install(monkeypatch, FakeCuda(8))
    monkeypatch.setattr(rank_model.kernels, "choose", lambda device, **options: registry.plain())
    monkeypatch.setattr(
        nvlink_gpu, "NvlinkGpuAllToAll", lambda spec, memories, num_programs: NvlinkAllToAll(spec, memories)
    )
    monkeypatch.setattr(backends.topology_probe, "load_nvml", no_nvml)
    return memory


def no_nvml():
    raise ValueError("NVML is not on this machine")


@functools.cache
def prompt(folder):
    return tuple(tiny_checkpoints.safe_prompt(folder, 5, seed=1))


def config(folder, ep_size, **options):
    return EngineConfig(
        model=str(folder),
        dtype="float32",
        device="cuda",
        ep_size=ep_size,
        max_num_batched_tokens=16,
        max_num_seqs=4,
        kv_cache_memory_bytes=1 << 20,
        threads_per_rank=1,
        enable_prefix_caching=False,
        step_timeout_s=100,
        **options,
    )


# Devices of the ranks, as the launchers find them: rank by rank, or as Ray has assigned them, maybe by UUID.
UUIDS = [f"GPU-{i}" for i in range(8)]
LOCAL = list(range(8))
RAY = [ordinal([gpu], None) for gpu in (3, 0, 1, 2, 7, 6, 5, 4)]
MASKED = [ordinal([uuid], ",".join(UUIDS)) for uuid in UUIDS]


@pytest.mark.parametrize("gpus", slow_but([LOCAL], [LOCAL, RAY, MASKED]), ids=["local", "ray", "ray, by UUID"])
def test_eight_ranks_of_a_node_reach_their_first_token(node, gpus):
    folder = tiny_checkpoints.cached("qwen3_moe", num_hidden_layers=2)
    served = serve(config(folder, 8), gpus, [prompt(folder)] * 8, node)
    assert not served.errors, served.errors[0]
    assert served.info.device == "cuda"
    assert served.info.all_to_all.startswith("nvlink: all 8 ranks are in one NVLink domain")
    assert len(served.tokens) == 8
    assert len(set(served.tokens)) == 1, f"equal prompts, other tokens on other ranks: {served.tokens}"


def test_nccl_outlasts_the_controllers_patience(node, monkeypatch):
    """Its watchdog ends the process of a rank that waits, which the controller would take for the one that is late."""
    timeouts, make_group = [], worker.groups.make_group

    def note(**options):
        timeouts.append(options["timeout_s"])
        return make_group(**options)

    monkeypatch.setattr(worker.groups, "make_group", note)
    folder = tiny_checkpoints.cached("qwen3_moe", num_hidden_layers=2)
    options = config(folder, 2)
    served = serve(options, [0, 1], [prompt(folder)], node)
    assert not served.errors, served.errors[0]
    assert min(timeouts) > max(options.start_timeout_s, options.step_timeout_s)


def test_one_rank_reaches_its_first_token(node):
    folder = tiny_checkpoints.cached("qwen3_moe", num_hidden_layers=2)
    served = serve(config(folder, 1), [0], [prompt(folder)], node)
    assert not served.errors, served.errors[0]
    assert (served.info.device, served.info.all_to_all) == ("cuda", "")


def test_a_node_with_fewer_gpus_than_ranks_is_refused(monkeypatch):
    FakeCuda(8).install(monkeypatch)
    options = config("model", 9)
    assert worker.choose_device(options, 7) == "cuda:7"
    assert torch.cuda.current_device() == 7
    with pytest.raises(
        ValueError, match=r"ep_size 9 needs a GPU for each rank.*this node has 8.*at most 8 on one node"
    ):
        worker.choose_device(options, 8)


def test_a_traceback_is_kept_whole_and_named(node, monkeypatch, tmp_path):
    """In a file of the rank's node; the error is one line. A mistake of the user's has none."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(rank_model, "load_model", broken)
    folder = tiny_checkpoints.cached("qwen3_moe", num_hidden_layers=2)
    with pytest.raises(RankError) as failed:
        serve(config(folder, 1), [0], [prompt(folder)], node)
    [log] = tmp_path.glob("expertwire-rank*")
    assert str(failed.value).endswith(
        f"RuntimeError: CUDA error: an illegal thing happened (traceback in {log} on node)"
    )
    assert "\n" not in str(failed.value)
    text = log.read_text()
    assert text.startswith("Traceback")
    assert "in broken" in text
    assert text.rstrip().endswith("happened")
    monkeypatch.setattr(rank_model, "load_model", lambda *args, **kwargs: weights.check_memory(1 << 60, "cuda:0"))
    with pytest.raises(RankError, match=r"the weights need .* but only"):
        serve(config(folder, 1), [0], [prompt(folder)], node)
    assert [*tmp_path.glob("expertwire-rank*")] == [log]


def broken(*args, **kwargs):
    raise RuntimeError("CUDA error: an illegal thing\nhappened")
