"""Compiling ahead: the launches of a program are found without making them, and are found in the cache by who makes them."""

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

from expertwire.comm.all_to_all import symmetric_buffer as arena
from expertwire.comm.all_to_all.nvlink_gpu import NvlinkGpuAllToAll
from expertwire.engine.config.engine_config import EngineConfig
from expertwire.engine.models.decoder import Decoder
from expertwire.engine.models.registry import read_model_config
from expertwire.engine.runner import precompile
from expertwire.kernels.gpu import compile_ahead, rms_norm
from expertwire.kernels.gpu.compile import absent_gpu
from expertwire.kernels.gpu.device import H200

CONFIGS = Path(__file__).parents[2] / "bench" / "configs"


def norms(device="meta"):
    """Two launches of one kernel for widths that are compiled apart, one of them twice."""
    for width in (64, 128, 64):
        x = torch.empty(3, width, dtype=torch.bfloat16, device=device)
        rms_norm.rms_norm(x, torch.empty(width, dtype=torch.bfloat16, device=device), 1e-6)


@pytest.fixture
def cache(tmp_path):
    """An empty cache of Triton's, for this process and those that it forks."""
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path)
        yield tmp_path


def test_launches_are_noted_once_and_not_made(cache):
    launches = compile_ahead.recorded(norms, 90)
    assert [(launch.module, launch.kernel) for launch in launches] == [(rms_norm.__name__, "rms_norm_kernel")] * 2
    assert not list(cache.iterdir())  # nothing has been compiled


def test_what_is_compiled_ahead_is_found_in_the_cache(cache):
    """A later process asks for the same keys: here this one, which has compiled nothing."""
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
    """Where alignment, strides and sizes are real: on a CPU, whose memory is zero where kernels would have written."""
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
        ("qwen3-30b-a3b", 8, {"send_few_kernel", "arrive_few_kernel", "go_home_kernel", "_grouped_gemm"}),
        ("deepseek-v3", 1, {"_attend_latent", "quantize_kernel", "linear_kernel", "_tile_scales"}),
    ],
)
def test_the_launches_of_real_models_are_found(name, num_ranks, kernels):
    found = precompile.launches(rank(CONFIGS / name, num_ranks))
    assert kernels <= {launch.kernel for launch in found}


def test_ranks_of_a_node_launch_the_same_kernels():
    """Or what one of them alone launches would be compiled by none, where it is not in that one's share."""
    of = rank(CONFIGS / "qwen3-30b-a3b", 32)
    first, *others = (set(precompile.launches(replace(of, rank=rank))) for rank in (0, 1, 3, 16))
    assert [len(found ^ first) for found in others] == [0, 0, 0]


def test_steps_of_several_exchanges_are_warmed_up_as_such(monkeypatch):
    """The kernels of an exchange depend on how many tokens it takes, and so do the steps that are captured."""
    monkeypatch.setattr(arena, "EXCHANGE_BYTES", 0)
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
    """One of very many, so that there is nothing to compile."""
    precompile.Precompilation(rank(tiny.cached("qwen3_moe")), share=1, num_shares=10**9, num_processes=1).wait()
    assert not [warning for warning in recwarn if "compil" in str(warning.message)]


def test_a_process_that_fails_is_a_warning():
    with pytest.warns(UserWarning, match=r"(?s)kernels are compiled one by one.*no attribute 'gpu'"):
        precompile.Precompilation(None, share=0, num_shares=1, num_processes=1).wait()
