"""Checkpoints in every published format, experts one by one and fused, against transformers on weights dequantised here."""

import json

import numpy as np
import pytest
import torch
from helpers import architectures
from helpers import tiny_checkpoints as tiny
from helpers.published_formats import e2m1, fp8_modelopt, nvfp4, whole
from helpers.rank_model import RankModel
from helpers.ranks import Ranks
from helpers.slow import slow_but
from safetensors.torch import load_file, save_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from expertwire.engine.loader.inspection import inspect
from expertwire.kernels import formats

# Neither widths nor rows are multiples of 128, so blocks at the edges are cut.
CONFIG = Qwen3MoeConfig(
    vocab_size=320,
    hidden_size=96,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    num_hidden_layers=3,
    intermediate_size=160,
    moe_intermediate_size=160,
    num_experts=4,
    num_experts_per_tok=2,
    norm_topk_prob=True,
    mlp_only_layers=[1],
    max_position_embeddings=1024,
    rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    attn_implementation="eager",
)
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}
INT4_WEIGHTS = {"num_bits": 4, "type": "int", "group_size": 32, "symmetric": True, "strategy": "group"}
CHANNEL_WEIGHTS = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}


# ---- what the checkpoints hold: of a matrix [M, K] its tensors by suffix, and the matrix that they stand for


