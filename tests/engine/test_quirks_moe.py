"""Quirks of models with grouped-query attention and experts: the logits differ without any one quirk.

The numbers in the names of the cases are those of the reference's list of quirks. A quirk is removed from the parsed config, or,
where the config cannot say so, from the bound model.
"""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import architectures
from helpers.quirks import DIFFERS, Bound, attention, check_quirk, known, moe, rope, scaling, unread
from helpers.rank_model import RankModel

from expertwire.bench.serving import rank_model as bench_rank_model
from expertwire.engine.models import registry
from expertwire.engine.models.mixer_configs import QueryScaling
from expertwire.engine.models.registry import read_model_config
from expertwire.kernels.ops.variants import Activation

NUM_TOKENS = 70


class PlainUp(Activation):
    """gpt-oss's activation without the one that is added to up."""

    @property
    def gating(self):
        return (self.alpha, self.limit, 0.0)


# ---- ways to remove a quirk of a bound model


def norm_of_each_head(layer):
    old = layer.mixer.__self__
    norms = torch.cat([norm.unflatten(0, (-1, old.config.head_dim)) for norm in old.block.weights.row_norms])
    weights = replace(old.block.weights, row_norms=None, head_norms_hd=norms)
    return replace(layer, mixer=replace(old, block=replace(old.block, weights=weights)).forward)


def weights_with_the_bias(layer):
    if layer.moe is None:
        return layer
    router = layer.moe.router

    def route(logits_TE, routing, bias_E):
        ids_TK, _ = router.route(logits_TE, routing, bias_E)
        weights_TK = (torch.sigmoid(logits_TE) + bias_E).gather(1, ids_TK)
        return ids_TK, weights_TK / weights_TK.sum(1, keepdim=True) * routing.scale

    changed = replace(layer.moe, router=replace(router, route=route), block=None)
    return replace(layer, mlp=changed.forward, moe=changed)


def slides(attention):
    return attention.window is not None


def is_rotated(attention):
    return attention.rope is not None


def is_plain(attention):
    return attention.rope is None


def rotated_everywhere(config):
    found = next(layer.mixer.rope for layer in config.layers if layer.mixer.rope is not None)
    return attention(is_plain, rope=found)(config)


def other_layers_slide(config):
    kinds = {slides(layer.mixer): layer.mixer for layer in config.layers}
    layers = [replace(layer, mixer=kinds[not slides(layer.mixer)]) for layer in config.layers]
    return replace(config, layers=tuple(layers))


