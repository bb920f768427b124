"""Reading a checkpoint's hyperparameters: both styles of config.json; what is wrong or unsupported is refused by name."""

import contextlib
import json
import subprocess
import sys

import pytest
import tiny_checkpoints as tiny

from expertwire.engine.checkpoint import read_model_config
from expertwire.engine.config import ModelConfig

MIXTRAL_8X7B = {
    "architectures": ["MixtralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mixtral",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 32000,
}
QWEN3_30B_A3B = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
MOE_ONLY = {
    name for name in QWEN3_30B_A3B if any(word in name for word in ("expert", "moe", "sparse", "mlp_only", "topk"))
}
QWEN3_8B = {
    **{name: value for name, value in QWEN3_30B_A3B.items() if name not in MOE_ONLY},
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "max_window_layers": 36,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
}
HUB_CONFIGS = {"mixtral": MIXTRAL_8X7B, "qwen3_moe": QWEN3_30B_A3B, "qwen3": QWEN3_8B}


def write(folder, config, generation=None):
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def test_mixtral_8x7b(tmp_path):
    assert read_model_config(write(tmp_path, MIXTRAL_8X7B)) == ModelConfig(
        architecture="MixtralForCausalLM",
        dtype="bfloat16",
        vocab_size=32000,
        hidden_size=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        rms_norm_eps=1e-5,
        rope_theta=1e6,
        max_position_embeddings=32768,
        tie_word_embeddings=False,
        attention_bias=False,
        qk_norm=False,
        intermediate_size=14336,
        sparse_layers=(True,) * 32,
        num_experts=8,
        top_k=2,
        expert_size=14336,
        renormalize=True,
        sliding_window=None,
        eos_token_ids=(2,),
    )


def test_qwen3_30b_a3b(tmp_path):
    generation = {"eos_token_id": [151645, 151643]}
    assert read_model_config(write(tmp_path, QWEN3_30B_A3B, generation)) == ModelConfig(
        architecture="Qwen3MoeForCausalLM",
        dtype="bfloat16",
        vocab_size=151936,
        hidden_size=2048,
        num_layers=48,
        num_heads=32,
        num_kv_heads=4,
        head_dim=128,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        max_position_embeddings=40960,
        tie_word_embeddings=False,
        attention_bias=False,
        qk_norm=True,
        intermediate_size=6144,
        sparse_layers=(True,) * 48,
        num_experts=128,
        top_k=8,
        expert_size=768,
        renormalize=True,
        sliding_window=None,
        eos_token_ids=(151645, 151643),
    )


def test_qwen3_8b(tmp_path):
    config = read_model_config(write(tmp_path, QWEN3_8B))
    assert (config.architecture, config.num_layers, config.intermediate_size) == ("Qwen3ForCausalLM", 36, 12288)
    assert (config.sparse_layers, config.num_experts, config.top_k) == ((False,) * 36, 0, 0)
    assert config.qk_norm


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
    assert config.sparse_layers == (
        False,
        False,
        False,
        True,
    )  # layer 1 is dense by mlp_only_layers, 0 and 2 by the step
    assert (config.renormalize, config.dtype, config.head_dim, config.expert_size) == (False, "bfloat16", 32, 64)


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
        {"use_sliding_window": True, "sliding_window": 40960},  # hides nothing
        {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 36},  # no layer slides
        {"use_sliding_window": True, "sliding_window": 4096, "layer_types": ["full_attention"] * 36},
        {"sliding_window": 4096},
    ],
)
def test_what_has_no_effect_is_accepted(tmp_path, change):
    assert read_model_config(write(tmp_path, {**QWEN3_8B, **change})) == read_model_config(write(tmp_path, QWEN3_8B))


