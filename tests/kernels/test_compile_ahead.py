"""Compiling ahead: a program's launches are found without making them, and later found in the cache."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import tiny_checkpoints as tiny

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)

import triton

from expertwire.comm.all_to_all import symmetric_buffer
from expertwire.comm.all_to_all.nvlink_gpu import NvlinkGpuAllToAll
from expertwire.engine.config.engine_config import EngineConfig
from expertwire.engine.models.decoder import Decoder
from expertwire.engine.models.registry import read_model_config
from expertwire.engine.runner import precompile
from expertwire.kernels.gpu import compile_ahead, dispatch_low_latency, rms_norm, signals
from expertwire.kernels.gpu.compile_ahead import absent_gpu
from expertwire.kernels.gpu.device import H200

CONFIGS = Path(__file__).parents[2] / "bench" / "configs"


def norms(device="meta"):
    """Return two launches of one kernel for widths that are compiled separately, one of them twice."""
    for width in (64, 128, 64):
        x = torch.empty(3, width, dtype=torch.bfloat16, device=device)
        rms_norm.rms_norm(x, torch.empty(width, dtype=torch.bfloat16, device=device), 1e-6)


@pytest.fixture
def cache(tmp_path):
    """Give this process and its children an empty Triton cache."""
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path)
        yield tmp_path


def test_launches_are_noted_once_and_not_made(cache):
    launches = compile_ahead.recorded(norms, 90)
    assert [(launch.module, launch.kernel) for launch in launches] == [(rms_norm.__name__, "rms_norm_kernel")] * 2
    assert not list(cache.iterdir())  # nothing has been compiled


def test_what_is_compiled_ahead_is_found_in_the_cache(cache):
    """Check that this process, which has compiled nothing, asks for the same keys."""
    compile_ahead.compile_all(compile_ahead.recorded(norms, 90), 90, num_processes=2)
    hits = []

    def listen(*, cache_hit, **_):
        hits.append(cache_hit)

    kernel = rms_norm.rms_norm_kernel
    with absent_gpu(90), triton.knobs.compilation.scope():
        triton.knobs.compilation.listener = listen
        for launch in compile_ahead.recorded(norms, 90):
            kernel.preload(launch.specialization)
        kernel.device_caches.clear()
    assert hits == [True, True]


def test_a_kernel_that_does_not_compile_is_named():
    [launch, *_] = compile_ahead.recorded(norms, 90)
    broken = compile_ahead.Launch(launch.module, launch.kernel, launch.specialization.replace("rms_norm_kernel", "x"))
    with pytest.raises(RuntimeError, match=r"rms_norm\.rms_norm_kernel does not compile for sm_90"):
        compile_ahead.compile_all([broken], 90, num_processes=1)


def test_each_launch_is_in_one_share():
    launches = [compile_ahead.Launch("m", "k", str(i)) for i in range(100)]
    shares = [compile_ahead.share_of(launches, share, 3) for share in range(3)]
    assert sorted(launch.specialization for share in shares for launch in share) == sorted(map(str, range(100)))
    assert all(len(share) > 10 for share in shares)


# ---- the launches of an engine


def rank(folder, num_ranks=1, **options):
    config = EngineConfig(model=str(folder), ep_size=num_ranks, max_num_seqs=3, max_num_batched_tokens=32, **options)
    model = read_model_config(folder, "bfloat16")
    return precompile.Rank(config=config, model=model, max_model_len=64, gpu=H200, rank=0, num_ranks=num_ranks)


def test_tensors_without_storage_launch_what_tensors_with_storage_launch(monkeypatch):
    """Compare with a CPU, where alignment, strides and sizes are real and unwritten memory is zero."""
    of = rank(tiny.cached("qwen3_moe"))
    without = compile_ahead.recorded(lambda: precompile._warm_up(of), 90)
    monkeypatch.setattr(torch, "empty", torch.zeros)
    monkeypatch.setattr(torch, "empty_like", torch.zeros_like)
    monkeypatch.setattr(torch.Tensor, "new_empty", torch.Tensor.new_zeros)
    monkeypatch.setattr(precompile, "_DEVICE", "cpu")
    monkeypatch.setattr(precompile, "_StoragelessDecoder", Decoder)
    assert set(precompile.launches(of)) == set(without)
    assert len(without) > 20


@pytest.mark.parametrize(
    ("name", "num_ranks", "kernels"),
    [
        (
            "qwen3-30b-a3b",
            8,
            {"low_latency_send_kernel", "low_latency_receive_kernel", "combine_send_kernel", "grouped_gemm_kernel"},
        ),
        ("deepseek-v3", 1, {"mla_kernel", "quantize_kernel", "linear_kernel", "tile_scales_kernel"}),
    ],
)
def test_the_launches_of_real_models_are_found(name, num_ranks, kernels):
    found = precompile.launches(rank(CONFIGS / name, num_ranks))
    assert kernels <= {launch.kernel for launch in found}


def test_ranks_of_a_node_launch_the_same_kernels():
    """Otherwise no rank would compile a launch that only one makes and that is not in its share."""
    of = rank(CONFIGS / "qwen3-30b-a3b", 32)
    first, *others = (set(precompile.launches(replace(of, rank=rank))) for rank in (0, 1, 3, 16))
    assert [len(found ^ first) for found in others] == [0, 0, 0]


def test_kernels_that_wait_are_compiled_with_the_clock_of_a_gpu():
    """A constant of the kernels; without it each rank would compile them at its first step, one by one."""
    found = [launch for launch in precompile.launches(rank(CONFIGS / "qwen3-30b-a3b", 8)) if _waits(launch)]
    assert {launch.kernel for launch in found} == {"wait_for_signals_kernel", "low_latency_receive_kernel"}
    for launch in found:
        described = json.loads(launch.specialization)
        constants = dict(zip(map(str, described["constant_keys"]), described["constant_vals"], strict=True))
        assert constants[str([_CLOCKS[launch.kernel]])] is True, launch.kernel


def _waits(launch):
    return launch.kernel in _CLOCKS


# Where each kernel has its argument CLOCK.
_CLOCKS = {
    kernel.__name__: kernel.arg_names.index("CLOCK")
    for kernel in (signals.wait_for_signals_kernel, dispatch_low_latency.low_latency_receive_kernel)
}


def test_steps_of_several_exchanges_are_warmed_up_as_such(monkeypatch):
    """The kernels of an exchange depend on its number of tokens, and so do the captured steps."""
    monkeypatch.setattr(symmetric_buffer, "EXCHANGE_BYTES", 0)
    of = rank(CONFIGS / "qwen3-30b-a3b", 8)
    of = replace(of, config=replace(of.config, max_num_batched_tokens=512))
    taken, found = [], NvlinkGpuAllToAll.dispatch_send

    def note(self, x_TD, *rest):
        taken.append(len(x_TD))
        return found(self, x_TD, *rest)

    monkeypatch.setattr(NvlinkGpuAllToAll, "dispatch_send", note)
    precompile.launches(of)
    assert max(taken) == 128


def test_a_process_compiles_its_share(recwarn):
    """Take one share of very many, so that there is nothing to compile."""
    precompile.Precompilation(rank(tiny.cached("qwen3_moe")), share=1, num_shares=10**9, num_processes=1).wait()
    assert not [warning for warning in recwarn if "compil" in str(warning.message)]


def test_a_process_that_fails_is_a_warning():
    with pytest.warns(UserWarning, match=r"(?s)kernels are compiled one by one.*no attribute 'gpu'"):
        precompile.Precompilation(None, share=0, num_shares=1, num_processes=1).wait()