def blocks(w, exponents=False):
    M, K = w.shape
    scales = torch.zeros(-(-M // 128), -(-K // 128))
    data, right = torch.zeros(M, K, dtype=torch.float8_e4m3fn), torch.zeros(M, K)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            at = (slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
            scale = w[at].abs().max() / 448
            scales[i, j] = torch.exp2(scale.log2().ceil()) if exponents else scale
            data[at] = (w[at] / scales[i, j]).to(data.dtype)
            right[at] = data[at].float() * scales[i, j]
    return data, scales, right


def fp8_block(w):
    data, scales, right = blocks(w)
    return {".weight": data, ".weight_scale_inv": scales}, right


def fp8_ue8m0(w):
    data, scales, right = blocks(w, exponents=True)
    return {".weight": data, ".scale": scales.to(torch.float8_e8m0fnu)}, right


def fp8_static(w):
    data, scale, right = whole(w, torch.bfloat16)
    return {".weight": data, ".weight_scale_inv": scale, ".activation_scale": torch.tensor(0.02).bfloat16()}, right


def fp8_channel(w):
    scales = w.abs().amax(1, keepdim=True) / 448
    data = (w / scales).to(torch.float8_e4m3fn)
    return {".weight": data, ".weight_scale": scales}, data.float() * scales


def int4(w):
    groups = w.view(len(w), -1, 32)
    scales = (groups.abs().amax(-1) / 7).bfloat16()
    codes = (groups / scales.float()[..., None]).round().clamp(-8, 7).int() + 8
    right = ((codes - 8).float() * scales.float()[..., None]).view(w.shape)
    words = (codes.view(len(w), -1, 8).long() << torch.arange(0, 32, 4)).sum(-1)
    packed = (words - (words >> 31 << 32)).int()
    return {".weight_packed": packed, ".weight_scale": scales, ".weight_shape": torch.tensor(w.shape)}, right


def mxfp4(w):
    groups = w.view(len(w), -1, 32)
    exponents = (groups.abs().amax(-1) / 6).log2().ceil()
    packed, values = e2m1(groups / exponents.exp2()[..., None])
    scales = (exponents + 127).to(torch.uint8)
    right = (values * exponents.exp2()[..., None]).view(w.shape)
    return {".weight": packed.flatten(1).view(torch.int8), ".scale": scales.view(torch.float8_e8m0fnu)}, right


# How linear layers and experts are made, and what config.json says.
FORMATS = {
    "fp8_block": (fp8_block, fp8_block, FP8),
    "fp8_ue8m0": (fp8_ue8m0, fp8_ue8m0, {**FP8, "scale_fmt": "ue8m0"}),
    "fp8_ue8m0 and mxfp4": (fp8_ue8m0, mxfp4, {**FP8, "scale_fmt": "ue8m0"}),
    "fp8_static": (fp8_static, fp8_static, {**FP8, "weight_block_size": None, "activation_scheme": "static"}),
    "fp8_modelopt": (fp8_modelopt, fp8_modelopt, {"quant_method": "modelopt", "quant_algo": "FP8"}),
    "fp8_channel": (
        fp8_channel,
        fp8_channel,
        {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "config_groups": {"g": {"weights": CHANNEL_WEIGHTS}},
        },
    ),
    "int4": (
        None,
        int4,
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"g": {"weights": INT4_WEIGHTS}},
        },
    ),
    "nvfp4": (nvfp4, nvfp4, {"quant_method": "modelopt", "quant_algo": "NVFP4"}),
}
FUSED_NAMES = {
    ".weight": "", ".weight_scale_inv": "_scale_inv", ".activation_scale": "_activation_scale",
    ".weight_scale": "_weight_scale", ".input_scale": "_input_scale", ".weight_scale_2": "_weight_scale_2",
}  # fmt: skip
FUSED = ("fp8_block", "fp8_static", "fp8_modelopt", "fp8_channel", "nvfp4")


def linears(names):
    return [n for n in names if n.endswith("_proj.weight")]


def make(folder, name, *, fused):
    """A checkpoint of random weights in a format, and transformers' model of what they stand for."""
    linear, expert, quantization = FORMATS[name]
    model = Qwen3MoeForCausalLM(CONFIG).float().eval()
    tiny._scale_weights(model, seed=0)
    state = model.state_dict()
    tensors = {n: t.clone() for n, t in state.items() if ".experts." not in n}
    for n in linears(list(tensors)) if linear is not None else []:
        stored, right = linear(tensors.pop(n))
        tensors |= {n.removesuffix(".weight") + suffix: t for suffix, t in stored.items()}
        state[n].copy_(right)
    for n in [n for n in state if ".experts." in n]:
        prefix, _, part = n.rpartition(".")
        found = []
        for e in range(CONFIG.num_experts):
            halves = state[n][e].chunk(2) if part == "gate_up_proj" else (state[n][e],)
            if fused and name != "fp8_block":  # one scale for gate and up
                halves = (state[n][e],)
            made = [expert(half.clone()) for half in halves]
            state[n][e].copy_(torch.cat([right for _, right in made]))
            names = ("gate_proj", "up_proj") if part == "gate_up_proj" else ("down_proj",)
            if fused:
                found.append(
                    {
                        s: torch.cat([stored[s] for stored, _ in made]) if len(made) > 1 else made[0][0][s]
                        for s in made[0][0]
                    }
                )
            else:
                for module, (stored, _) in zip(names, made, strict=True):
                    tensors |= {f"{prefix}.{e}.{module}{suffix}": t for suffix, t in stored.items()}
        for suffix in found[0] if fused else ():
            stacked = torch.stack([stored[suffix] for stored in found])
            tensors[n + FUSED_NAMES[suffix]] = stacked.view(-1, 1, 1) if stacked.dim() == 1 else stacked
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    fields = architectures.hub_style(CONFIG.to_dict(), "Qwen3MoeForCausalLM", quantization_config=quantization)
    if "mxfp4" in name or name == "fp8_ue8m0":
        fields["expert_dtype"] = "fp4" if "mxfp4" in name else "fp8"
    (folder / "config.json").write_text(json.dumps(fields))
    return model


def reference(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False).logits[0].numpy()


CASES = [(name, False) for name in FORMATS] + [(name, True) for name in FUSED]
KEPT = [("fp8_ue8m0 and mxfp4", False), ("int4", False), ("fp8_block", True), ("nvfp4", True)]


@pytest.mark.parametrize("case", slow_but(KEPT, CASES), ids=[f"{n}, fused" if f else n for n, f in CASES])
def test_logits_are_those_of_the_dequantised_weights(tmp_path, case):
    name, fused = case
    torch.manual_seed(0)
    model = make(tmp_path, name, fused=fused)
    rank_model = RankModel(tmp_path)
    watched = RankModel(tmp_path)
    near_tie = watched.watch_routers(2e-4)
    compared = 0
    for seed in range(20):
        ids = tiny.prompt(70, seed=seed)
        watched.logits(ids)
        if near_tie():
            continue
        expected = reference(model, ids)
        assert np.abs(rank_model.logits(ids) - expected).max() <= 1e-3
        assert np.array_equal(rank_model.logits(ids, 9), rank_model.logits(ids))
        if (compared := compared + 1) == 2:
            break
    assert compared == 2
    stored = load_file(tmp_path / "model.safetensors")
    nbytes = sum(t.nbytes for n, t in stored.items() if ".experts." in n)
    moes = [layer.moe for layer in rank_model.model.layers if layer.moe is not None]
    held = sum(t.nbytes for moe in moes for t in moe.experts.weights)
    rows = (
        2 * CONFIG.num_experts * (2 * 160 + 96)
    )  # each has a scale and a bias in fp32, which is much where rows are short
    assert held <= 1.03 * nbytes + 8 * rows, (held, nbytes)
    assert sum(inspect(tmp_path).stored_bytes.values()) <= sum(t.nbytes for t in stored.values())


def test_modelopts_file_beside_the_config_counts(tmp_path):
    model = make(tmp_path, "nvfp4", fused=False)
    fields = json.loads((tmp_path / "config.json").read_text())
    quantization = {"quant_algo": fields.pop("quantization_config")["quant_algo"], "exclude_modules": ["lm_head"]}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": quantization}))
    ids = tiny.prompt(5)
    assert np.abs(RankModel(tmp_path).logits(ids) - reference(model, ids)).max() <= 1e-3


def logits_of_rank(group, folder, ids):
    return RankModel(folder, group=group).logits(ids)


@pytest.mark.slow
def test_ranks_give_the_same_bits(tmp_path):
    make(tmp_path, "fp8_ue8m0 and mxfp4", fused=False)
    ids = tiny.prompt(40)
    with Ranks(2, timeout_s=200) as ranks:
        found = ranks.run(logits_of_rank, tmp_path, ids)
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[0], RankModel(tmp_path).logits(ids))


