"""Reading a checkpoint's hyperparameters: both styles of config.json (what is wrong: test_bad_configs.py)."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
from helpers import tiny_checkpoints as tiny
from helpers.hub_configs import (
    HUB_CONFIGS,
    MINISTRAL_3_8B,
    MIXTRAL_8X7B,
    PHI_4_MINI,
    QWEN3_8B,
    QWEN3_30B_A3B,
    read,
    write,
)

from expertwire.engine.models.mixer_configs import AttentionConfig
from expertwire.engine.models.model_config import LayerConfig, MlpConfig, ModelConfig, MoeConfig, QuantizationConfig
from expertwire.engine.models.registry import FAMILIES, read_model_config
from expertwire.kernels.ops.variants import LinearScaling, Llama3, LongRope, Rope, Yarn


def test_mixtral_8x7b(tmp_path):
    attention = AttentionConfig(num_heads=32, num_kv_heads=8, head_dim=128, rope=Rope(theta=1e6, size=128))
    moe = MoeConfig(num_experts=8, top_k=2, intermediate_size=14336, renormalize=True)
    assert read(tmp_path, MIXTRAL_8X7B) == ModelConfig(
        architecture="MixtralForCausalLM",
        tensor_names=FAMILIES["MixtralForCausalLM"].names,
        model_type="mixtral",
        dtype="bfloat16",
        vocab_size=32000,
        hidden_size=4096,
        layers=(LayerConfig(mixer=attention, mlp=moe),) * 32,
        rms_norm_eps=1e-5,
        max_position_embeddings=32768,
        tie_word_embeddings=False,
        eos_token_ids=(2,),
    )


def test_qwen3_30b_a3b(tmp_path):
    write(tmp_path, QWEN3_30B_A3B, {"eos_token_id": [151645, 151643]})
    rope = Rope(theta=1e6, size=128)
    attention = AttentionConfig(num_heads=32, num_kv_heads=4, head_dim=128, rope=rope, qk_norm="head")
    moe = MoeConfig(num_experts=128, top_k=8, intermediate_size=768, renormalize=True)
    assert read_model_config(tmp_path) == ModelConfig(
        architecture="Qwen3MoeForCausalLM",
        model_type="qwen3_moe",
        dtype="bfloat16",
        vocab_size=151936,
        hidden_size=2048,
        layers=(LayerConfig(mixer=attention, mlp=moe),) * 48,
        rms_norm_eps=1e-6,
        max_position_embeddings=40960,
        tie_word_embeddings=False,
        eos_token_ids=(151645, 151643),
    )


def test_qwen3_8b(tmp_path):
    config = read(tmp_path, QWEN3_8B)
    assert (config.architecture, config.num_layers, config.layers[0].mlp) == (
        "Qwen3ForCausalLM",
        36,
        MlpConfig(intermediate_size=12288),
    )
    assert (config.sparse_layers, config.num_experts, config.top_k) == ((False,) * 36, 0, 0)
    assert config.layers[0].mixer.qk_norm == "head"


def test_every_architecture_has_a_config_here(tmp_path):
    assert {config["architectures"][0] for config in HUB_CONFIGS.values()} == set(FAMILIES)
    for name, config in HUB_CONFIGS.items():
        found = read(tmp_path, config)
        text = config.get("text_config", config)
        sizes = text["vocab_size"], text["hidden_size"], text["num_hidden_layers"]
        assert (found.vocab_size, found.hidden_size, found.num_layers) == sizes, name
        assert found.model_type == text["model_type"], name


@pytest.mark.parametrize(
    ("kind", "overrides"),
    [
        ("mixtral", {}),
        ("mixtral", {"head_dim": 32, "rms_norm_eps": 1e-4, "num_experts_per_tok": 3}),
        ("qwen3_moe", {}),
        ("qwen3_moe", {"norm_topk_prob": False, "decoder_sparse_step": 2, "attention_bias": True}),
        ("qwen3", {}),
        ("qwen3", {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    ],
)
def test_both_styles_give_the_same_config(tmp_path, kind, overrides):
    hub = tiny.make(kind, tmp_path / "hub", config_style="hub", **overrides)
    v5 = tiny.make(kind, tmp_path / "v5", config_style="v5", **overrides)
    assert "rope_theta" in json.loads((hub / "config.json").read_text())
    assert "rope_parameters" in json.loads((v5 / "config.json").read_text())
    assert read_model_config(hub) == read_model_config(v5)


def test_every_override_reaches_the_config():
    config = read_model_config(tiny.cached("qwen3_moe", norm_topk_prob=False, decoder_sparse_step=2, dtype="bfloat16"))
    # Layer 1 is dense by mlp_only_layers, 0 and 2 by the step.
    assert config.sparse_layers == (False, False, False, True)
    assert (config.moe.renormalize, config.dtype, config.moe.intermediate_size) == (False, "bfloat16", 64)
    assert config.layers[0].mixer.head_dim == 32


@pytest.mark.parametrize(
    ("in_config", "generation", "expected"),
    [
        (7, None, (7,)),
        ([7, 8], None, (7, 8)),
        (7, {"eos_token_id": 9}, (9,)),
        (7, {"eos_token_id": [9, 7]}, (9, 7)),
        (7, {"temperature": 0.6}, (7,)),
        (7, {"eos_token_id": None}, (7,)),
        (None, None, ()),
    ],
)
def test_end_of_sequence_ids(tmp_path, in_config, generation, expected):
    write(tmp_path, {**QWEN3_8B, "eos_token_id": in_config}, generation)
    assert read_model_config(tmp_path).eos_token_ids == expected


@pytest.mark.parametrize(
    "change",
    [
        {"rope_scaling": {"type": "default"}},
        {"rope_scaling": {"rope_type": "default", "rope_theta": 1e6}},
        {"rope_parameters": {}, "rope_scaling": {}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 1.0}, "rope_theta": 5},
        {"use_sliding_window": True, "sliding_window": 40960},  # hides nothing
        {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 36},  # no layer slides
        {"use_sliding_window": True, "sliding_window": 4096, "layer_types": ["full_attention"] * 36},
        {"sliding_window": 4096},
        {"quantization_config": None},
    ],
)
def test_what_has_no_effect_is_accepted(tmp_path, change):
    assert read(tmp_path, {**QWEN3_8B, **change}) == read(tmp_path, QWEN3_8B)


# ---- rotary embedding, windows, wrappers


def attention_of(folder, name, layer=0, **changes):
    return read(folder, {**HUB_CONFIGS[name], **changes}).layers[layer].mixer


def test_rotary_scalings(tmp_path):
    llama3 = Llama3(factor=8, low_freq_factor=1, high_freq_factor=4, original_max_position=8192)
    assert attention_of(tmp_path, "llama").rope == Rope(theta=5e5, size=128, scaling=llama3)
    yarn = Yarn(factor=4, original_max_position=32768)
    given = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    assert attention_of(tmp_path, "qwen3", rope_scaling=given).rope == Rope(theta=1e6, size=128, scaling=yarn)
    full = {
        "beta_fast": 16,
        "beta_slow": 2,
        "mscale": 0,
        "mscale_all_dim": 0.5,
        "attention_factor": 1.5,
        "truncate": False,
    }
    expected = replace(
        yarn, beta_fast=16, beta_slow=2, mscale=0, mscale_all_dim=0.5, attention_factor=1.5, truncate=False
    )
    assert attention_of(tmp_path, "qwen3", rope_scaling=given | full).rope.scaling == expected
    linear = attention_of(tmp_path, "qwen3", rope_scaling={"rope_type": "linear", "factor": 2}).rope
    assert linear.scaling == LinearScaling(factor=2)


@pytest.mark.parametrize("kind", ["longrope", "su"])
def test_phi_4_mini_rotates_three_quarters_by_two_lists(tmp_path, kind):
    scaling = {**PHI_4_MINI["rope_scaling"], "type": kind}
    rope = attention_of(tmp_path, "phi3", rope_scaling=scaling).rope
    expected = LongRope(
        short_factor=(1.0,) * 48,
        long_factor=tuple(range(1, 49)),
        original_max_position=4096,
        max_position=131072,
    )
    assert rope == Rope(theta=1e4, size=96, scaling=expected)


@pytest.mark.parametrize(
    ("name", "changes", "slides"),
    [
        ("mistral", {}, [True] * 32),
        ("mixtral", {"sliding_window": 4096}, [True] * 32),
        (
            "qwen3",
            {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 28},
            [False] * 28 + [True] * 8,
        ),
        (
            "qwen3",
            {
                "use_sliding_window": True,
                "sliding_window": 4096,
                "layer_types": ["sliding_attention", "full_attention"] * 18,
            },
            [True, False] * 18,
        ),
        ("phi3", {}, [False] * 32),  # of 262144 tokens
        ("phi3", {"sliding_window": 2047}, [True] * 32),
    ],
)
def test_windows(tmp_path, name, changes, slides):
    config = read(tmp_path, {**HUB_CONFIGS[name], **changes})
    assert [layer.mixer.window is not None for layer in config.layers] == slides
    assert all(layer.mixer.window in (None, 4096, 2047) for layer in config.layers)


@pytest.mark.parametrize(
    ("outside", "inside", "expected"),
    [
        (None, None, False),
        (None, True, True),
        (None, False, False),
        (True, None, True),
        (True, False, False),
        (False, True, True),
    ],
)
def test_the_language_model_says_whether_embeddings_are_tied(tmp_path, outside, inside, expected):
    text = {**MINISTRAL_3_8B["text_config"], "tie_word_embeddings": inside}
    config = {**MINISTRAL_3_8B, "text_config": text, "tie_word_embeddings": outside}
    assert read(tmp_path, config).tie_word_embeddings is expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            {"quant_method": "fp8", "weight_block_size": [128, 128]},
            QuantizationConfig(linear_method="fp8_block", expert_method="fp8_block"),
        ),
        (
            {"quant_method": "fp8", "weight_block_size": None, "modules_to_not_convert": ["lm_head"]},
            QuantizationConfig(linear_method="fp8_static", expert_method="fp8_static", ignored_modules=("lm_head",)),
        ),
        ({"quant_method": "mxfp4"}, QuantizationConfig(linear_method=None, expert_method="mxfp4")),
        (
            {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]},
            QuantizationConfig(linear_method="nvfp4", expert_method="nvfp4", ignored_modules=("lm_head",)),
        ),
        (
            {"quant_method": "modelopt", "quant_algo": "FP8"},
            QuantizationConfig(linear_method="fp8_modelopt", expert_method="fp8_modelopt"),
        ),
    ],
)
def test_quantisation(tmp_path, given, expected):
    assert read(tmp_path, {**MIXTRAL_8X7B, "quantization_config": given}).quantization == expected


def test_modelopt_has_a_file_of_its_own(tmp_path):
    write(tmp_path, MIXTRAL_8X7B)
    file = tmp_path / "hf_quant_config.json"
    file.write_text(json.dumps({"quantization": {"quant_algo": "NVFP4", "exclude_modules": ["lm_head"]}}))
    expected = QuantizationConfig(linear_method="nvfp4", expert_method="nvfp4", ignored_modules=("lm_head",))
    assert read_model_config(tmp_path).quantization == expected
    for wrong, message in (
        ({}, "quantization.quant_algo must be one of FP8, NVFP4, got None"),
        ({"quantization": []}, "quantization must be an object or null"),
        ({"quantization": {}}, "quant_algo must be one of FP8"),
    ):
        file.write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=f"hf_quant_config.json: .*{message}"):
            read_model_config(tmp_path)


def test_the_wanted_dtype_replaces_the_stored_one(tmp_path):
    write(tmp_path, {**MIXTRAL_8X7B, "torch_dtype": "float16"})
    assert read_model_config(tmp_path, "float32").dtype == "float32"
    assert read_model_config(tmp_path, "bfloat16").dtype == "bfloat16"


def test_torch_is_not_imported():
    modules = "expertwire.engine.loader.checkpoint, expertwire.engine.models.registry"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
