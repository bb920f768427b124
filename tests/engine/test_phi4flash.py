"""Phi-4-mini-flash: its quirks against a reference of our own, and that reference's blocks against transformers.

`test_architectures.py` has the logits at prompts up to 300 tokens, chunks, greedy tokens and ranks.
"""

import expertwire  # noqa: F401  # isort: skip  (first: transformers must not take our `kernels` for another package's)

import functools
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import architectures, quirks, reference_phi4flash
from helpers import tiny_checkpoints as tiny
from helpers.hub_configs import PHI_4_MINI_FLASH, read
from helpers.rank_model import RankModel
from safetensors.torch import load_file, save_file
from transformers import DiffLlamaConfig, MambaConfig
from transformers.models.diffllama.modeling_diffllama import DiffLlamaAttention
from transformers.models.mamba.modeling_mamba import MambaMixer

from expertwire.bench.serving import rank_model as bench_rank_model
from expertwire.engine.layers import attention, differential_attention
from expertwire.engine.layers.differential_attention import DifferentialAttention
from expertwire.engine.layers.step import LayerContext, Step
from expertwire.engine.models.mixer_configs import DifferentialAttentionConfig, GatedMemoryConfig
from expertwire.engine.models.mixer_configs import MambaConfig as OurMambaConfig
from expertwire.engine.models.registry import read_model_config
from expertwire.kernels import registry
from expertwire.kernels.ops import attention as attention_op
from expertwire.kernels.ops import rotary
from expertwire.kernels.ops.attention import AttentionOptions
from expertwire.kernels.ops.variants import Rope

NAME, NUM_TOKENS = "phi4_flash", 100
AGREES, DIFFERS = 1e-3, 1e-2
MEMORY, FULL = 6, 7  # layers of the tiny model whose scan and whose cache the later ones read


@functools.cache
def known():
    """A prompt, and the reference's logits, with which the model's agree."""
    ids = tiny.prompt(NUM_TOKENS, vocab_size=320)
    right = architectures.reference_logits(NAME, ids)
    assert np.abs(RankModel(architectures.folder(NAME)).logits(ids) - right).max() <= AGREES
    return ids, right


def of_config(config, monkeypatch):
    monkeypatch.setattr(bench_rank_model, "read_model_config", lambda folder, *_: config)
    return RankModel(architectures.folder(NAME))


# ---- longer prompts, other cuts


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_long_prompts_in_any_cut(dtype):
    """Snapshots every 128 tokens; steps of one token, of 7 and 64, and micro-batches give the same bits."""
    folder, ids = architectures.folder(NAME), tiny.prompt(600, seed=3, vocab_size=320)
    model = RankModel(folder, dtype, max_tokens=1024)
    whole = model.logits(ids)
    if dtype == "float32":
        assert np.abs(whole - architectures.reference_logits(NAME, ids)).max() <= AGREES
    for chunk, num in ((1, 140), (7, 600), (64, 600)):
        assert np.array_equal(model.logits(ids[:num], chunk), whole[:num]), chunk
    in_two = RankModel(folder, dtype, max_tokens=1024, num_micro_batches=2)
    assert np.array_equal(in_two.logits(ids), whole)
    assert np.array_equal(in_two.logits(ids, 150), whole)


def test_an_fp8_cache_is_close():
    ids, right = known()
    found = RankModel(architectures.folder(NAME), kv_cache_dtype="fp8").logits(ids)
    error = np.abs(found - right)
    assert 1e-3 < error.mean() < 0.5


# ---- quirks that the config says


def of_layers(change):
    """Change the mixer of each layer: from its number and mixer."""

    def changed(config):
        layers = [replace(layer, mixer=change(i, layer.mixer)) for i, layer in enumerate(config.layers)]
        return replace(config, layers=tuple(layers))

    return changed