SCALING = QueryScaling(beta=0.3, length=16, offset=1)  # of the tiny Llama 4s
CASES = {
    "1a-mixtral-renormalized": ("mixtral", moe(renormalize=False)),
    "1a-qwen2_moe-not-renormalized": ("qwen2_moe", moe(renormalize=True)),
    "1a-qwen3_moe-renormalized": ("qwen3_moe", moe(renormalize=False)),
    "1a-olmoe-not-renormalized": ("olmoe", moe(renormalize=True)),
    "1b-gpt_oss-softmax-of-the-chosen": ("gpt_oss", moe(renormalize=False)),
    "1b-gpt_oss-router-bias": ("gpt_oss", moe(router_bias=False), unread(r".*router\.bias")),
    "1c-glm4_moe-sigmoid": ("glm4_moe", moe(score="softmax")),
    "1c-glm4_moe-choice-bias": ("glm4_moe", moe(choice_bias=False), unread(".*correction_bias")),
    "1c-glm4_moe-weights-without-bias": ("glm4_moe", Bound(weights_with_the_bias)),
    "1c-glm4_moe-renormalized": ("glm4_moe", moe(renormalize=False)),
    "1c-glm4_moe-scale": ("glm4_moe", moe(scale=1.0)),
    "1c-minimax_m2-sigmoid": ("minimax_m2", moe(score="softmax")),
    "1c-minimax_m2-choice-bias": ("minimax_m2", moe(choice_bias=False), unread(".*correction_bias")),
    "1c-minimax_m2-weights-without-bias": ("minimax_m2", Bound(weights_with_the_bias)),
    "1c-minimax_m2-renormalized": ("minimax_m2", moe(renormalize=False)),
    "1f-llama4-scales-the-input": ("llama4_scout", moe(scales_input=False)),
    "1f-llama4-sigmoid": ("llama4_scout", moe(score="softmax")),
    "6-gpt_oss-yarn": ("gpt_oss", rope(scaling=None)),
    "6-gpt_oss-truncate": ("gpt_oss", scaling(truncate=True)),
    "6-gpt_oss-attention-factor": ("gpt_oss", scaling(attention_factor=1.0)),
    "7-gpt_oss-sinks": ("gpt_oss", attention(sinks=False), unread(".*sinks")),
    "7-gpt_oss-window": ("gpt_oss", attention(window=None)),
    "7-gpt_oss-window-counts-the-token": ("gpt_oss", attention(slides, window=lambda old: old.window + 1)),
    "7-gpt_oss-even-layers-slide": ("gpt_oss", other_layers_slide),
    "7-gpt_oss-clamp": ("gpt_oss", moe(activation=Activation("swiglu_clamped", limit=math.inf))),
    "7-gpt_oss-alpha": ("gpt_oss", moe(activation=Activation("swiglu_clamped", alpha=1.0, limit=1.5))),
    "7-gpt_oss-up-plus-one": ("gpt_oss", moe(activation=PlainUp("swiglu_clamped", limit=1.5))),
    "7-gpt_oss_mxfp4-clamp": ("gpt_oss_mxfp4", moe(activation=Activation("swiglu_clamped", limit=math.inf))),
    "7-gpt_oss_mxfp4-up-plus-one": ("gpt_oss_mxfp4", moe(activation=PlainUp("swiglu_clamped", limit=1.5))),
    "7-gpt_oss_mxfp4-window-counts-the-token": (
        "gpt_oss_mxfp4",
        attention(slides, window=lambda old: old.window + 1),
    ),
    "7-gpt_oss_mxfp4-sinks": ("gpt_oss_mxfp4", attention(sinks=False), unread(".*sinks")),
    "8-llama4-query-scaling": ("llama4_scout", attention(query_scaling=None)),
    "8-llama4-query-scaling-offset": (
        "llama4_scout",
        attention(is_plain, query_scaling=replace(SCALING, offset=0)),
    ),
    "8-llama4-rotated-queries-unscaled": ("llama4_scout", attention(query_scaling=SCALING)),
    "9-llama4-chunks": ("llama4_scout", attention(chunk=None)),
    "9-llama4-chunks-are-no-window": (
        "llama4_scout",
        attention(is_rotated, window=lambda old: old.chunk, chunk=None),
    ),
    "9-llama4-qk-norm": ("llama4_scout", attention(qk_norm="none")),
    "9-llama4-qk-norm-of-rotated-layers": ("llama4_scout", attention(qk_norm="plain")),
    "9-llama4-interleaved": ("llama4_scout", rope(interleaved=False)),
    "9-llama4-not-rotated": ("llama4_scout", rotated_everywhere),
    "9-llama4-llama3-scaling": ("llama4_scout", rope(scaling=None)),
    "9-mobilellm-qk-norm": ("mobilellm_r1", attention(qk_norm="none")),
    "9-mobilellm-interleaved": ("mobilellm_r1", rope(interleaved=False)),
    "13-glm4_moe-qkv-bias": ("glm4_moe", attention(qkv_bias=False), unread(r".*[qkv]_proj\.bias")),
    "13-glm4_moe-qk-norm": ("glm4_moe", attention(qk_norm="none"), unread(".*[qk]_norm.*")),
    "13-glm4_moe-partly-rotated": ("glm4_moe", rope(size=32)),
    "13-glm4_moe-in-halves": ("glm4_moe", rope(interleaved=True)),
    "13-minimax_m2-norm-of-the-row": ("minimax_m2", Bound(norm_of_each_head)),
    "13-minimax_m2-qk-norm": ("minimax_m2", attention(qk_norm="none"), unread(".*[qk]_norm.*")),
    "13-minimax_m2-rotary-dim": ("minimax_m2", rope(size=32)),
    "13-qwen2_moe-qkv-bias": ("qwen2_moe", attention(qkv_bias=False), unread(r".*[qkv]_proj\.bias")),
    "13-qwen2_moe-shared-expert-gate": ("qwen2_moe", moe(shared_gate=False), unread(r".*shared_expert_gate\.weight")),
    "13-olmoe-norm-of-the-row": ("olmoe", Bound(norm_of_each_head)),
    "13-olmoe-qk-norm": ("olmoe", attention(qk_norm="none"), unread(".*[qk]_norm.*")),
}


