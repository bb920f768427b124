"""FlashInfer's wrappers behind our ops, on a strict fake: values, plans a step, and what is refused."""

import inspect
import json
from dataclasses import replace

import pytest
import torch
from helpers import fake_flashinfer, flashinfer_signatures, hub_configs
from helpers.paged_scenes import BATCHES, scene

from expertwire.engine.config import validation
from expertwire.engine.config.engine_config import EngineConfig
from expertwire.kernels import registry
from expertwire.kernels.gpu.device import H200
from expertwire.kernels.ops import attention, mla


@pytest.fixture
def made(monkeypatch):
    return fake_flashinfer.install(monkeypatch)


@pytest.fixture
def ops(made):
    return registry.flashinfer(registry.triton(H200, fast=True), "cpu")


@pytest.mark.parametrize("window", [0, 1, 20])
@pytest.mark.parametrize("name", BATCHES)
def test_reference(name, window, ops):
    q, k, v, host, seqs = scene(BATCHES[name], torch.float16)
    k, v = k.nan_to_num(), v.nan_to_num()
    options = attention.AttentionOptions(window=window, scale=0.3)
    expected = attention.reference(q, k, v, host, options)
    torch.testing.assert_close(ops.attend(q, k, v, seqs, options), expected)


@pytest.mark.parametrize("name", BATCHES)
def test_latent_reference(name, ops):
    _, _, cache, host, seqs = scene(BATCHES[name], torch.float16, kv_heads=1, dim=48)
    cache = cache.nan_to_num()[:, :, 0]
    q_THl = torch.randn(host.cu_seqlens_q[-1], 4, 48).half()
    expected = mla.reference(q_THl, cache, host, rank=32, scale=0.2)
    torch.testing.assert_close(ops.attend_latent(q_THl, cache, seqs, rank=32, scale=0.2), expected)


def test_a_step_is_planned_once_and_run_by_every_layer(ops, made):
    q, k, v, _, seqs = scene(BATCHES["mixed"], torch.float16)
    for _ in range(3):
        ops.attend(q, k, v, seqs)
    assert [wrapper.plans for wrapper in made] == [1, 1]  # decode and prefill
    ops.attend(q, k, v, replace(seqs))
    assert [wrapper.plans for wrapper in made] == [2, 2]
    ops.attend(q, k, v, seqs, attention.AttentionOptions(window=20))
    assert [wrapper.plans for wrapper in made] == [2, 2, 1, 1]


@pytest.mark.parametrize("num_decodes", [3, 0], ids=["decodes", "a prompt"])
def test_warming_up_plans_and_runs(num_decodes, ops, made):
    """Run rows that belong to no sequence: kernels are compiled in warm-up, not at the first request."""
    table = torch.zeros(3, 4, dtype=torch.int32)
    bounds = {"max_decodes": num_decodes, "max_prefills": 3 - num_decodes, "max_prefill_tokens": 3 - num_decodes}
    seqs = replace(attention.describe([0] * 3, [0] * 3, table), **bounds)
    q, cache = torch.zeros(3, 4, 32), torch.zeros(2, 16, 2, 32)
    assert ops.attend(q, cache, cache, seqs).shape == q.shape
    assert [wrapper.plans for wrapper in made] == [1]


def test_no_step_is_captured_and_the_choice_can_be_read(ops):
    assert not ops.capturable and registry.triton(H200).capturable
    text = ops.explain()
    assert "attention by flashinfer, as requested" in text and "not yet compared with ours" in text
    assert "attend: expertwire.kernels.gpu.flashinfer.attend" in text
    assert "attend_expanded: expertwire.kernels.gpu.prefill.attend" in text


def test_nothing_is_chosen_by_what_is_installed(made):
    assert "flashinfer" not in registry.triton(H200, fast=True).explain()


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"'expertwire\[flashinfer\]'"):
        registry.flashinfer(registry.triton(H200, fast=True), "cpu")


def test_a_cpu_has_none():
    with pytest.raises(ValueError, match="attention_backend must be 'triton' where the device is a CPU"):
        registry.choose("cpu", fast=True, attention="flashinfer")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"numerics": "invariant"}, "needs numerics 'fast', got 'invariant'"),
        ({"device": "cpu"}, "must be 'triton' with device 'cpu'"),
        ({"enable_two_batch_overlap": True, "ep_size": 2}, "needs enable_two_batch_overlap False, got True"),
        ({"attention_backend": "flash"}, "attention_backend must be one of triton, flashinfer, got 'flash'"),
    ],
)
def test_options_that_do_not_go_together(options, message):
    with pytest.raises(ValueError, match=message):
        EngineConfig(**{"model": "", "attention_backend": "flashinfer", "numerics": "fast", **options})


@pytest.mark.parametrize(
    ("kind", "lacks"),
    [
        ("gpt_oss", ["sinks"]),
        ("llama4", ["attention in chunks"]),
        ("deepseek_v32", ["sparse attention"]),
        ("mistral4", ["latents of (256, 64) numbers ((512, 64) are allowed)"]),
        ("qwen3_moe", []),
        ("deepseek_v3", []),
    ],
)
def test_models_that_it_cannot_compute(kind, lacks, tmp_path):
    model = hub_configs.read(tmp_path, hub_configs.HUB_CONFIGS[kind])
    config = EngineConfig(model="", attention_backend="flashinfer", numerics="fast")
    if not lacks:
        validation.check_attention(config, model)
        lacks.append("dtype float32 (bfloat16 is allowed)")
        model = replace(model, dtype="float32")
    with pytest.raises(ValueError, match=r"attention_backend 'flashinfer' lacks what .* needs: ") as raised:
        validation.check_attention(config, model)
    assert str(raised.value).partition("needs: ")[2] == f"{', '.join(lacks)}; use 'triton'"
    validation.check_attention(replace(config, attention_backend="triton"), model)


def test_the_table_is_of_the_installed_version():
    api = pytest.importorskip("flashinfer")
    table = json.loads(flashinfer_signatures.TABLE.read_text())
    assert table["version"] == api.__version__
    from flashinfer import mla as installed

    for name, parameters in table["signatures"].items():
        owner, method = name.split(".")
        function = getattr(getattr(api, owner, None) or getattr(installed, owner), method)
        names = [parameter for parameter in inspect.signature(function).parameters if parameter not in ("self", "cls")]
        assert names == [parameter for parameter, _, _ in parameters], name
