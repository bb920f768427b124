"""Configurations that are wrong or not supported are refused, naming the file, the field and what is allowed."""

import contextlib
import re

import pytest
from helpers.hub_configs import HUB_CONFIGS, MIXTRAL_8X7B, PHI_4_MINI, read, write
from helpers.slow import slow_but

from expertwire.engine.models.registry import read_model_config

YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
LLAMA_SCALING = HUB_CONFIGS["llama"]["rope_scaling"]
METHODS = "fp8, mxfp4, compressed-tensors, modelopt"
BAD_CONFIGS = [
    (
        "mixtral",
        {"architectures": ["GPT2LMHeadModel"]},
        "architectures must begin with one of .*MixtralForCausalLM, Qwen3Moe",
    ),
    ("mixtral", {"architectures": []}, "architectures must begin with one of"),
    ("mixtral", {"architectures": "MixtralForCausalLM"}, "architectures must begin with one of"),
    ("mixtral", {"sliding_window": "none"}, "sliding_window must be an integer"),
    ("mixtral", {"num_experts_per_tok": 9}, r"num_experts_per_tok \(9\) must be at most num_local_experts \(8\)"),
    (
        "mixtral",
        {"num_key_value_heads": 5},
        r"num_attention_heads \(32\) must be a multiple of num_key_value_heads \(5\)",
    ),
    ("mixtral", {"num_attention_heads": 40}, r"hidden_size \(4096\) must be a multiple of num_attention_heads \(40\)"),
    ("mixtral", {"hidden_size": True}, "hidden_size must be an integer >= 1, got True"),
    ("mixtral", {"hidden_size": 10**30}, "hidden_size must be at most 2147483647, got 10{30}"),
    ("mixtral", {"num_hidden_layers": 0}, "num_hidden_layers must be an integer >= 1, got 0"),
    ("mixtral", {"num_hidden_layers": 10**6}, "num_hidden_layers must be at most 4096, got 1000000"),
    ("mixtral", {"hidden_act": "gelu"}, "hidden_act must be 'silu', got 'gelu'"),
    ("mixtral", {"rms_norm_eps": "tiny"}, "rms_norm_eps must be a number > 0, got 'tiny'"),
    ("mixtral", {"rms_norm_eps": 10**400}, "rms_norm_eps must be a number > 0, got 10{400}"),
    ("mixtral", {"rms_norm_eps": float("nan")}, "rms_norm_eps must be a number > 0, got nan"),
    ("mixtral", {"rms_norm_eps": float("inf")}, "rms_norm_eps must be a number > 0, got inf"),
    ("mixtral", {"torch_dtype": "float16"}, "float16.*pass dtype='float32' or dtype='bfloat16'"),
    ("mixtral", {"torch_dtype": None}, "pass dtype='float32' or dtype='bfloat16'"),
    ("mixtral", {"rope_theta": -1}, "rope_theta must be a number > 0, got -1"),
    ("mixtral", {"quantization_config": {"quant_method": "awq"}}, f"quant_method must be one of {METHODS}, got 'awq'"),
    ("mixtral", {"quantization_config": {}}, f"quantization_config.quant_method must be one of {METHODS}, got None"),
    ("mixtral", {"quantization_config": "fp8"}, "quantization_config must be an object or null, got 'fp8'"),
    (
        "mixtral",
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}},
        r"weight_block_size must be \[128, 128\] or null, got \[64, 64\]",
    ),
    (
        "mixtral",
        {"quantization_config": {"quant_method": "modelopt", "quant_algo": "W4A16_AWQ"}},
        "quantization_config.quant_algo must be one of FP8, NVFP4, got 'W4A16_AWQ'",
    ),
    (
        "mixtral",
        {"quantization_config": {"quant_method": "compressed-tensors", "format": "marlin-24"}},
        "format and config_groups must be pack-quantized .* got .'marlin-24'",
    ),
    (
        "mixtral",
        {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["re:("]}},
        r"modules_to_not_convert .*'re:\('",
    ),
    (
        "qwen3_moe",
        {"rope_scaling": {"type": "yarn", "factor": 4.0}},
        "rope_scaling.original_max_position_embeddings' is mis",
    ),
    ("qwen3_moe", {"rope_scaling": {**YARN, "factor": 0}}, "rope_scaling.factor must be a number > 0, got 0"),
    ("qwen3_moe", {"rope_scaling": {**YARN, "mscale": -1}}, "rope_scaling.mscale must be a number >= 0, got -1"),
    ("qwen3_moe", {"rope_scaling": {"rope_type": "llama3"}}, "the field 'rope_scaling.low_freq_factor' is missing"),
    (
        "llama",
        {"rope_scaling": {**LLAMA_SCALING, "low_freq_factor": 5}},
        r"high_freq_factor \(4\) must be at least low_fr",
    ),
    (
        "qwen3_moe",
        {"rope_scaling": {"type": "ntk"}},
        "rope_scaling.rope_type must be default, linear, llama3, yarn or long",
    ),
    ("qwen3_moe", {"rope_scaling": 4}, "rope_scaling must be an object or null, got 4"),
    ("qwen3_moe", {"rope_parameters": {"rope_theta": 0}}, "rope_parameters.rope_theta must be a number > 0, got 0"),
    (
        "qwen3_moe",
        {"partial_rotary_factor": 1.5},
        "partial_rotary_factor must leave an even part of 128 numbers, got 1.5",
    ),
    ("qwen3_moe", {"partial_rotary_factor": 1e300}, "partial_rotary_factor must leave an even part of 128 numbers"),
    (
        "qwen3_moe",
        {"partial_rotary_factor": 0.001},
        "partial_rotary_factor must leave an even part of 128 numbers, got 0.001",
    ),
    ("qwen3_moe", {"mlp_only_layers": [48]}, r"mlp_only_layers must be a list of layers below 48, got \[48\]"),
    ("qwen3_moe", {"norm_topk_prob": 1}, "norm_topk_prob must be true or false, got 1"),
    ("qwen3_moe", {"head_dim": 127}, "head_dim must be even"),
    ("qwen3_moe", {"eos_token_id": 151936}, "eos_token_id must be a token id below 151936"),
    ("qwen3_moe", {"eos_token_id": ["</s>"]}, "eos_token_id must be a token id"),
    (
        "qwen3",
        {"use_sliding_window": True, "layer_types": ["full_attention"]},
        "layer_types must be a list of 36 values",
    ),
    ("llama", {"attention_bias": True}, "attention_bias must be False, got True"),
    ("llama", {"mlp_bias": True}, "mlp_bias must be False, got True"),
    ("phi3", {"lm_head_bias": True}, "lm_head_bias must be False, got True"),
    ("phi3", {"partial_rotary_factor": 0.5}, "rope_scaling.short_factor must be a list of 32 numbers, got 48"),
    ("phi3", {"original_max_position_embeddings": None}, "the field 'original_max_position_embeddings' is missing"),
    (
        "phi3",
        {"rope_scaling": {**PHI_4_MINI["rope_scaling"], "long_factor": [True] * 48}},
        "rope_scaling.long_factor must be a list of numbers > 0, got",
    ),
    ("mistral3", {"text_config": []}, r"text_config must be an object or null, got \[\]"),
    ("mistral3", {"text_config": {}}, "the field 'text_config.hidden_act' is missing"),
    (
        "mistral3",
        {"text_config": {**HUB_CONFIGS["mistral3"]["text_config"], "model_type": "mamba"}},
        "text_config.model_type must be 'mistral' or 'ministral3' or 'mistral4', got 'mamba'",
    ),
]


