"""Quirks of models with latent attention: the logits agree with transformers, and differ without any one quirk.

Cases are numbered: 1 routing, 2 groups, 3 scale and pairing of latent attention, 4 eps of its norms, 5 the indexer, 6 Kimi's
YaRN, 8 query scaling, 14 tied embeddings and ends, 16 styles of config.
"""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import architectures
from helpers import architectures_latent as latent
from helpers.quirks import attention, check_quirk, known, moe, rope, scaling, unread
from helpers.rank_model import RankModel

from expertwire.bench.serving import rank_model as bench_rank_model
from expertwire.engine.models.registry import read_model_config
from expertwire.kernels import registry
from expertwire.kernels.ops import rotary
from expertwire.kernels.ops.variants import Rope, Yarn

LENGTH = 90  # beyond YaRN's and the query scaling's 64 positions, and the 32 that an indexer chooses


def groups_by(by):
    return lambda config: moe(groups=replace(config.moe.groups, by=by))(config)


def of_attention(config):
    return config.layers[0].mixer


def plain_scale(config):
    c = of_attention(config)
    return attention(scale=(c.qk_nope_head_dim + c.rope.size) ** -0.5)(config)


def default_factor(config):
    """Cosines and sines times 0.1 ln(factor) + 1, as YaRN elsewhere; the scale of the scores stays."""
    c = of_attention(config)
    scale = (c.qk_nope_head_dim + c.rope.size) ** -0.5 * (0.1 * np.log(c.rope.scaling.factor) + 1) ** 2
    return attention(scale=scale)(scaling(mscale=None, mscale_all_dim=None)(config))


def other_pairs_of_indexer(config):
    indexer = of_attention(config).indexer
    rope = replace(indexer.rope, interleaved=not indexer.rope.interleaved)
    return attention(indexer=replace(indexer, rope=rope))(config)


def without(pattern, change):
    return lambda config: unread(pattern)(change(config))


def tied(config):
    return replace(config, tie_word_embeddings=True)


CONFIGS = {
    "1c-sigmoid": ("deepseek_v3", moe(score="softmax")),
    "1c-choice-bias": ("deepseek_v3", without(r".*\.e_score_correction_bias", moe(choice_bias=False))),
    "1c-renormalized": ("deepseek_v3", moe(renormalize=False)),
    "1c-scaled": ("kimi_k2", moe(scale=1.0)),
    "1g-not-renormalized": ("deepseek_v2", moe(renormalize=True)),
    "1g-scaled": ("deepseek_v2_lite", moe(scale=1.0)),
    "1a-renormalized-mistral4": ("mistral4", moe(renormalize=False)),
    "2-groups-v3": ("deepseek_v3", moe(groups=None)),
    "2-groups-by-two-best-v3": ("deepseek_v3", groups_by("best")),
    "2-groups-v2": ("deepseek_v2", moe(groups=None)),
    "2-groups-by-best-v2": ("deepseek_v2", groups_by("two_best")),
    "3-mscale-of-scores-v3": ("deepseek_v3", plain_scale),
    "3-mscale-of-scores-v2": ("deepseek_v2_lite", plain_scale),
    "3-ratio-of-mscales": ("deepseek_v3", default_factor),
    "3-interleaved": ("deepseek_v3", rope(interleaved=False)),
    "4-eps-glm": ("glm4_moe_lite", attention(norm_eps=latent.EPS)),
    "4-eps-v2": ("deepseek_v2", attention(norm_eps=latent.EPS)),
    "5-indexer-v32": ("deepseek_v32", without(r".*\.indexer\..*", attention(indexer=None))),
    "5-indexer-glm": ("glm_moe_dsa", without(r".*\.indexer\..*", attention(indexer=None))),
    "5-halves-v32": ("deepseek_v32", other_pairs_of_indexer),
    "5-interleaved-glm": ("glm_moe_dsa", other_pairs_of_indexer),
    "6-kimi-beta-fast": ("kimi_k2", scaling(beta_fast=32.0)),
    "8-query-scaling": ("mistral4", attention(query_scaling=None)),
    "14-head-of-its-own-in-a-wrapper": ("mistral_small4_fp8", tied),
}


def biased_weights(ops):
    """Scores with the bias weigh, too."""

    def route(logits_TE, routing, bias_E):
        ids_TK, _ = ops.route(logits_TE, routing, bias_E)
        weights_TK = (logits_TE.sigmoid() + bias_E).gather(1, ids_TK)
        return ids_TK, routing.scale * weights_TK / weights_TK.sum(1, keepdim=True)

    return {"route": route, "fuse_moe": None}


