"""Quirks of dense models: the logits agree with transformers, and differ without any one quirk.

The numbers in the names of the cases are those of the reference's list of quirks.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import architectures
from helpers import tiny_checkpoints as tiny
from helpers.quirks import AGREES, attention, check_quirk, known, of_config, rope, scaling, unread
from helpers.rank_model import RankModel
from safetensors.torch import load_file, save_file

from expertwire.engine.models.registry import read_model_config
from expertwire.kernels.ops.variants import LongRope

DENSE = ["llama", "mistral", "ministral3", "qwen3", "phi3", "phi4_mini", "phi4_mini_short"]


def without_scaling_in_one_layer(config):
    first, _, *others = config.layers
    return replace(config, layers=(first, attention(query_scaling=None)(config).layers[1], *others))


def without_head_norms(config):
    return unread(r".*[qk]_norm\.weight")(attention(qk_norm="none")(config))


def other_list(config):
    old = config.layers[0].mixer.rope.scaling
    return scaling(short_factor=old.long_factor, long_factor=old.short_factor)(config)


def all_rotated(config):
    old = config.layers[0].mixer.rope.scaling
    longer = {name: getattr(old, name) + (1.0,) * 4 for name in ("short_factor", "long_factor")}
    return rope(size=32, scaling=replace(old, **longer))(config)


CASES = {
    "8-ministral3-query-scaling": ("ministral3", attention(query_scaling=None)),
    "8-ministral3-query-scaling-of-every-layer": ("ministral3", without_scaling_in_one_layer),
    "8-ministral3-query-scaling-without-offset": (
        "ministral3",
        attention(query_scaling=lambda old: replace(old.query_scaling, offset=1)),
    ),
    "ministral3-yarn": ("ministral3", rope(scaling=None)),
    "ministral3-yarn-attention-factor-of-one": ("ministral3", scaling(mscale=None, mscale_all_dim=None)),
    "ministral3-rotated-in-halves": ("ministral3", rope(interleaved=True)),
    "llama-llama3-scaling": ("llama", rope(scaling=None)),
    "llama-llama3-low-frequencies": ("llama", scaling(low_freq_factor=0.01)),
    "llama-llama3-high-frequencies": ("llama", scaling(high_freq_factor=100.0)),
    "llama-rotated-in-halves": ("llama", rope(interleaved=True)),
    "mistral-window": ("mistral", attention(window=None)),
    "mistral-window-counts-the-token": ("mistral", attention(window=41)),
    "qwen3-window-of-the-last-layers": ("qwen3", attention(window=None)),
    "qwen3-no-window-of-the-first-layers": ("qwen3", attention(window=40)),
    "qwen3-qk-norm": ("qwen3", without_head_norms),
    "phi3-window": ("phi3", attention(window=None)),
    "13-phi4_mini-partly-rotated": ("phi4_mini", all_rotated),
    "phi4_mini-longrope": ("phi4_mini", rope(scaling=None)),
    "phi4_mini-longrope-long-list": ("phi4_mini", other_list),
    "phi4_mini-longrope-attention-factor": ("phi4_mini", scaling(attention_factor=1.0)),
    "phi4_mini-longrope-short-list": ("phi4_mini_short", other_list),
    "phi4_mini-longrope-attention-factor-with-the-short-list": ("phi4_mini_short", scaling(attention_factor=1.0)),
}


@pytest.mark.parametrize(("name", "change"), CASES.values(), ids=CASES)
def test_a_quirk(name, change, monkeypatch):
    check_quirk(monkeypatch, name, change)


@pytest.mark.parametrize("max_tokens", [16, 256])
@pytest.mark.parametrize("length", [15, 16, 17, 100])
def test_each_prompt_chooses_its_list(length, max_tokens):
    """LongRoPE: whatever is served besides."""
    folder, ids = architectures.folder("phi4_mini"), tiny.prompt(min(length, max_tokens))
    right = architectures.reference_logits("phi4_mini", ids)
    assert isinstance(read_model_config(folder).layers[0].mixer.rope.scaling, LongRope)
    assert np.abs(RankModel(folder, max_tokens=max_tokens).logits(ids) - right).max() <= AGREES


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi4_mini"])
def test_tied_embeddings(name, monkeypatch):
    """14: they are the head, of which the checkpoint has none."""
    config = replace(read_model_config(architectures.folder(name), "float32"), tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"tensors that are missing: lm_head\.weight$"):
        of_config(monkeypatch, name, config)


def test_a_tied_head_may_still_be_there(tmp_path):
    """14: the same tensor twice."""
    folder = architectures.folder("llama")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    ids, right = known("llama")
    assert np.abs(RankModel(tmp_path, max_tokens=256).logits(ids) - right).max() <= AGREES


def test_other_tensors_of_the_wrapper(monkeypatch):
    config = replace(read_model_config(architectures.folder("ministral3"), "float32"), ignored_tensors=())
    with pytest.raises(ValueError, match=r"does not know .*: (multi_modal_projector|vision_tower)\..*, (mul|vis)"):
        of_config(monkeypatch, "ministral3", config)


@pytest.mark.parametrize(
    ("prefix", "head"), [("language_model.model.", "language_model."), ("model.language_model.", "")]
)
def test_wrapped_mistral(tmp_path, prefix, head):
    """Mistral Small 3.1: the text config, in which the word on tied embeddings is missing, and both names of its tensors."""
    folder = architectures.folder("mistral")
    tensors = load_file(folder / "model.safetensors")
    renamed = {
        (f"{prefix}{name.removeprefix('model.')}" if name.startswith("model.") else head + name): values
        for name, values in tensors.items()
    }
    assert len(renamed) == len(tensors)
    save_file(renamed | {"vision_tower.ln_pre.weight": torch.ones(3)}, tmp_path / "model.safetensors")
    text = json.loads((folder / "config.json").read_text())
    del text["tie_word_embeddings"], text["architectures"]
    wrapper = {"architectures": ["Mistral3ForConditionalGeneration"], "torch_dtype": "float32", "text_config": text}
    (tmp_path / "config.json").write_text(json.dumps(wrapper))
    ids, _ = known("mistral")
    alone = RankModel(folder, max_tokens=256).logits(ids)
    assert np.array_equal(RankModel(tmp_path, max_tokens=256).logits(ids), alone)


@pytest.mark.parametrize("name", DENSE)
def test_both_styles(name, tmp_path):
    """16: transformers 5's own file means the same as the hub's."""
    made = architectures.model(name)
    own = made.config.to_dict() | {"architectures": [type(made).__name__], "dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps(own))
    found, hub = read_model_config(tmp_path), read_model_config(architectures.folder(name))
    of_wrapper = {"architecture": hub.architecture, "tensor_names": hub.tensor_names}
    assert replace(found, ignored_tensors=(), **of_wrapper) == replace(hub, ignored_tensors=())
