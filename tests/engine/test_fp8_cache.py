"""Models with a KV cache in fp8: against transformers with keys and values quantised here, and the same bits in any company."""

import functools
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import architectures, parity
from helpers import tiny_checkpoints as tiny
from helpers.rank_model import RankModel
from safetensors.torch import load_file, save_file
from transformers import DynamicCache

from expertwire import LLM, SamplingParams
from expertwire.engine.config.engine_config import EngineConfig
from expertwire.engine.kv_cache import caches
from expertwire.engine.loader.inspection import inspect
from expertwire.engine.models.registry import read_model_config
from expertwire.engine.runner.staging import upload_nowhere
from expertwire.kernels.ops import copy_blocks
from expertwire.kernels.ops.attention import FP8

VARIANT, LENGTH = "qwen3_moe", 60
# By layer: the tensors that a checkpoint has, and the scales of keys and values that they mean.
SCALES = [
    ({"attn.k_scale": [0.02], "attn.v_scale": [0.5]}, [0.02, 0.02], [0.5, 0.5]),
    ({"k_proj.k_scale": 0.015, "v_proj.v_scale": 0.3, "q_scale": 0.1}, [0.015] * 2, [0.3] * 2),
    (
        {"k_scale": [[[0.011]], [[0.04]]], "v_scale": [[[0.2]], [[0.07]]], "k_zero_point": [[[0.0]], [[0.0]]]},
        [0.011, 0.04],
        [0.2, 0.07],
    ),
    ({"kv_scale": 0.03}, [0.03] * 2, [0.03] * 2),
]