def last_numbers_rotated(ops):
    """Rotate the last numbers of an index head; scores do not depend on the order of numbers."""

    def rotate(q_THd, k_Td, norm, eps, rope, cache):
        q_THd, k_Td, *norm = (x.roll(rope.size, -1).contiguous() for x in (q_THd, k_Td, *norm))
        return ops.rope_and_cache_index(q_THd, k_Td, tuple(norm), eps, rope, cache)

    return {"rope_and_cache_index": rotate}


def unbiased_norm(ops):
    def rotate(q_THd, k_Td, norm, *more, **options):
        return ops.rope_and_cache_index(q_THd, k_Td, (norm[0], torch.zeros_like(norm[1])), *more, **options)

    return {"rope_and_cache_index": rotate}


def equal_index_heads(ops):
    def choose(q_THd, weights_TH, *more):
        return ops.choose_positions(q_THd, torch.ones_like(weights_TH), *more)

    return {"choose_positions": choose}


OPS = {
    "1c-bias-does-not-weigh": ("deepseek_v3", biased_weights),
    "5-first-numbers-rotated": ("deepseek_v32", last_numbers_rotated),
    "5-norm-has-a-bias": ("deepseek_v32", unbiased_norm),
    "5-weights-of-heads": ("glm_moe_dsa", equal_index_heads),
}


@pytest.mark.parametrize("name", latent.ALL)
def test_with_its_quirks_a_model_agrees(name):
    known(name, LENGTH)


@pytest.mark.parametrize(("name", "change"), CONFIGS.values(), ids=CONFIGS)
def test_a_quirk_of_the_config_matters(name, change, monkeypatch):
    check_quirk(monkeypatch, name, change, num_tokens=LENGTH)


@pytest.mark.parametrize(("name", "change"), OPS.values(), ids=OPS)
def test_a_quirk_of_the_ops_matters(name, change, monkeypatch):
    known(name, LENGTH)
    ops = registry.cpu()
    monkeypatch.setattr(registry, "choose", lambda device, **_: replace(ops, **change(ops)))
    check_quirk(monkeypatch, name, num_tokens=LENGTH)


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3", "glm4_moe_lite"])
@pytest.mark.parametrize("wide", [True, False], ids=["1-router-in-fp32", "1-router-in-bf16"])
def test_routers_multiply_in_fp32(name, wide, monkeypatch):
    config = read_model_config(architectures.folder(name), "bfloat16")
    if not wide:
        monkeypatch.setattr(bench_rank_model, "read_model_config", lambda folder, *_: moe(router_fp32=False)(config))
    router = RankModel(architectures.folder(name), "bfloat16").model.layers[-1].moe.router
    x_TD = torch.randn(50, config.hidden_size, generator=torch.Generator().manual_seed(0)).bfloat16()
    _, weights_TK = router(x_TD)
    with torch.no_grad():
        _, expected_TK, _ = architectures.model(name).model.layers[-1].mlp.gate(x_TD.float())
    worst = (weights_TK.sort(-1).values - expected_TK.sort(-1).values).abs().max()
    assert worst < 1e-4 if wide else worst > 1e-3


def test_6_a_ramp_of_no_width_divides_all_but_the_first_frequency():
    scaling = Yarn(factor=32.0, original_max_position=6, beta_fast=1.0, beta_slow=1.0, attention_factor=1.0)
    cosines, _ = rotary.tables(2, Rope(theta=5e4, size=16, scaling=scaling), "cpu")
    frequencies = 5e4 ** (-torch.arange(8) / 8)
    frequencies[1:] /= 32
    torch.testing.assert_close(cosines[1, :8], frequencies.cos())


# ---- configs


@pytest.fixture
def checkpoint(tmp_path):
    """Return a copy of a model's files, whose config may be changed."""

    def make(name, *removed, **changes):
        folder = tmp_path / name
        shutil.copytree(architectures.folder(name), folder, dirs_exist_ok=True)
        fields = json.loads((folder / "config.json").read_text()) | changes
        kept = {key: value for key, value in fields.items() if key not in removed}
        (folder / "config.json").write_text(json.dumps(kept))
        return folder

    return make


def test_16_both_styles_of_config_say_the_same(checkpoint):
    hub = json.loads((checkpoint("deepseek_v3") / "config.json").read_text())
    rope = {**hub["rope_scaling"], "rope_type": hub["rope_scaling"]["type"], "rope_theta": hub["rope_theta"]}
    new = {"rope_parameters": rope, "dtype": "float32", "mlp_layer_types": latent.DENSE_FIRST}
    old = {"rope_scaling", "rope_theta", "torch_dtype", "first_k_dense_replace", "moe_layer_freq"}
    expected = read_model_config(checkpoint("deepseek_v3"))
    assert expected.layers[0].mixer.rope.scaling.factor == 40
    assert read_model_config(checkpoint("deepseek_v3", *old, **new)) == expected


