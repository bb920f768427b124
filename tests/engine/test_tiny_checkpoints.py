"""The tiny checkpoints that other tests rely on: hub names, and no tensor whose loss would go unseen."""

import numpy as np
import pytest
from helpers import tiny_checkpoints as tiny

from expertwire.engine.loader.checkpoint import Checkpoint

VARIANTS = [
    ("mixtral", {}),
    ("qwen3_moe", {}),
    ("qwen3_moe", {"norm_topk_prob": False}),
    ("qwen3", {}),
    ("qwen3", {"tie_word_embeddings": True}),
    ("qwen3", {"attention_bias": True}),
]


@pytest.mark.parametrize(("kind", "overrides"), VARIANTS)
def test_every_tensor_moves_the_logits(kind, overrides):
    folder = tiny.cached(kind, **overrides)
    changes = tiny.sensitivity(folder)
    assert set(changes) == set(Checkpoint(folder).tensors)
    assert min(changes.values()) > 0.1, sorted(changes.items(), key=lambda item: item[1])[:5]
    assert 2 < tiny.reference_logits(folder, tiny.prompt(100)).std() < 4


def test_names_are_the_hubs():
    mixtral = Checkpoint(tiny.cached("mixtral"))
    assert mixtral.tensors["model.layers.2.block_sparse_moe.experts.7.w1.weight"].shape == (96, 64)
    assert mixtral.tensors["model.layers.2.block_sparse_moe.experts.7.w2.weight"].shape == (64, 96)
    assert mixtral.tensors["model.layers.0.block_sparse_moe.gate.weight"].shape == (8, 64)
    qwen = Checkpoint(tiny.cached("qwen3_moe"))
    assert qwen.tensors["model.layers.0.mlp.experts.7.gate_proj.weight"].shape == (64, 96)
    assert qwen.tensors["model.layers.1.mlp.down_proj.weight"].shape == (96, 112)
    assert qwen.tensors["model.layers.3.self_attn.q_norm.weight"].shape == (32,)
    assert "lm_head.weight" not in Checkpoint(tiny.cached("qwen3", tie_word_embeddings=True)).tensors


def test_styles_shards_and_greedy_agree():
    ids = tiny.prompt(20)
    folders = [tiny.cached("mixtral"), tiny.cached("mixtral", config_style="v5", shards=3)]
    whole, sharded = (tiny.reference_logits(folder, ids) for folder in folders)
    np.testing.assert_array_equal(whole, sharded)
    greedy, gaps = tiny.reference_greedy(folders[0], ids, 8)
    for i, (token, gap) in enumerate(zip(greedy, gaps, strict=True)):
        best = np.sort(tiny.reference_logits(folders[0], ids + greedy[:i])[-1])
        assert tiny.reference_logits(folders[0], ids + greedy[:i])[-1].argmax() == token
        assert gap == pytest.approx(best[-1] - best[-2], abs=1e-3)


def test_safe_prompts_keep_away_from_ties():
    folder = tiny.cached("qwen3_moe")
    ids = tiny.safe_prompt(folder, 50, seed=4)
    assert (len(ids), ids) == (50, tiny.safe_prompt(folder, 50, seed=4))
    assert tiny.router_margin(folder, ids) > 3e-4
    assert tiny.router_margin(tiny.cached("qwen3"), ids) == np.inf


def test_equal_options_are_made_once_and_seeds_differ():
    assert tiny.cached("qwen3", seed=1) == tiny.cached("qwen3", seed=1)
    first, second = (tiny.reference_logits(tiny.cached("qwen3", seed=seed), [1, 2, 3]) for seed in (1, 2))
    assert np.abs(first - second).max() > 0.1