def with_scales(folder, tmp_path, scales):
    """A copy of a checkpoint with these tensors besides, by layer."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    [file] = tmp_path.glob("*.safetensors")
    added = {
        f"model.layers.{i}.self_attn.{name}": torch.tensor(value)
        for i, of_layer in enumerate(scales)
        for name, value in of_layer.items()
    }
    save_file(load_file(file) | added, file, metadata={"format": "pt"})
    return tmp_path


class Quantised(DynamicCache):
    """A cache from which attention reads the numbers that an fp8 cache stands for."""

    def __init__(self, scales):
        super().__init__()
        self._scales = scales

    def update(self, keys, values, layer_idx, *more, **named):
        both = (self._rounded(x, scale) for x, scale in zip((keys, values), self._scales[layer_idx], strict=True))
        return super().update(*both, layer_idx, *more, **named)

    def _rounded(self, x, scales):
        scale = torch.tensor(scales).view(1, -1, 1, 1)
        return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


@functools.cache
def dense():
    """A model without routers, in which an error stays small."""
    return tiny.cached("qwen3", head_dim=32, num_hidden_layers=len(SCALES), max_window_layers=len(SCALES))


@torch.inference_mode()
def reference(ids, scales):
    model = tiny._reference(str(dense()))
    return model(torch.tensor([ids]), past_key_values=Quantised(scales)).logits[0].numpy()


@pytest.mark.parametrize("published", [True, False])
def test_logits_are_those_of_quantised_keys_and_values(tmp_path, published):
    given = [tensors if published else {} for tensors, _, _ in SCALES]
    meant = [(k, v) if published else ([1.0, 1.0], [1.0, 1.0]) for _, k, v in SCALES]
    folder, ids = with_scales(dense(), tmp_path, given), tiny.prompt(LENGTH, seed=0)
    found, plain = RankModel(folder, kv_cache_dtype="fp8").logits(ids), RankModel(folder).logits(ids)
    # What is halfway between two fp8 numbers may be rounded to the other one.
    assert np.abs(found - reference(ids, meant)).max() < 5e-3
    assert 0.05 < np.abs(found - plain).mean() < 0.2, "the logits' standard deviation is 3"
    if published:
        assert np.abs(found - reference(ids, meant[1:] + meant[:1])).max() > 0.5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype"),
    [(VARIANT, "float32"), (VARIANT, "bfloat16"), ("deepseek_v3", "bfloat16"), ("gpt_oss", "bfloat16")],
)
def test_a_prompt_in_chunks(name, dtype):
    folder = parity.checkpoint(name) if name == VARIANT else architectures.folder(name)
    torch.set_num_threads(1)
    model = RankModel(folder, dtype, kv_cache_dtype="fp8")
    ids = tiny.prompt(LENGTH, seed=4)
    whole = model.logits(ids)
    for chunk in (1, 7, 33):
        assert np.array_equal(model.logits(ids, chunk), whole), f"{chunk} tokens at a time"
    assert not np.array_equal(RankModel(folder, dtype).logits(ids), whole)


def test_latents_take_the_scale_of_keys(tmp_path):
    folder = architectures.folder("deepseek_v3")
    scales = [{"kv_a_proj_with_mqa.k_scale": 0.125, "v_scale": 7.0}, {"kv_scale": 0.25}, {"v_scale": 7.0}]
    model = RankModel(with_scales(folder, tmp_path, scales), kv_cache_dtype="fp8")
    found = [layer.mixer.__self__.kv_scale for layer in model.model.layers]
    assert torch.cat(found).tolist() == [0.125, 0.25] + [1.0] * (len(found) - 2)
    ids = tiny.prompt(LENGTH, seed=4)
    assert not np.array_equal(model.logits(ids), RankModel(folder, kv_cache_dtype="fp8").logits(ids))


def observed(output):
    [completion] = output.outputs
    return list(completion.token_ids), [{i: entry.logprob for i, entry in at.items()} for at in completion.logprobs]


def test_company_chunks_ranks_and_cached_prefixes():
    lengths, num_output = [1, 17, 65, 150], 8
    params = SamplingParams(temperature=0, max_tokens=num_output, ignore_eos=True, logprobs=8)
    prompts = [tiny.prompt(length, seed=length) for length in lengths]
    options = {"dtype": "bfloat16", "kv_cache_dtype": "fp8", "launcher": "local", "threads_per_rank": 1}
    options |= {"kv_cache_memory_bytes": 10_000_000}
    with LLM(parity.checkpoint(VARIANT), enable_prefix_caching=False, **options) as llm:
        alone = [observed(llm.generate([prompt], params, use_tqdm=False)[0]) for prompt in prompts]
        assert llm.model_info.kv_cache_dtype == "fp8"
    with LLM(parity.checkpoint(VARIANT), ep_size=2, chunked_prefill_size=48, **options) as llm:
        for attempt in ("cold", "cached"):
            outputs = llm.generate(prompts, params, use_tqdm=False)
            assert (sum(output.num_cached_tokens for output in outputs) > 0) == (attempt == "cached")
            for length, right, output in zip(lengths, alone, outputs, strict=True):
                assert observed(output) == right, f"{length} tokens, {attempt}"


def test_half_the_bytes_of_bfloat16():
    """Index keys are not in fp8."""
    folders = parity.checkpoint(VARIANT), architectures.folder("gpt_oss"), architectures.folder("deepseek_v32")
    for folder in folders:
        plain, fp8 = (read_model_config(folder, "bfloat16", kind).cache_specs() for kind in ("auto", "fp8"))
        for before, after in zip(plain, fp8, strict=True):
            factor = 1 if before.kind == "index" else 2
            assert before.bytes_per_token == factor * after.bytes_per_token, (before, after)
    model = RankModel(folders[2], "bfloat16", kv_cache_dtype="fp8")
    kinds = {
        cache.spec.kind: {t.dtype for tensors in cache.layers.values() for t in tensors} for cache in model._caches
    }
    assert kinds == {"latent": {FP8}, "index": {torch.bfloat16}}


def test_copied_blocks_keep_their_bytes():
    [spec] = read_model_config(parity.checkpoint(VARIANT), kv_cache_dtype="fp8").cache_specs()
    cache = caches.make(spec, 5, 4, dict.fromkeys(spec.writers, [((2, 8), FP8)] * 2), "cpu")
    for tensors in cache.layers.values():
        for blocks in tensors:
            blocks.view(torch.uint8).random_(0, 256)
    before = [blocks.view(torch.uint8).clone() for tensors in cache.layers.values() for blocks in tensors]
    places = {"copy_cache_M": [0, 0], "copy_from_M": [1, 3], "copy_to_M": [2, 4]}
    plan = SimpleNamespace(**{name: np.array(value, np.int32) for name, value in places.items()})
    caches.copy_blocks([copy_blocks.prepare(cache.tensors())], plan, upload_nowhere)
    after = [blocks.view(torch.uint8) for tensors in cache.layers.values() for blocks in tensors]
    for old, new in zip(before, after, strict=True):
        assert torch.equal(new, old[[0, 1, 1, 3, 3]])


def test_scales_that_are_not_used_are_known(tmp_path):
    folder = with_scales(parity.checkpoint(VARIANT), tmp_path, [tensors for tensors, _, _ in SCALES])
    ids = tiny.prompt(9, seed=0)
    assert np.array_equal(RankModel(folder).logits(ids), RankModel(parity.checkpoint(VARIANT)).logits(ids))
    assert {r".*\.k_scale", r".*\.kv_scale"} <= {entry.tensors.pattern for entry in inspect(folder).ignored}
    assert r".*\.k_scale" not in {entry.tensors.pattern for entry in inspect(folder, kv_cache_dtype="fp8").ignored}


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan")])
def test_a_scale_has_to_be_positive(tmp_path, scale):
    folder = with_scales(parity.checkpoint(VARIANT), tmp_path, [{"k_scale": scale}])
    with pytest.raises(
        ValueError, match=r"^layers\.0\.k_scale must be positive and finite .* use kv_cache_dtype 'auto'$"
    ):
        RankModel(folder, kv_cache_dtype="fp8")


def test_flashinfer_takes_no_fp8():
    options = {"attention_backend": "flashinfer", "numerics": "fast", "kv_cache_dtype": "fp8"}
    with pytest.raises(
        ValueError, match=r"^attention_backend 'flashinfer' needs kv_cache_dtype 'auto', got 'fp8'; or use 'triton'$"
    ):
        EngineConfig(model="m", **options)