def test_layers_between_mixtures_may_be_dense(checkpoint):
    """Those from `first_k_dense_replace` on that `moe_layer_freq` divides are mixtures."""
    folder = checkpoint("deepseek_v2", num_hidden_layers=6, first_k_dense_replace=2, moe_layer_freq=3)
    assert read_model_config(folder).sparse_layers == (False, False, False, True, False, False)


def test_14_ends_may_be_a_list(checkpoint):
    folder = checkpoint("glm4_moe_lite", eos_token_id=[5, 6, 7])
    assert read_model_config(folder).eos_token_ids == (5, 6, 7)
    (folder / "generation_config.json").write_text('{"eos_token_id": [8, 9]}')
    assert read_model_config(folder).eos_token_ids == (8, 9)


def test_what_predicts_further_tokens_or_sees_images_is_skipped_by_name(checkpoint):
    predictor = read_model_config(checkpoint("deepseek_v3")).ignored_tensors
    vision = read_model_config(checkpoint("mistral_small4_fp8")).ignored_tensors
    assert ["multi-token" in entry.why for entry in predictor] == [True]
    assert ["images" in entry.why for entry in vision] == [True]
    with pytest.raises(ValueError, match=r"does not know these tensors: .*model\.layers\.3\."):
        RankModel(checkpoint("deepseek_v3", num_nextn_predict_layers=0))


def test_caches_hold_one_latent_and_one_index_key_a_token(checkpoint):
    sizes = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "index_head_dim": 128}
    v3 = read_model_config(checkpoint("deepseek_v3", **sizes), "bfloat16").cache_specs()
    assert [(spec.kind, spec.bytes_per_token) for spec in v3] == [("latent", latent.NUM_LAYERS * 576 * 2)]
    v32 = read_model_config(checkpoint("deepseek_v32", **sizes), "bfloat16").cache_specs()
    assert [(spec.kind, spec.bytes_per_token) for spec in v32] == [
        ("latent", latent.NUM_LAYERS * 576 * 2),
        ("index", latent.NUM_LAYERS * 128 * 2),
    ]


WRONG = [
    ("deepseek_v2", "topk_method", "noaux_tc", "'greedy' or 'group_limited_greedy'"),
    ("deepseek_v2", "norm_topk_prob", True, "must be False"),
    ("deepseek_v3", "topk_method", "greedy", "'noaux_tc'"),
    ("deepseek_v3", "scoring_func", "softmax", "'sigmoid'"),
    ("deepseek_v3", "n_group", 3, "cut 8 experts into equal groups of 2 or more"),
    ("deepseek_v3", "n_group", 8, "cut 8 experts into equal groups of 2 or more"),
    ("deepseek_v3", "topk_group", 1, r"at most n_group \(4\) and leave num_experts_per_tok \(3\)"),
    ("deepseek_v3", "topk_group", 5, r"at most n_group \(4\)"),
    ("deepseek_v3", "attention_bias", True, "must be False"),
    ("deepseek_v3", "num_key_value_heads", 2, "must be 4"),
    ("deepseek_v3", "kv_lora_rank", None, "kv_lora_rank' is missing"),
    ("deepseek_v3", "partial_rotary_factor", 0.5, "partial_rotary_factor must be 1 or 0.4"),
    ("deepseek_v3", "rope_interleave", "yes", "rope_interleave must be true or false"),
    ("deepseek_v32", "q_lora_rank", None, "q_lora_rank' is missing"),
    ("deepseek_v32", "index_head_dim", 8, "index_head_dim must be an integer >= 16"),
    ("glm4_moe_lite", "mlp_layer_types", ["dense"], "mlp_layer_types must be a list of 3"),
    ("glm_moe_dsa", "indexer_types", ["full", "shared", "full"], "indexer_types must be 'full'"),
    ("glm_moe_dsa", "index_topk_freq", 4, "index_topk_freq 1"),
]


@pytest.mark.parametrize(("name", "field", "value", "message"), WRONG, ids=lambda value: str(value)[:30])
def test_wrong_fields_are_named(name, field, value, message, checkpoint):
    with pytest.raises(ValueError, match=message):
        read_model_config(checkpoint(name, **{field: value}))


def test_wrong_fields_of_a_wrapper_are_named_with_their_path(checkpoint):
    text = json.loads((checkpoint("mistral_small4_fp8") / "config.json").read_text())["text_config"]
    with pytest.raises(ValueError, match=r"text_config\.model_type must be .*'mistral4'"):
        read_model_config(checkpoint("mistral_small4_fp8", text_config={**text, "model_type": "mistral9"}))
    rope = {name: value for name, value in text["rope_parameters"].items() if name != "llama_4_scaling_beta"}
    with pytest.raises(ValueError, match=r"text_config\.rope_parameters\.llama_4_scaling_beta"):
        read_model_config(checkpoint("mistral_small4_fp8", text_config={**text, "rope_parameters": rope}))
