"""The config.json of a real model for every architecture, as the hub has it, with the fields that matter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from expertwire.engine.models.model_config import ModelConfig
from expertwire.engine.models.registry import read_model_config

Config = dict[str, Any]


def _published(name: str) -> Config:
    return json.loads((Path(__file__).parents[2] / "bench" / "configs" / name / "config.json").read_text())


def _changed(config: Config, *missing: str, **changes: Any) -> Config:
    return {name: value for name, value in {**config, **changes}.items() if name not in missing}


def _heads(num: int, num_kv: int, head_dim: int | None = None) -> Config:
    sizes = {"num_attention_heads": num, "num_key_value_heads": num_kv, "head_dim": head_dim}
    return {name: size for name, size in sizes.items() if size is not None}


def _base(architecture: str, model_type: str, **fields: Any) -> Config:
    common = {
        "architectures": [architecture],
        "attention_bias": False,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "model_type": model_type,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    return common | fields


MIXTRAL_8X7B = _published("mixtral-8x7b")
QWEN3_30B_A3B = _published("qwen3-30b-a3b")
QWEN2_5_7B = _base(
    "Qwen2ForCausalLM",
    "qwen2",
    **_heads(28, 4),
    eos_token_id=151645,
    hidden_size=3584,
    intermediate_size=18944,
    max_position_embeddings=32768,
    max_window_layers=28,
    num_hidden_layers=28,
    rms_norm_eps=1e-06,
    rope_theta=1000000.0,
    sliding_window=131072,
    use_sliding_window=False,
    vocab_size=152064,
)
QWEN3_8B = _base(
    "Qwen3ForCausalLM",
    "qwen3",
    **_heads(32, 8, 128),
    eos_token_id=151645,
    hidden_size=4096,
    intermediate_size=12288,
    max_position_embeddings=40960,
    max_window_layers=36,
    num_hidden_layers=36,
    rms_norm_eps=1e-06,
    rope_theta=1000000.0,
    sliding_window=None,
    use_sliding_window=False,
    vocab_size=151936,
)
LLAMA_3_1_8B = _base(
    "LlamaForCausalLM",
    "llama",
    **_heads(32, 8),
    eos_token_id=[128001, 128008, 128009],
    hidden_size=4096,
    intermediate_size=14336,
    max_position_embeddings=131072,
    mlp_bias=False,
    num_hidden_layers=32,
    rope_scaling={
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    rope_theta=500000.0,
    vocab_size=128256,
)
MISTRAL_7B = _changed(
    _base(
        "MistralForCausalLM",
        "mistral",
        **_heads(32, 8),
        hidden_size=4096,
        intermediate_size=14336,
        max_position_embeddings=32768,
        num_hidden_layers=32,
        rope_theta=10000.0,
        sliding_window=4096,
        vocab_size=32000,
    ),
    "attention_bias",
)
_MINISTRAL_TEXT = {
    **_heads(32, 8, 128),
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 262144,
    "model_type": "ministral3",
    "num_hidden_layers": 34,
    "rms_norm_eps": 1e-05,
    "rope_parameters": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 16.0,
        "llama_4_scaling_beta": 0.1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 16384,
        "rope_theta": 1000000.0,
        "rope_type": "yarn",
        "type": "yarn",
    },
    "sliding_window": None,
    "tie_word_embeddings": False,
    "vocab_size": 131072,
}
MINISTRAL_3_8B = {
    "architectures": ["Mistral3ForConditionalGeneration"],
    "dtype": "bfloat16",
    "model_type": "mistral3",
    "text_config": _MINISTRAL_TEXT,
    "vision_config": {"model_type": "pixtral", "hidden_size": 1024},
}
MINISTRAL_TEXT_ALONE = {**_MINISTRAL_TEXT, "architectures": ["Ministral3ForCausalLM"], "dtype": "bfloat16"}
MISTRAL_SMALL_3_1 = {
    "architectures": ["Mistral3ForConditionalGeneration"],
    "model_type": "mistral3",
    "text_config": {
        **_heads(32, 8, 128),
        "hidden_act": "silu",
        "hidden_size": 5120,
        "intermediate_size": 32768,
        "max_position_embeddings": 131072,
        "model_type": "mistral",
        "num_hidden_layers": 40,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000000.0,
        "sliding_window": None,
        "vocab_size": 131072,
    },
    "torch_dtype": "bfloat16",
}
PHI_4_MINI = _base(
    "Phi3ForCausalLM",
    "phi3",
    **_heads(24, 8),
    eos_token_id=199999,
    hidden_size=3072,
    intermediate_size=8192,
    lm_head_bias=False,
    max_position_embeddings=131072,
    mlp_bias=False,
    num_hidden_layers=32,
    original_max_position_embeddings=4096,
    partial_rotary_factor=0.75,
    rope_scaling={"long_factor": [float(1 + i) for i in range(48)], "short_factor": [1.0] * 48, "type": "longrope"},
    rope_theta=10000.0,
    sliding_window=262144,
    tie_word_embeddings=True,
    vocab_size=200064,
)
PHI_4_MINI_FLASH = {
    "architectures": ["Phi4FlashForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 199999,
    "eos_token_id": 199999,
    "hidden_act": "silu",
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "layer_norm_eps": 1e-05,
    "lm_head_bias": False,
    "max_position_embeddings": 262144,
    "mb_per_layer": 2,
    "mlp_bias": False,
    "model_type": "phi4flash",
    "num_attention_heads": 40,
    "num_hidden_layers": 32,
    "num_key_value_heads": 20,
    "sliding_window": 512,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 200064,
}
OLMOE_1B_7B = _base(
    "OlmoeForCausalLM",
    "olmoe",
    **_heads(16, 16),
    clip_qkv=None,
    hidden_size=2048,
    intermediate_size=1024,
    max_position_embeddings=4096,
    norm_topk_prob=False,
    num_experts=64,
    num_experts_per_tok=8,
    num_hidden_layers=16,
    rope_theta=10000.0,
    vocab_size=50304,
)
MINIMAX_M2 = _changed(
    _base(
        "MiniMaxM2ForCausalLM",
        "minimax_m2",
        **_heads(48, 8, 128),
        hidden_size=3072,
        intermediate_size=1536,
        max_position_embeddings=196608,
        num_experts_per_tok=8,
        num_hidden_layers=62,
        num_local_experts=256,
        num_mtp_modules=3,
        qk_norm_type="per_layer",
        quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"},
        rms_norm_eps=1e-06,
        rope_theta=5000000,
        rotary_dim=64,
        scoring_func="sigmoid",
        shared_intermediate_size=0,
        use_qk_norm=True,
        use_routing_bias=True,
        vocab_size=200064,
    ),
    "rope_scaling",
    "attention_bias",
)
GLM_4_5_AIR = _base(
    "Glm4MoeForCausalLM",
    "glm4_moe",
    **_heads(96, 8, 128),
    attention_bias=True,
    eos_token_id=[151329, 151336, 151338],
    first_k_dense_replace=1,
    hidden_size=4096,
    intermediate_size=10944,
    max_position_embeddings=131072,
    moe_intermediate_size=1408,
    n_group=1,
    n_routed_experts=128,
    n_shared_experts=1,
    norm_topk_prob=True,
    num_experts_per_tok=8,
    num_hidden_layers=46,
    num_nextn_predict_layers=1,
    partial_rotary_factor=0.5,
    rope_theta=1000000,
    routed_scaling_factor=1.0,
    topk_group=1,
    use_qk_norm=False,
    vocab_size=151552,
)
DEEPSEEK_V3 = _published("deepseek-v3")
DEEPSEEK_V2_LITE = _changed(
    DEEPSEEK_V3,
    "quantization_config",
    "num_nextn_predict_layers",
    architectures=["DeepseekV2ForCausalLM"],
    model_type="deepseek_v2",
    first_k_dense_replace=1,
    hidden_size=2048,
    intermediate_size=10944,
    moe_intermediate_size=1408,
    n_group=1,
    n_routed_experts=64,
    n_shared_experts=2,
    norm_topk_prob=False,
    num_attention_heads=16,
    num_experts_per_tok=6,
    num_hidden_layers=27,
    num_key_value_heads=16,
    q_lora_rank=None,
    routed_scaling_factor=1.0,
    scoring_func="softmax",
    topk_group=1,
    topk_method="greedy",
    vocab_size=102400,
)
_INDEXER = {"index_head_dim": 128, "index_n_heads": 64, "index_topk": 2048}
DEEPSEEK_V3_2 = _changed(DEEPSEEK_V3, architectures=["DeepseekV32ForCausalLM"], model_type="deepseek_v32", **_INDEXER)
GLM_4_7_FLASH = _base(
    "Glm4MoeLiteForCausalLM",
    "glm4_moe_lite",
    num_attention_heads=20,
    num_key_value_heads=20,
    first_k_dense_replace=1,
    hidden_size=2048,
    intermediate_size=10240,
    kv_lora_rank=512,
    max_position_embeddings=202752,
    moe_intermediate_size=1536,
    n_group=1,
    n_routed_experts=64,
    n_shared_experts=1,
    norm_topk_prob=True,
    num_experts_per_tok=4,
    num_hidden_layers=47,
    num_nextn_predict_layers=1,
    partial_rotary_factor=1.0,
    q_lora_rank=768,
    qk_nope_head_dim=192,
    qk_rope_head_dim=64,
    rope_theta=1000000,
    routed_scaling_factor=1.8,
    topk_group=1,
    topk_method="noaux_tc",
    v_head_dim=256,
    vocab_size=154880,
)
GLM_5 = _changed(
    GLM_4_7_FLASH,
    architectures=["GlmMoeDsaForCausalLM"],
    model_type="glm_moe_dsa",
    first_k_dense_replace=3,
    hidden_size=6144,
    intermediate_size=12288,
    moe_intermediate_size=2048,
    n_routed_experts=256,
    num_attention_heads=64,
    num_experts_per_tok=8,
    num_hidden_layers=78,
    num_key_value_heads=64,
    q_lora_rank=2048,
    routed_scaling_factor=2.5,
    **{**_INDEXER, "index_n_heads": 32},
)
_LLAMA_4_TEXT = {
    **_heads(40, 8, 128),
    "attention_bias": False,
    "attention_chunk_size": 8192,
    "attn_scale": 0.1,
    "attn_temperature_tuning": True,
    "floor_scale": 8192,
    "hidden_act": "silu",
    "hidden_size": 5120,
    "interleave_moe_layer_step": 1,
    "intermediate_size": 8192,
    "intermediate_size_mlp": 16384,
    "max_position_embeddings": 10485760,
    "model_type": "llama4_text",
    "no_rope_layers": [int((i + 1) % 4 != 0) for i in range(48)],
    "num_experts_per_tok": 1,
    "num_hidden_layers": 48,
    "num_local_experts": 16,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 16.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "use_qk_norm": True,
    "vocab_size": 202048,
}
LLAMA_4_SCOUT = {
    "architectures": ["Llama4ForConditionalGeneration"],
    "eos_token_id": [200001, 200007, 200008],
    "model_type": "llama4",
    "text_config": _LLAMA_4_TEXT,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
MOBILE_LLM_R1 = {
    **_LLAMA_4_TEXT,
    **_heads(24, 6, 64),
    "architectures": ["Llama4ForCausalLM"],
    "attention_chunk_size": 32768,
    "eos_token_id": 128009,
    "hidden_size": 1536,
    "interleave_moe_layer_step": 0,
    "intermediate_size_mlp": 6144,
    "max_position_embeddings": 32768,
    "moe_layers": [],
    "no_rope_layers": [1] * 22,
    "num_hidden_layers": 22,
    "rope_scaling": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
MISTRAL_SMALL_4 = _published("mistral-small-4")
KIMI_K2_THINKING = _published("kimi-k2-thinking")
KIMI_K2_5 = {
    "architectures": ["KimiK25ForConditionalGeneration"],
    "model_type": "kimi_k25",
    "text_config": _changed(KIMI_K2_THINKING, "architectures"),
    "vision_config": {"model_type": "kimi_k25_vision"},
}

QWEN3_5_35B_A3B = _published("qwen3.5-35b-a3b")
_QWEN3_5_9B_TEXT = {
    **_changed(
        QWEN3_5_35B_A3B["text_config"],
        "num_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "shared_expert_intermediate_size",
    ),
    **_heads(16, 4, 256),
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 8,
    "model_type": "qwen3_5_text",
    "num_hidden_layers": 32,
}
QWEN3_5_9B = {
    "architectures": ["Qwen3_5ForConditionalGeneration"],
    "model_type": "qwen3_5",
    "text_config": _QWEN3_5_9B_TEXT,
    "tie_word_embeddings": False,
}

# By short name; every supported architecture has one.
HUB_CONFIGS: dict[str, Config] = {
    "mixtral": MIXTRAL_8X7B,
    "qwen3_moe": QWEN3_30B_A3B,
    "qwen2": QWEN2_5_7B,
    "qwen2_moe": _published("qwen1.5-moe-a2.7b"),
    "qwen3": QWEN3_8B,
    "llama": LLAMA_3_1_8B,
    "mistral": MISTRAL_7B,
    "mistral3": MISTRAL_SMALL_3_1,
    "ministral3": MINISTRAL_3_8B,
    "ministral3_text": MINISTRAL_TEXT_ALONE,
    "phi3": PHI_4_MINI,
    "phi4_flash": PHI_4_MINI_FLASH,
    "olmoe": OLMOE_1B_7B,
    "minimax_m2": MINIMAX_M2,
    "glm4_moe": GLM_4_5_AIR,
    "glm4_moe_lite": GLM_4_7_FLASH,
    "glm_moe_dsa": GLM_5,
    "gpt_oss": _published("gpt-oss-120b"),
    "deepseek_v2": DEEPSEEK_V2_LITE,
    "deepseek_v3": DEEPSEEK_V3,
    "deepseek_v32": DEEPSEEK_V3_2,
    "kimi_k2": KIMI_K2_THINKING,
    "kimi_k25": KIMI_K2_5,
    "llama4": LLAMA_4_SCOUT,
    "mobile_llm": MOBILE_LLM_R1,
    "mistral4": MISTRAL_SMALL_4,
    "nemotron_h": _published("nemotron-3-nano"),
    "granite": _published("granite-4.0-h-small"),
    "qwen3_next": _published("qwen3-next-80b-a3b"),
    "qwen3_5": QWEN3_5_9B,
    "qwen3_5_moe": QWEN3_5_35B_A3B,
    "qwen3_5_text": {**_QWEN3_5_9B_TEXT, "architectures": ["Qwen3_5ForCausalLM"]},
    "qwen3_5_moe_text": {**QWEN3_5_35B_A3B["text_config"], "architectures": ["Qwen3_5MoeForCausalLM"]},
    "mistral4_text": {
        **MISTRAL_SMALL_4["text_config"],
        "architectures": ["Mistral4ForCausalLM"],
        "torch_dtype": "bfloat16",
    },
}


def write(folder: Path, config: Config | str, generation: Config | None = None) -> Path:
    """Write a checkpoint without weights."""
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def read(folder: Path, config: Config, *args: Any) -> ModelConfig:
    """Write a config and return the model config read from it."""
    return read_model_config(write(folder, config), *args)