@pytest.mark.parametrize("suffix", [".weight_scale_inv", ".weight"])
def test_half_a_matrix_is_refused(tmp_path, suffix):
    make(tmp_path, "fp8_block", fused=False)
    tensors = load_file(tmp_path / "model.safetensors")
    name = f"model.layers.2.mlp.experts.3.up_proj{suffix}"
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"missing: {name}"):
        RankModel(tmp_path)


def test_quantised_tensors_that_the_config_does_not_mention_are_refused(tmp_path):
    make(tmp_path, "fp8_block", fused=False)
    fields = json.loads((tmp_path / "config.json").read_text())
    del fields["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"does not know these tensors: .*weight_scale_inv"):
        RankModel(tmp_path)


@pytest.mark.parametrize("name", formats.ON_THE_FLY)
def test_experts_are_quantised_on_the_fly(name):
    folder = tiny.cached("qwen3_moe")
    ids = tiny.prompt(60)
    plain, quantised = (RankModel(folder, quantize=q) for q in (None, name))
    bits = {"fp8": 8, "int4": 4.5, "mxfp4": 4.25}[name]
    sizes = []
    for model in (plain, quantised):
        moes = [layer.moe for layer in model.model.layers if layer.moe is not None]
        sizes.append(sum(t.nbytes for moe in moes for t in moe.experts.weights))
    assert sizes[1] < sizes[0] * (bits + 1.5) / 32, sizes
    right, found = (torch.from_numpy(m.logits(ids)).double().log_softmax(-1) for m in (plain, quantised))
    divergence = float((right.exp() * (right - found)).sum(-1).mean())
    assert 0 < divergence < {"fp8": 0.1, "int4": 1.0, "mxfp4": 1.5}[name], divergence
