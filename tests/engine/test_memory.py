"""The bytes that a rank's weights take: counted ahead of loading, as they will be held."""

import functools
from pathlib import Path

import pytest
import torch
from helpers import tiny_checkpoints as tiny

from expertwire.engine.kv_cache import memory
from expertwire.engine.layers.step import RankContext
from expertwire.engine.loader import weights
from expertwire.engine.models.decoder_parameters import declare_parameters
from expertwire.engine.models.registry import read_model_config
from expertwire.kernels import registry

CONFIGS = Path(__file__).parents[2] / "bench" / "configs"


@functools.cache
def layout_of(config, num_experts):
    return declare_parameters(config, None, lambda i: range(num_experts))


def test_a_cpu_holds_fp8_linears_unpacked_and_experts_as_they_are_stored():
    config = read_model_config(CONFIGS / "deepseek-v3")
    held = memory.held_bytes(config, layout_of(config, 32), "cpu")
    norms = 61 * (1536 + 512) * 2  # of the compressed queries and latents
    assert held["attention"] == 2 * (11_413_547_008 - norms // 2) + norms
    experts = 58 * 32 * 3 * 7168 * 2048
    assert held["experts"] == experts + experts // 128 // 128 * 4


def test_a_gpu_holds_fp8_linears_as_they_are_stored():
    """But for kv_b, which is absorbed head by head: 61 layers of 128 heads, 128 + 128 outputs a head and 512 inputs."""
    config = read_model_config(CONFIGS / "deepseek-v3")
    layout = layout_of(config, 32)
    held = memory.held_bytes(config, layout, "cuda:3")
    on_cpu, kv_b = memory.held_bytes(config, layout, "cpu"), 61 * 128 * 256 * 512
    assert held["attention"] < 0.504 * (on_cpu["attention"] - 2 * kv_b) + 2 * kv_b
    assert held["shared experts"] + held["dense MLPs"] < 0.501 * (on_cpu["shared experts"] + on_cpu["dense MLPs"])
    assert held["experts"] == on_cpu["experts"]


@pytest.mark.parametrize("quantize", [None, "fp8", "int4", "mxfp4"])
def test_experts_that_are_quantised_while_loading_are_counted_twice_over(quantize):
    """Held as what they become, loaded as what they are: the peak has both."""
    config = read_model_config(CONFIGS / "qwen3-30b-a3b")
    layout = layout_of(config, 128)
    held = memory.held_bytes(config, layout, "cuda:0", quantize=quantize)
    experts, bits = 48 * 128 * 3 * 2048 * 768, {None: 16, "fp8": 8 + 32 / 128**2, "int4": 4.5, "mxfp4": 4.25}[quantize]
    assert held["experts"] == experts * bits / 8
    peak, largest = memory.peak_bytes(config, layout, "cuda:0", quantize=quantize), 128 * 2 * 2048 * 768 * 2
    assert peak == 2 * 30_532_122_624 + largest


def test_a_tied_head_is_copied_on_a_cpu_alone():
    config = read_model_config(tiny.cached("qwen3_moe", tie_word_embeddings=True))
    layout = layout_of(config, config.num_experts)
    on_cpu, on_gpu = (memory.held_bytes(config, layout, device) for device in ("cpu", "cuda"))
    assert on_cpu["head"] == on_cpu["embedding"] == on_gpu["embedding"]
    assert "head" not in on_gpu


def test_loading_is_refused_by_what_the_weights_take_when_they_are_unpacked(monkeypatch):
    """The attention of a small DeepSeek in FP8: 1 byte a number in the file, 2 when it is bound."""
    asked = []
    monkeypatch.setattr(weights, "check_memory", lambda nbytes, device, sharers: asked.append(nbytes))
    monkeypatch.setattr(weights, "allocate", stop)
    config = read_model_config(CONFIGS / "deepseek-v3")
    context = RankContext(
        rank=0, dtype=torch.bfloat16, device="cpu", ops=registry.plain(), placement=Everything(), all_to_alls=()
    )
    with pytest.raises(InterruptedError):
        weights.load_model(config, context, None)
    held = sum(memory.held_bytes(config, layout_of(config, 1), "cpu").values())
    assert asked[0] >= held


def stop(*given):
    raise InterruptedError


class Everything:
    """A placement of one expert a layer."""

    def experts_of(self, rank, layer):
        return (0,)