def of_kind(kind, where=lambda i, mixer: True, **fields):
    def change(i, mixer):
        if not isinstance(mixer, kind) or not where(i, mixer):
            return mixer
        return replace(mixer, **{name: value(i) if callable(value) else value for name, value in fields.items()})

    return of_layers(change)


of_attention = functools.partial(of_kind, DifferentialAttentionConfig)


def lambda_init(i):
    return 0.8 - 0.6 * math.exp(-0.3 * i)


def memory_of_layer_4(config):
    config = of_kind(OurMambaConfig, lambda i, _: i == 4, gives_memory=True)(config)
    return of_kind(GatedMemoryConfig, memory_layer=4)(config)


def without_biases_of_norms(config):
    return replace(quirks.unread(r".*layernorm\.bias")(config), norm="rms")


CONFIGS = {
    "lambda-init-counts-from-0": of_attention(lambda_init=lambda i: lambda_init(i + 1)),
    "lambda-init-counts-all-layers": of_attention(lambda_init=lambda i: lambda_init(i // 2)),
    "lambda-init-goes-on-in-the-second-half": of_attention(
        lambda i, _: i > FULL, lambda_init=lambda i: lambda_init(i - 8)
    ),
    "sub-norm-has-its-own-eps": of_attention(norm_eps=0.05),
    "window": of_attention(window=None),
    "window-counts-the-token": of_attention(lambda _, mixer: mixer.window is not None, window=41),
    "the-layer-behind-the-middle-has-no-window": of_attention(lambda i, _: i == FULL, window=40),
    "cross-attention-reads-the-middle-layer": of_attention(lambda i, _: i > FULL, kv_layer=5),
    "memory-of-the-last-mamba-layer": memory_of_layer_4,
    "norms-have-means-and-biases": without_biases_of_norms,
    "eps-of-norms": lambda config: replace(config, rms_norm_eps=1e-5),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_quirk_of_the_config(case, monkeypatch):
    ids, right = known()
    config = CONFIGS[case](read_model_config(architectures.folder(NAME), "float32"))
    without = of_config(config, monkeypatch).logits(ids)
    assert np.isfinite(without).all()
    assert np.abs(without - right).max() > DIFFERS


# ---- quirks of the layers


def replaced(model, kind, change):
    """Change the bound mixers of a kind of config."""
    for i, layer in enumerate(model.model.layers):
        if isinstance(layer.mixer.__self__.config, kind):
            model.model.layers[i] = replace(layer, mixer=change(layer.mixer.__self__).forward)


def without_output_factor(model, monkeypatch):
    def change(mixer):
        return replace(mixer, norm_p=mixer.norm_p / (1 - mixer.config.lambda_init))

    replaced(model, DifferentialAttentionConfig, change)


def without_learned_lambda(model, monkeypatch):
    def change(mixer):
        return replace(mixer, lambda_full=torch.tensor(mixer.config.lambda_init))

    replaced(model, DifferentialAttentionConfig, change)


def lambda_of_zero(model, monkeypatch):
    replaced(model, DifferentialAttentionConfig, lambda mixer: replace(mixer, lambda_full=torch.tensor(0.0)))


def scale_of_the_pair(model, monkeypatch):
    def change(mixer):
        return replace(mixer, options=replace(mixer.options, scale=(2 * mixer.config.head_dim) ** -0.5))

    replaced(model, DifferentialAttentionConfig, change)


def without_d(model, monkeypatch):
    """The memory without the term of D."""
    seen = {}

    def change(mixer):
        scan = mixer.context.ops.selective_scan

        def watched(x, *others):
            seen["skipped"] = mixer.weights.skip_D * x
            return scan(x, *others)

        return replace(mixer, context=replace(mixer.context, ops=replace(mixer.context.ops, selective_scan=watched)))

    replaced(model, OurMambaConfig, change)
    keep = Step.keep
    monkeypatch.setattr(Step, "keep", lambda step, layer, value: keep(step, layer, value - seen["skipped"]))


def gated_memory(model, monkeypatch):
    """The memory behind the gate, as the published fallback without CUDA has it."""
    seen = {}

    def change(mixer):
        def watched(normed):
            projected = mixer.in_proj(normed)
            seen["gate"] = F.silu(projected.chunk(2, dim=1)[1])
            return projected

        return replace(mixer, in_proj=watched)

    replaced(model, OurMambaConfig, change)
    keep = Step.keep
    monkeypatch.setattr(Step, "keep", lambda step, layer, value: keep(step, layer, value * seen["gate"]))


LAYERS = {
    "factor-of-the-output": without_output_factor,
    "lambda-is-learned": without_learned_lambda,
    "lambda-is-subtracted": lambda_of_zero,
    "scale-of-one-head": scale_of_the_pair,
    "memory-has-the-d-term": without_d,
    "memory-has-no-gate": gated_memory,
}


@pytest.mark.parametrize("case", LAYERS)
def test_a_quirk_of_a_layer(case, monkeypatch):
    ids, right = known()
    model = RankModel(architectures.folder(NAME))
    LAYERS[case](model, monkeypatch)
    without = model.logits(ids)
    assert np.isfinite(without).all()
    assert np.abs(without - right).max() > DIFFERS


def test_there_are_no_positions(monkeypatch):
    ids, right = known()
    for module in (attention, differential_attention):
        monkeypatch.setattr(module, "NO_ROPE", Rope(theta=10000.0, size=24))
    assert np.abs(RankModel(architectures.folder(NAME)).logits(ids) - right).max() > DIFFERS


# ---- quirks of the tensors: another order of rows is another meaning


def rows_of_heads(tensor, order, start, size=12):
    """Return the rows of heads of `size` numbers from row `start` on in another order, and the rest as it is."""
    heads = tensor[start : start + len(order) * size].unflatten(0, (len(order), size))[list(order)].flatten(0, 1)
    return torch.cat((tensor[:start], heads, tensor[start + len(order) * size :]))


def queries(order):
    return lambda name, tensor: rows_of_heads(tensor, order, 0) if ".Wqkv." in name else tensor


def values(order):
    def change(name, tensor):
        return rows_of_heads(tensor, order, 12 * 12) if ".Wqkv." in name and len(tensor) == 16 * 12 else tensor

    return change


def parts(name_end, first, second):
    """Swap two parts of some rows."""

    def change(name, tensor):
        if not name.endswith(name_end):
            return tensor
        a, b, rest = tensor.split((first, second, len(tensor) - first - second))
        return torch.cat((b, a, rest)) if first == second else torch.cat((b[:first], a, b[first:], rest))

    return change


TENSORS = {
    "queries-are-paired-with-neighbours": queries((0, 4, 1, 5, 2, 6, 3, 7)),
    "two-pairs-of-queries-share-one-of-keys": queries((0, 1, 4, 5, 2, 3, 6, 7)),
    "the-second-of-a-pair-is-subtracted": queries((1, 0, 3, 2, 5, 4, 7, 6)),
    "values-of-a-pair-are-in-order": values((1, 0, 3, 2)),
    "gate-comes-before-up": parts("fc1.weight", 112, 112),
    "x-comes-before-z": parts("in_proj.weight", 192 // 2, 192 // 2),
    "dt-b-c": parts("x_proj.weight", 6, 16),
}


@pytest.mark.parametrize("case", TENSORS)
def test_a_quirk_of_the_tensors(case, tmp_path):
    ids, right = known()
    folder = architectures.folder(NAME)
    tensors = load_file(folder / "model.safetensors")
    changed = {name: TENSORS[case](name, tensor).contiguous() for name, tensor in tensors.items()}
    assert any(not torch.equal(changed[name], tensor) for name, tensor in tensors.items())
    save_file(changed, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    assert np.abs(RankModel(tmp_path).logits(ids) - right).max() > DIFFERS


# ---- checkpoints and configs


def test_a_tied_head_may_be_there_and_the_field_missing(tmp_path):
    folder = architectures.folder(NAME)
    tensors = load_file(folder / "model.safetensors")
    save_file(
        tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, tmp_path / "model.safetensors"
    )
    config = json.loads((folder / "config.json").read_text())
    del config["tie_word_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    ids, _ = known()
    assert np.array_equal(RankModel(tmp_path).logits(ids), RankModel(folder).logits(ids))


def test_the_published_config(tmp_path):
    config = read(tmp_path, PHI_4_MINI_FLASH)
    mixers = [layer.mixer for layer in config.layers]
    assert [i for i, mixer in enumerate(mixers) if isinstance(mixer, OurMambaConfig)] == list(range(0, 17, 2))
    assert {mixer.memory_layer for mixer in mixers[18::2]} == {16} and mixers[16].gives_memory
    assert mixers[0] == OurMambaConfig(inner_size=5120, state_size=16, dt_rank=160, conv_kernel=4)
    assert [mixer.window for mixer in mixers[1::2]] == [512] * 8 + [None] * 8
    assert [mixer.kv_layer for mixer in mixers[1::2]] == [None] * 9 + [17] * 7
    assert (mixers[1].num_heads, mixers[1].num_kv_heads, mixers[1].head_dim) == (40, 20, 64)
    full, window, state = config.cache_specs()
    assert (full.writers, full.readers) == ((17,), tuple(range(17, 32, 2)))
    assert (full.bytes_per_token, window.bytes_per_token) == (5120, 8 * 5120)
    assert window.readers == window.writers == tuple(range(1, 16, 2)) and window.window == 512
    assert (state.writers, state.bytes_per_token) == (tuple(range(0, 17, 2)), 9 * 5120 * (3 * 2 + 16 * 4))
    assert (config.eos_token_ids, config.rms_norm_eps, config.norm) == ((199999,), 1e-5, "layer")


def test_windows_may_be_a_list(tmp_path):
    windows = [512 if i % 2 and i < 16 else None for i in range(32)]
    assert read(tmp_path, PHI_4_MINI_FLASH | {"sliding_window": windows}) == read(tmp_path, PHI_4_MINI_FLASH)
    windows[3] = None
    assert read(tmp_path, PHI_4_MINI_FLASH | {"sliding_window": windows}).layers[3].mixer.window is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 30}, "num_hidden_layers must be a multiple of 4, got 30"),
        ({"num_key_value_heads": 5}, "num_key_value_heads must be even, as heads are pairs, got 5"),
        ({"num_attention_heads": 60, "num_key_value_heads": 60}, r"hidden_size \(2560\) must be a multiple of"),
        ({"mb_per_layer": 3}, "mb_per_layer must be 2, got 3"),
        ({"mlp_bias": True}, "mlp_bias must be False, got True"),
        ({"sliding_window": [512] * 32}, "sliding_window must be an integer >= 1, or a list of one for each of 32"),
        ({"sliding_window": [512] * 8}, "sliding_window must be an integer >= 1, or a list of one for each of 32"),
        ({"sliding_window": None}, "the field 'sliding_window' is missing"),
        ({"layer_norm_eps": None}, "the field 'layer_norm_eps' is missing"),
    ],
)
def test_what_is_not_supported(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, PHI_4_MINI_FLASH | change)


# ---- blocks that transformers has

LAYER, HEADS, KV_HEADS, DIM = 3, 8, 4, 12


def halves_to_neighbours(heads):
    """Return the order of heads in which heads j and j + half, transformers' pairs, are neighbours."""
    return [j + part * heads // 2 for j in range(heads // 2) for part in (0, 1)]


@functools.cache
def diff_llama():
    """DiffLlama's attention, its weights as one matrix in our order, and its result for random rows without positions."""
    torch.manual_seed(1)
    config = DiffLlamaConfig(
        hidden_size=96,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=DIM,
        rms_norm_eps=1e-5,
        attn_implementation="eager",
    )
    block, rows = DiffLlamaAttention(config, LAYER).eval(), torch.randn(70, 96)
    projections = ((block.q_proj, HEADS), (block.k_proj, KV_HEADS), (block.v_proj, KV_HEADS))
    reordered = [p.weight.view(n, DIM, -1)[halves_to_neighbours(n)].flatten(0, 1) for p, n in projections]
    mask = torch.full((70, 70), -math.inf).triu(1)[None, None]
    with torch.no_grad():
        still = torch.ones(1, 70, DIM), torch.zeros(1, 70, DIM)
        return block, torch.cat(reordered).detach(), rows, block(rows[None], still, attention_mask=mask)[0][0]


def lambdas(block):
    return {name: getattr(block, name).detach() for name in ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")}


def test_the_references_attention_is_diff_llamas():
    block, qkv, rows, expected = diff_llama()
    config = reference_phi4flash.Phi4FlashConfig(num_attention_heads=HEADS, num_key_value_heads=KV_HEADS)
    ours = reference_phi4flash.DiffAttention(config, LAYER, None, cross=False)
    weights = {f"inner_cross_attn.{name}": values for name, values in lambdas(block).items()}
    weights |= {"Wqkv.weight": qkv, "out_proj.weight": block.o_proj.weight}
    ours.load_state_dict(weights, strict=False)
    with torch.no_grad():
        ours.Wqkv.bias.zero_()
        ours.out_proj.bias.zero_()
        torch.testing.assert_close(ours(rows, None)[0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ops", [registry.choose("cpu"), registry.plain()], ids=["cpu", "torch"])
def test_the_layers_attention_is_diff_llamas(ops):
    block, qkv, rows, expected = diff_llama()
    q1, k1, q2, k2 = lambdas(block).values()
    context = LayerContext(
        ops=ops, dtype=torch.float32, layer=0, caches=(0,), fp8_cache=False, norm=torch.ones(96), eps=1e-5
    )
    layer = DifferentialAttention(
        config=DifferentialAttentionConfig(
            num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=DIM, lambda_init=lambda_init(LAYER)
        ),
        context=context,
        options=AttentionOptions(scale=DIM**-0.5),
        qkv=lambda x: x @ qkv.t(),
        output=lambda x: x @ block.o_proj.weight.detach().t(),
        lambda_full=(q1 @ k1).exp() - (q2 @ k2).exp() + lambda_init(LAYER),
        norm_p=torch.full((2 * DIM,), 1 - lambda_init(LAYER)),
    )
    table = torch.tensor([[2, 5, 1, 3, 4]], dtype=torch.int32)
    slots = (table[0, :, None] * 16 + torch.arange(16)).flatten()[:70].long()
    batch = SimpleNamespace(
        attention_metadata=[attention_op.describe([70], [70], table, slot_mapping=slots)],
        positions_T=torch.arange(70),
        is_long_T=None,
    )
    caches = [SimpleNamespace(layers={0: tuple(torch.zeros(6, 16, KV_HEADS // 2, 2 * DIM) for _ in range(2))})]
    step = Step(batch=batch, caches=caches, tables={attention.NO_ROPE: rotary.tables(80, attention.NO_ROPE, "cpu")})
    found, _ = layer.forward(torch.zeros_like(rows), rows, step)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)


def test_the_references_mamba_is_transformers():
    torch.manual_seed(2)
    theirs = MambaMixer(MambaConfig(hidden_size=96, state_size=16, expand=2, conv_kernel=4), 0)
    ours = reference_phi4flash.Mamba(96)
    with torch.no_grad():
        for values_of in theirs.parameters():
            values_of.copy_(torch.randn_like(values_of) * 0.15)
        ours.load_state_dict(theirs.state_dict())
        rows = torch.randn(70, 96)
        torch.testing.assert_close(ours(rows)[0], theirs(rows[None])[0], rtol=1e-5, atol=1e-5)