@pytest.mark.parametrize(("name", "changes"), [(name, changes) for name, *changes in CASES.values()], ids=CASES)
def test_a_quirk(name, changes, monkeypatch):
    check_quirk(monkeypatch, name, *changes, num_tokens=NUM_TOKENS)


@pytest.mark.parametrize("name", ["gpt_oss", "gpt_oss_mxfp4"])
def test_alternating_rows(name, monkeypatch):
    """3: gate and up rows, or columns, and biases."""
    ids, right = known(name, NUM_TOKENS)
    family = registry.FAMILIES["GptOssForCausalLM"]
    stacked = replace(family, names=replace(family.names, interleaved=False))
    monkeypatch.setattr(registry, "FAMILIES", {"GptOssForCausalLM": stacked})
    without = RankModel(architectures.folder(name), max_tokens=128)
    assert np.abs(without.logits(ids) - right).max() > DIFFERS


@pytest.mark.parametrize("name", ["glm4_moe", "minimax_m2"])
def test_router_in_float32(name, monkeypatch):
    """1c: whatever the activations are."""
    folder, config = architectures.folder(name), read_model_config(architectures.folder(name), "bfloat16")
    state = architectures.model(name).state_dict()
    x_TD = torch.randn(9, config.hidden_size, generator=torch.Generator().manual_seed(0)).bfloat16()
    errors = []
    for changed in (config, moe(router_fp32=False)(config)):
        monkeypatch.setattr(bench_rank_model, "read_model_config", lambda folder, *_, changed=changed: changed)
        router = RankModel(folder, "bfloat16", max_tokens=128).model.layers[-1].moe.router
        right = x_TD.float() @ state["model.layers.2.mlp.gate.weight"].T
        errors.append((router.dense(x_TD).float() - right).abs().max())
    assert errors[0] < 1e-5
    assert errors[1] > 1e-3


@pytest.mark.parametrize("name", ["glm4_moe", "glm4_moe_air"])
def test_no_bias_on_the_output(name, monkeypatch):
    """13: the config's word is of query, key and value alone."""
    config = read_model_config(architectures.folder(name), "float32")
    assert all(layer.mixer.qkv_bias and not layer.mixer.output_bias for layer in config.layers)
    with_bias = attention(output_bias=True)(config)
    monkeypatch.setattr(bench_rank_model, "read_model_config", lambda folder, *_: with_bias)
    with pytest.raises(ValueError, match=r"o_proj\.bias"):
        RankModel(architectures.folder(name), max_tokens=128)


