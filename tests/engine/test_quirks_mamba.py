"""Quirks of models with Mamba-2: the logits agree with transformers, and differ without any one quirk.

The numbers in the names of the cases are those of the reference's list of quirks. A quirk is removed from the parsed config or
from the bound model.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.quirks import attention, check_quirk, mixers, moe, with_ops, without_convolution

from expertwire.engine.layers.mamba2 import Mamba2
from expertwire.engine.models.mixer_configs import AttentionConfig
from expertwire.kernels.ops.variants import Rope


def is_attention(mixer):
    return isinstance(mixer, AttentionConfig)


def mamba(change):
    return mixers(Mamba2, change)


def gate_behind_the_norm(mixer):
    norm = mixer.context.ops.gated_rms_norm
    return with_ops(gated_rms_norm=lambda *args, gate_first: norm(*args, gate_first=False))(mixer)


def one_norm_group(mixer):
    norm = mixer.context.ops.gated_rms_norm
    width = mixer.config.inner_size
    return with_ops(gated_rms_norm=lambda x, z, weight, eps, group, **how: norm(x, z, weight, eps, width, **how))(mixer)


def without_convolution_bias(mixer):
    return replace(mixer, conv_bias_D=torch.zeros_like(mixer.conv_bias_D))


def weights(**changes):
    """Change the weights of each head; a callable gets the old value."""

    def change(mixer):
        found = {name: value(getattr(mixer.weights, name)) for name, value in changes.items()}
        return replace(mixer, weights=replace(mixer.weights, **found))

    return mamba(change)


def scale(**fields):
    return lambda config: replace(config, **{name: value(getattr(config, name)) for name, value in fields.items()})


MAMBA = {
    "norm-behind-the-gate": mamba(gate_behind_the_norm),
    "convolution": mamba(without_convolution),
    "convolution-bias": mamba(without_convolution_bias),
    "D": weights(D_H=torch.zeros_like),
    "dt_bias": weights(dt_bias_H=torch.zeros_like),
    "decay": weights(A_H=torch.zeros_like),
    "decay-by-head": weights(A_H=lambda A_H: A_H.mean().expand_as(A_H).contiguous()),
}
CASES = {
    **{
        f"11-{name}-{quirk}": (name, change)
        for name in ("nemotron_h", "nemotron3_super")
        for quirk, change in MAMBA.items()
    },
    **{f"12-granite_h-{quirk}": ("granite_h", change) for quirk, change in MAMBA.items()},
    "11-nemotron_h-norm-groups": ("nemotron_h", mamba(one_norm_group)),
    "12-granite_h_dense-norm-groups": ("granite_h_dense", mamba(one_norm_group)),
    "11-nemotron_h-no-positions": ("nemotron_h", attention(is_attention, rope=Rope(theta=1e4, size=32))),
    "1c-nemotron3_nano-scale": ("nemotron3_nano", moe(scale=1.0)),
    "1c-nemotron3_nano-renormalized": ("nemotron3_nano", moe(renormalize=False)),
    "1c-nemotron3_nano-sigmoid": ("nemotron3_nano", moe(score="softmax")),
    "1b-granite_h-softmax-of-the-chosen": ("granite_h", moe(renormalize=False)),
    "12-granite_h-embedding-multiplier": ("granite_h", scale(embedding_scale=lambda old: old / 12)),
    "12-granite_h-residual-multiplier": ("granite_h", scale(embedding_scale=lambda old: old * 0.22)),
    "12-granite_h-epsilon-of-the-stream": ("granite_h", scale(rms_norm_eps=lambda old: old * 0.22**2)),
    "12-granite_h-attention-multiplier": ("granite_h", attention(is_attention, scale=None)),
    "12-granite_h-logits-scaling": ("granite_h", scale(logits_scale=lambda old: 1.0)),
    "12-granite_h-no-positions": ("granite_h", attention(is_attention, rope=Rope(theta=1e4, size=32))),
    "12-granite_h_dense-rotated": ("granite_h_dense", attention(is_attention, rope=None)),
}


@pytest.mark.parametrize(("name", "change"), CASES.values(), ids=CASES)
def test_a_quirk(name, change, monkeypatch):
    check_quirk(monkeypatch, name, change)