@pytest.mark.parametrize(("kind", "change", "message"), BAD_CONFIGS)
def test_bad_configs_are_refused_by_name(tmp_path, kind, change, message):
    with pytest.raises(
        ValueError, match=message.replace("10{30}", "1" + "0" * 30).replace("10{400}", "1" + "0" * 400)
    ) as error:
        read(tmp_path, {**HUB_CONFIGS[kind], **change})
    assert str(tmp_path / "config.json") in str(error.value)


# What the hub's own files leave out or set to null, by what that means.
MEANS_NONE = {
    "eos_token_id",
    "rope_scaling",
    "sliding_window",
    "quantization_config",
    "attention_chunk_size",
    "n_shared_experts",
    "num_mtp_modules",
    "num_nextn_predict_layers",
    "q_lora_rank",
    "topk_group",
    "rotary_dim",
    "n_group",
}
MEANS_THE_USUAL = {
    "attention_bias",
    "attn_scale",
    "attn_output_gate",
    "attn_temperature_tuning",
    "clip_qkv",
    "floor_scale",
    "full_attention_interval",
    "head_dim",
    "interleave_moe_layer_step",
    "layer_types",
    "lm_head_bias",
    "mamba_d_head",
    "mamba_hidden_act",
    "mamba_proj_bias",
    "mamba_ssm_dtype",
    "max_window_layers",
    "mlp_bias",
    "mlp_only_layers",
    "moe_layer_freq",
    "no_rope_layers",
    "partial_rotary_factor",
    "position_embedding_type",
    "qk_norm_type",
    "rope_interleave",
    "scoring_func",
    "shared_intermediate_size",
    "swiglu_limit",
    "tie_word_embeddings",
    "topk_method",
    "use_bias",
    "use_qk_norm",
    "use_routing_bias",
    "use_sliding_window",
    "norm_topk_prob",
    "num_key_value_heads",
}
UNUSED = {"attention_dropout", "expand", "bos_token_id", "model_type", "qk_head_dim", "vision_config"}
# A dense Llama 4 has no experts whatever these say, and a mixture in every layer, as in Qwen3-Next, no MLP.
UNUSED_WITHOUT_SUCH_LAYERS = {"num_experts_per_tok", "num_local_experts", "intermediate_size", "intermediate_size_mlp"}
# Nemotron's pattern says how many layers there are, and of what kinds; its epsilon has two names. Granite rotates nothing.
UNUSED_IN = {
    "nemotron_h": {"num_hidden_layers", "intermediate_size", "layer_norm_epsilon", "norm_eps"},
    "granite": {"rope_theta"},
}
NAMED_INSTEAD = {
    "mlp_hidden_act": "hidden_act",
    "rope_parameters": "rope|beta",
    "partial_rotary_factor": "short_factor",
    "moe_layers": "interleave_moe_layer_step",
    "num_experts": "num_(local_)?experts",
    "torch_dtype": "dtype",
}


