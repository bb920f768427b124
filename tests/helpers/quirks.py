"""Quirks of models, each of which a test removes: then the logits differ from transformers'.

`attention`, `rope`, `scaling`, `moe` and `unread` return a function from a model's config to another one; `Bound` and `mixers`
change the bound model instead.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from expertwire.bench.serving import rank_model as bench_rank_model
from expertwire.engine.models.model_config import IgnoredTensors, MoeConfig
from expertwire.engine.models.registry import read_model_config
from helpers import architectures
from helpers import tiny_checkpoints as tiny
from helpers.rank_model import RankModel

AGREES, DIFFERS = 1e-3, 1e-2  # largest difference of a logit
_ROUTER_MARGIN = 2e-4
_MAX_TOKENS = 256


@dataclass(frozen=True)
class Bound:
    """A change of each layer of the bound model."""

    change: Callable[[Any], Any]


@functools.cache
def known(name, num_tokens=150):
    """Return a prompt on which rounding changes no expert, and transformers' logits, with which the model's agree."""
    watched = RankModel(architectures.folder(name), max_tokens=_MAX_TOKENS)
    near_tie = watched.watch_routers(_ROUTER_MARGIN)
    for draw in range(100):
        # Ids that the tokenizer does not know, too (quirk 14).
        ids = tiny.prompt(num_tokens, seed=draw, vocab_size=320)
        found = watched.logits(ids)
        if not near_tie():
            right = architectures.reference_logits(name, ids)
            assert np.abs(found - right).max() <= AGREES
            return ids, right
    raise AssertionError(f"{name}: no prompt keeps away from ties")


def check_quirk(monkeypatch, name, *changes, num_tokens=150):
    """Check that with all of these changes the logits differ from transformers'."""
    ids, right = known(name, num_tokens)
    config = read_model_config(architectures.folder(name), "float32", snapshot_every=128)
    for change in changes:
        config = config if isinstance(change, Bound) else change(config)
    without = of_config(monkeypatch, name, config)
    for change in changes:
        if isinstance(change, Bound):
            without.model.layers = [change.change(layer) for layer in without.model.layers]
    found = without.logits(ids)
    assert np.isfinite(found).all()
    assert np.abs(found - right).max() > DIFFERS


def of_config(monkeypatch, name, config):
    """Return the model with another config than its folder's."""
    monkeypatch.setattr(bench_rank_model, "read_model_config", lambda folder, *_: config)
    return RankModel(architectures.folder(name), max_tokens=_MAX_TOKENS)


def mixers(kind, change):
    """Change the mixers of a kind."""

    def changed(layer):
        mixer = None if layer.mixer is None else layer.mixer.__self__
        return replace(layer, mixer=change(mixer).forward) if isinstance(mixer, kind) else layer

    return Bound(changed)


def with_ops(**changed):
    """Return a change of a mixer's ops."""
    return lambda mixer: replace(mixer, context=replace(mixer.context, ops=replace(mixer.context.ops, **changed)))


def without_convolution(mixer):
    """Leave of a mixer's convolution its last tap, of the token itself."""
    weights = torch.zeros_like(mixer.conv_DK)
    weights[:, -1] = mixer.conv_DK[:, -1]
    return replace(mixer, conv_DK=weights)


def attention(where=lambda old: True, **fields):
    """Change fields of those attention layers for which `where` holds; a callable gets the old value."""

    def changed(old):
        if not where(old):
            return old
        return replace(old, **{name: value(old) if callable(value) else value for name, value in fields.items()})

    def change(config):
        layers = [replace(layer, mixer=changed(layer.mixer)) for layer in config.layers]
        return replace(config, layers=tuple(layers))

    return change


def rope(**fields):
    return attention(lambda old: old.rope is not None, rope=lambda old: replace(old.rope, **fields))


def scaling(**fields):
    return attention(rope=lambda old: replace(old.rope, scaling=replace(old.rope.scaling, **fields)))


def moe(**fields):
    def change(config):
        layers = [
            replace(layer, mlp=replace(layer.mlp, **fields)) if isinstance(layer.mlp, MoeConfig) else layer
            for layer in config.layers
        ]
        return replace(config, layers=tuple(layers))

    return change


def unread(pattern):
    """Ignore some of the checkpoint's tensors."""
    return lambda config: replace(
        config, ignored_tensors=(*config.ignored_tensors, IgnoredTensors(pattern=pattern, why="a test"))
    )