BAD_CONFIGS = [
    (
        "mixtral",
        {"architectures": ["GptOssForCausalLM"]},
        "architectures.*MixtralForCausalLM, Qwen3MoeForCausalLM, Qwen3For",
    ),
    ("mixtral", {"architectures": []}, "architectures must begin with one of"),
    ("mixtral", {"architectures": "MixtralForCausalLM"}, "architectures must begin with one of"),
    (
        "mixtral",
        {"sliding_window": 4096},
        r"sliding_window \(4096\) below max_position_embeddings \(32768\) is not supp",
    ),
    ("mixtral", {"sliding_window": "none"}, "sliding_window must be an integer"),
    ("mixtral", {"num_experts_per_tok": 9}, r"num_experts_per_tok \(9\) must be at most num_local_experts \(8\)"),
    (
        "mixtral",
        {"num_key_value_heads": 5},
        r"num_attention_heads \(32\) must be a multiple of num_key_value_heads \(5\)",
    ),
    ("mixtral", {"num_attention_heads": 40}, r"hidden_size \(4096\) must be a multiple of num_attention_heads \(40\)"),
    ("mixtral", {"hidden_size": True}, "hidden_size must be an integer >= 1, got True"),
    ("mixtral", {"num_hidden_layers": 0}, "num_hidden_layers must be an integer >= 1, got 0"),
    ("mixtral", {"hidden_act": "gelu"}, "hidden_act must be 'silu', got 'gelu'"),
    ("mixtral", {"rms_norm_eps": "tiny"}, "rms_norm_eps must be a number > 0, got 'tiny'"),
    ("mixtral", {"quantization_config": {"quant_method": "fp8"}}, "quantised checkpoint.*not supported yet"),
    ("mixtral", {"torch_dtype": "float16"}, "float16.*pass dtype='float32' or dtype='bfloat16'"),
    ("mixtral", {"torch_dtype": None}, "pass dtype='float32' or dtype='bfloat16'"),
    ("mixtral", {"rope_theta": -1}, "rope_theta must be a number > 0, got -1"),
    ("qwen3_moe", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope scaling 'yarn' is not supported yet"),
    ("qwen3_moe", {"rope_scaling": {"rope_type": "llama3"}}, "rope scaling 'llama3' is not supported yet"),
    ("qwen3_moe", {"rope_scaling": 4}, "rope_parameters and rope_scaling must be objects or null, got 4"),
    (
        "qwen3_moe",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 0}},
        "rope_theta must be a number > 0, got 0",
    ),
    ("qwen3_moe", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported yet"),
    ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 4096}, "sliding_window.*not supported yet"),
    ("qwen3_moe", {"mlp_only_layers": [48]}, r"mlp_only_layers must be a list of layers below 48, got \[48\]"),
    ("qwen3_moe", {"norm_topk_prob": 1}, "norm_topk_prob must be true or false, got 1"),
    ("qwen3_moe", {"head_dim": 127}, "head_dim must be even"),
    ("qwen3_moe", {"eos_token_id": 151936}, "eos_token_id must be a token id below 151936"),
    ("qwen3_moe", {"eos_token_id": ["</s>"]}, "eos_token_id must be a token id"),
    (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 28},
        "sliding_window.*not supported",
    ),
    (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 9, "layer_types": ["sliding_attention"]},
        "sliding_window.*not",
    ),
]


@pytest.mark.parametrize(("kind", "change", "message"), BAD_CONFIGS)
def test_bad_configs_are_refused_by_name(tmp_path, kind, change, message):
    write(tmp_path, {**HUB_CONFIGS[kind], **change})
    with pytest.raises(ValueError, match=message) as error:
        read_model_config(tmp_path)
    assert str(tmp_path / "config.json") in str(error.value)


OPTIONAL = {
    "eos_token_id",
    "rope_scaling",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "mlp_only_layers",
}
UNUSED = {"attention_dropout", "bos_token_id", "model_type"}


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_missing_field_is_named_unless_the_hub_omits_it(tmp_path, kind):
    config = HUB_CONFIGS[kind]
    for field in config.keys() - OPTIONAL - UNUSED:
        write(tmp_path, {name: value for name, value in config.items() if name != field})
        with pytest.raises(
            ValueError, match=field.removeprefix("torch_").replace("num_experts", "num_(local_)?experts")
        ):
            read_model_config(tmp_path)


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("value", ["x", -1, 0, 1.5, [], {}, ["x"], {"x": 1}, True, None], ids=repr)
def test_nonsense_is_a_value_error_or_harmless(tmp_path, kind, value):
    for style in ({}, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "layer_types": None}):
        for field in HUB_CONFIGS[kind] | style | {"quantization_config": 0}:
            write(tmp_path, {**HUB_CONFIGS[kind], **style, field: value})
            with contextlib.suppress(ValueError):
                assert len(read_model_config(tmp_path).sparse_layers) >= 1


def test_the_wanted_dtype_replaces_the_stored_one(tmp_path):
    write(tmp_path, {**MIXTRAL_8X7B, "torch_dtype": "float16"})
    assert read_model_config(tmp_path, "float32").dtype == "float32"
    assert read_model_config(tmp_path, "bfloat16").dtype == "bfloat16"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "config.json is not valid JSON"),
        ("[1]", "config.json must be a JSON object, got list"),
        ("\udcff", "config.json is not valid JSON"),
    ],
)
def test_damaged_config_files(tmp_path, text, message):
    (tmp_path / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=message):
        read_model_config(tmp_path)


def test_no_folder_no_config_bad_generation_config(tmp_path):
    with pytest.raises(ValueError, match="there is no folder 'Qwen/Qwen3-30B-A3B'"):
        read_model_config("Qwen/Qwen3-30B-A3B")
    with pytest.raises(ValueError, match="has no config"):
        read_model_config(tmp_path)
    write(tmp_path, MIXTRAL_8X7B, {"eos_token_id": "</s>"})
    with pytest.raises(ValueError, match=r"generation_config.json: eos_token_id must be a token id below 32000"):
        read_model_config(tmp_path)


def test_a_modelopt_checkpoint_is_refused(tmp_path):
    write(tmp_path, MIXTRAL_8X7B)
    (tmp_path / "hf_quant_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"quantised checkpoint.*not supported yet"):
        read_model_config(tmp_path)


def test_torch_is_not_imported():
    code = "import sys, expertwire.engine.checkpoint; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