def without_each_field(config):
    for field in config:
        rest = {name: value for name, value in config.items() if name != field}
        if field != "text_config":
            yield field, rest
    if "text_config" in config:
        yield from (
            (field, {**config, "text_config": text}) for field, text in without_each_field(config["text_config"])
        )


def refusal(folder, config):
    try:
        read(folder, config)
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize("kind", HUB_CONFIGS)
def test_a_missing_field_is_named_unless_the_hub_omits_it(tmp_path, kind):
    config = HUB_CONFIGS[kind]
    optional = MEANS_NONE | MEANS_THE_USUAL | UNUSED | UNUSED_IN.get(kind, set())
    if kind in ("llama4", "mobile_llm", "qwen2_moe", "qwen3_moe", "qwen3_next") or kind.startswith("mistral4"):
        optional |= UNUSED_WITHOUT_SUCH_LAYERS
    for field, rest in without_each_field(config):
        message = refusal(tmp_path, rest)
        if message is None:
            assert field in optional, f"{field} may be missing"
        else:
            assert re.search(NAMED_INSTEAD.get(field, field), message), f"without {field}: {message}"


NONSENSE = ["x", -1, 0, 1.5, 10**30, float("nan"), ["x"], {"x": 1}, True, None]
# Mixtures of experts, dense, latent, sparse, hybrid, nested and with chunks.
NONSENSE_KEPT = ("qwen3_moe", "mistral3", "deepseek_v32", "gpt_oss", "nemotron_h", "qwen3_5_moe", "llama4")
OTHER_STYLE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "layer_types": None}


@pytest.mark.parametrize("kind", slow_but(NONSENSE_KEPT, HUB_CONFIGS))
def test_nonsense_is_a_value_error_or_harmless(tmp_path, kind):
    bases = [HUB_CONFIGS[kind]] + ([HUB_CONFIGS[kind] | OTHER_STYLE] if kind in ("mixtral", "qwen3") else [])
    for base in bases:
        for field in base | {"quantization_config": 0, "text_config": 0}:
            for value in NONSENSE:
                changed = [{**base, field: value}]
                if isinstance(base.get(field), dict):
                    changed += [{**base, field: {**base[field], inner: value}} for inner in base[field]]
                for one in changed:
                    with contextlib.suppress(ValueError):
                        assert len(read(tmp_path, one).sparse_layers) >= 1


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