def rewritten(name, tmp_path, change):
    """The parsed config, from a changed file."""
    fields = json.loads((architectures.folder(name) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(change(fields)))
    return read_model_config(tmp_path, "float32")


@pytest.mark.parametrize(("of_the_text", "tied"), [(True, True), (False, False), (None, False)])
def test_tied_in_the_text(of_the_text, tied, tmp_path):
    """14: the word of a wrapper's text config counts, then its own."""

    def changed(fields):
        text = fields["text_config"] | {"tie_word_embeddings": of_the_text}
        return fields | {"text_config": text, "tie_word_embeddings": None if of_the_text is None else not of_the_text}

    assert rewritten("llama4_scout", tmp_path, changed).tie_word_embeddings == tied


def test_several_ends(tmp_path):
    """14: `eos_token_id` may be a list, in the text's config, and generation_config.json has the last word."""

    def ends(fields):
        return fields | {"text_config": fields["text_config"] | {"eos_token_id": [7, 8, 9]}}

    assert rewritten("llama4_scout", tmp_path, ends).eos_token_ids == (7, 8, 9)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    assert rewritten("llama4_scout", tmp_path, ends).eos_token_ids == (1, 2)


@pytest.mark.parametrize(
    "name",
    [
        "mixtral",
        "qwen2_moe",
        "qwen3_moe",
        "olmoe",
        "gpt_oss",
        "llama4_maverick",
        "mobilellm_r1",
        "minimax_m2",
        "glm4_moe",
    ],
)
def test_both_styles(name, tmp_path):
    """16: transformers 5's own file means the same as the hub's."""
    made = architectures.model(name)
    own = made.config.to_dict() | {"architectures": [type(made).__name__], "dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps(own, default=str))
    found, hub = read_model_config(tmp_path), read_model_config(architectures.folder(name))
    assert replace(found, ignored_tensors=()) == replace(hub, ignored_tensors=())


def test_both_styles_of_a_wrapper(tmp_path):
    """16: there the fields are nested."""
    own = architectures.model("llama4_scout").config.to_dict() | {"dtype": "float32"}
    outer = {"architectures": ["Llama4ForConditionalGeneration"], "model_type": "llama4", "text_config": own}
    (tmp_path / "config.json").write_text(json.dumps(outer, default=str))
    assert read_model_config(tmp_path) == read_model_config(architectures.folder("llama4_scout"))


def test_old_name_of_the_scaling(tmp_path):
    """16: `type` is `rope_type`."""

    def renamed(fields):
        scaling = dict(fields["rope_scaling"])
        return fields | {"rope_scaling": {"type": scaling.pop("rope_type"), **scaling}}

    assert rewritten("gpt_oss", tmp_path, renamed) == read_model_config(architectures.folder("gpt_oss"), "float32")


# ---- what is not supported

REFUSED = {
    "olmoe-clip_qkv": ("olmoe", {"clip_qkv": 8.0}, "clip_qkv must be null, got 8.0"),
    "qwen2_moe-window": ("qwen2_moe", {"use_sliding_window": True}, "use_sliding_window must be False"),
    "gpt_oss-no-window": ("gpt_oss", {"sliding_window": None}, "'sliding_window' is missing"),
    "gpt_oss-layer_types": ("gpt_oss", {"layer_types": ["chunked"] * 3}, "layer_types must be a list of 3 values"),
    "minimax-qk_norm_type": ("minimax_m2", {"qk_norm_type": "per_head"}, "qk_norm_type must be 'per_layer'"),
    "minimax-attention": ("minimax_m2", {"attn_type_list": [1, 0, 1]}, "attn_type_list must be 3 times 1"),
    "minimax-rotary_dim": ("minimax_m2", {"rotary_dim": 34}, r"rotary_dim must be even and at most head_dim \(32\)"),
    "minimax-shared": ("minimax_m2", {"shared_intermediate_size": 64}, "shared_intermediate_size must be 0"),
    "minimax-score": ("minimax_m2", {"scoring_func": "softmax"}, "scoring_func must be 'sigmoid'"),
    "llama4-no_rope_layers": ("llama4_maverick", {"no_rope_layers": [1, 2, 1, 0]}, "no_rope_layers must be a list"),
    "llama4-few-no_rope_layers": ("llama4_maverick", {"no_rope_layers": [1, 0]}, "each of the 4 layers"),
    "llama4-layer_types": (
        "llama4_maverick",
        {"layer_types": ["sliding_attention"] * 4},
        "full_attention, chunked_attention",
    ),
    "llama4-tuning": (
        "llama4_maverick",
        {"attn_temperature_tuning": 3},
        "attn_temperature_tuning must be true or false",
    ),
    "glm4-qk-norm": ("glm4_moe", {"use_qk_norm": None}, "'use_qk_norm' is missing"),
    "glm4-score": ("glm4_moe", {"scoring_func": "softmax"}, "scoring_func must be 'sigmoid'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, tmp_path):
    name, fields, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        rewritten(name, tmp_path, lambda old: old | fields)
