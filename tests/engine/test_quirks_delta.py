"""Quirks of models with gated delta nets: the logits agree with transformers, and differ without any one quirk.

The numbers in the names of the cases are those of the reference's list of quirks. A quirk is removed from the parsed config, from
the bound model, or from the way in which parameters are found.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import architectures
from helpers.quirks import DIFFERS, attention, check_quirk, known, mixers, moe, unread, with_ops, without_convolution
from helpers.rank_model import RankModel

from expertwire.bench.serving import rank_model as bench_rank_model
from expertwire.engine.layers.attention import GroupedQueryAttention
from expertwire.engine.layers.gated_delta_net import GatedDeltaNet
from expertwire.engine.loader.parameters import ParameterLayout
from expertwire.engine.models.mixer_configs import AttentionConfig, GatedDeltaNetConfig
from expertwire.engine.models.registry import read_model_config

NAMES = ["qwen3_next", "qwen3_5", "qwen3_5_moe"]


def is_attention(mixer):
    return isinstance(mixer, AttentionConfig)


def delta(change):
    return mixers(GatedDeltaNet, change)


def gated(change):
    """Change each block of attention."""
    return mixers(GroupedQueryAttention, lambda mixer: replace(mixer, block=change(mixer.block)))


def gate_first(mixer):
    norm = mixer.context.ops.gated_rms_norm
    return with_ops(gated_rms_norm=lambda *args, gate_first: norm(*args, gate_first=True))(mixer)


def delta_rule(change):
    """Change the arguments of the rule: qkv, a, b, A and dt_bias."""

    def changed(mixer):
        rule, config = mixer.context.ops.gated_delta_rule, mixer.config
        return with_ops(gated_delta_rule=lambda *args: rule(*change(config, *args[:5]), *args[5:]))(mixer)

    return changed


def without_decay(config, qkv_TD, a_TH, b_TH, A_H, dt_bias_H):
    return qkv_TD, a_TH, b_TH, torch.zeros_like(A_H), dt_bias_H


def beta_of_one(config, qkv_TD, a_TH, b_TH, A_H, dt_bias_H):
    return qkv_TD, a_TH, torch.full_like(b_TH, 80.0), A_H, dt_bias_H


def without_dt_bias(config, qkv_TD, a_TH, b_TH, A_H, dt_bias_H):
    return qkv_TD, a_TH, b_TH, A_H, torch.zeros_like(dt_bias_H)


def heads_in_turns(config, qkv_TD, a_TH, b_TH, A_H, dt_bias_H):
    """Key heads are shared by heads 0, 2, 4 and 1, 3, 5, as if repeated whole."""
    group = config.num_heads // config.num_key_heads
    order = [g + i * config.num_key_heads for g in range(config.num_key_heads) for i in range(group)]
    qk_TD, v_TD = qkv_TD.tensor_split((2 * config.key_size,), 1)
    v_TD = v_TD.unflatten(1, (config.num_heads, -1))[:, order].flatten(1)
    return torch.cat((qk_TD, v_TD), 1), a_TH[:, order], b_TH[:, order], A_H[order], dt_bias_H[order]


def without_gate(block):
    return replace(block, sigmoid_mul=lambda x_THd, gate_THd: x_THd)


def queries_before_gates(block):
    """As if the projection had all queries, then all gates."""
    w, qkv = block.weights, block.weights.qkv

    def in_halves(x_TD):
        gated, kv = qkv(x_TD).tensor_split((2 * w.num_heads * w.head_dim,), 1)
        return torch.cat((gated.unflatten(1, (2, w.num_heads, -1)).transpose(1, 2).flatten(1), kv), 1)

    return replace(block, weights=replace(w, qkv=in_halves))


def without_shared_gate(config):
    return unread(r".*shared_expert_gate\.weight")(moe(shared_gate=False)(config))


CASES = {
    f"10-{name}-{quirk}": (name, change)
    for name in NAMES
    for quirk, change in {
        "zero-centred-norms": lambda config: replace(config, zero_centred_norms=False),
        "partly-rotated": attention(is_attention, rope=lambda old: replace(old.rope, size=32)),
        "rotated-in-halves": attention(is_attention, rope=lambda old: replace(old.rope, interleaved=True)),
        "gate-of-attention": gated(without_gate),
        "gate-behind-each-head": gated(queries_before_gates),
        "convolution": delta(without_convolution),
        "norm-before-the-gate": delta(gate_first),
        "decay": delta(delta_rule(without_decay)),
        "dt_bias": delta(delta_rule(without_dt_bias)),
        "beta": delta(delta_rule(beta_of_one)),
        "shared-key-heads": delta(delta_rule(heads_in_turns)),
    }.items()
} | {
    "10-qwen3_next-shared-expert-gate": ("qwen3_next", without_shared_gate),
    "10-qwen3_5_moe-shared-expert-gate": ("qwen3_5_moe", without_shared_gate),
    "1-qwen3_next-renormalise": ("qwen3_next", moe(renormalize=False)),
    "1-qwen3_5_moe-renormalise": ("qwen3_5_moe", moe(renormalize=False)),
}


@pytest.mark.parametrize(("name", "change"), CASES.values(), ids=CASES)
def test_a_quirk(name, change, monkeypatch):
    check_quirk(monkeypatch, name, change)


def test_rows_by_key_head(monkeypatch):
    """3: Qwen3-Next's projections have each key head's rows together."""
    ids, right = known("qwen3_next")

    def as_they_are(layout, param, module, parts, turns, *, columns):
        layout.matrix(param, (module, sum(parts)), columns=columns)

    monkeypatch.setattr(ParameterLayout, "matrix_in_turns", as_they_are)
    without = RankModel(architectures.folder("qwen3_next"), max_tokens=256)
    assert np.abs(without.logits(ids) - right).max() > DIFFERS


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_loaded_must_be_named(name, monkeypatch):
    """3: tensors of images and of multi-token prediction."""
    config = replace(read_model_config(architectures.folder(name), "float32"), ignored_tensors=())
    monkeypatch.setattr(bench_rank_model, "read_model_config", lambda folder, *_: config)
    with pytest.raises(ValueError, match=r"mtp\.|model\.visual"):
        RankModel(architectures.folder(name), max_tokens=128)


def rewritten(name, tmp_path, **changes):
    fields = json.loads((architectures.folder(name) / "config.json").read_text())
    text = fields.get("text_config", fields)
    text.update(changes)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    return read_model_config(tmp_path, "float32")


@pytest.mark.parametrize("name", NAMES)
def test_layers_by_list_or_interval(name, tmp_path):
    kinds = ["linear_attention", "linear_attention", "full_attention", "linear_attention"]
    for changes in ({"layer_types": kinds}, {"layer_types": None, "full_attention_interval": 3}):
        layers = rewritten(name, tmp_path, **changes).layers
        found = [isinstance(layer.mixer, GatedDeltaNetConfig) for layer in layers]
        assert found == [kind == "linear_attention" for kind in kinds]


@pytest.mark.parametrize("name", NAMES)
def test_transformers_own_config(name, tmp_path):
    """16: it means the same as the hub's."""
    made = architectures.model(name)
    own = made.config.to_dict() | {"architectures": [type(made).__name__], "dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps(own, default=str))
    found, hub = read_model_config(tmp_path), read_model_config(architectures.folder(name))
    assert found.layers == hub.layers


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"linear_num_value_heads": 5},
            r"linear_num_value_heads \(5\) must be a multiple of linear_num_key_heads \(2\)",
        ),
        ({"attn_output_gate": False}, "attn_output_gate must be True"),
        ({"mamba_ssm_dtype": "bfloat16"}, "mamba_ssm_dtype must be 'float32'"),
        ({"layer_types": ["sliding_attention"] * 4}, "layer_types must be a list of 4 values"),
    ],
)
def test_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        rewritten("qwen3_5", tmp_path, **changes)
