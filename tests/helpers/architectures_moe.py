"""Tiny models with grouped-query attention and experts.

Windows, chunks and YaRN's original length are short, so that prompts of 70 and 300 tokens cross them. Of most families one
model has only multiples of 32 for sizes, and another has not.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MiniMaxM2Config,
    MiniMaxM2ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from expertwire.kernels.formats import dequantize, quantize
from helpers.architectures import Tensors, Tiny, biased, hub_style, per_expert

SIZES = {
    "vocab_size": 320,
    "hidden_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_hidden_layers": 3,
    "intermediate_size": 64,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 1024,
    # Large enough for a norm that takes another one's to show.
    "rms_norm_eps": 0.05,
    "bos_token_id": 298,
    "eos_token_id": 299,
    "pad_token_id": None,
    "attn_implementation": "eager",
}
ODD_SIZES = SIZES | {"hidden_size": 80, "head_dim": 24}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
NUM_EXPERTS = 8


def _further_layers(tensors: Tensors, count: int) -> Tensors:
    """Add layers for multi-token prediction after the last one."""
    last = 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("model.layers."))
    return tensors | {f"model.layers.{last + i}.eh_proj.weight": torch.ones(4, 8) for i in range(count)}


# ---- Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE


def _mixtral() -> PreTrainedModel:
    return MixtralForCausalLM(
        MixtralConfig(**ODD_SIZES, num_local_experts=NUM_EXPERTS, sliding_window=24, rope_parameters=ROPE)
    )


def _mixtral_tensors(tensors: Tensors) -> Tensors:
    return per_expert({n.replace(".mlp.", ".block_sparse_moe."): t for n, t in tensors.items()}, "w1", "w3", "w2")


def _qwen2_moe() -> PreTrainedModel:
    """A shared expert wider than a routed one, and a dense layer."""
    sizes = {name: size for name, size in ODD_SIZES.items() if name != "head_dim"}
    fields: dict[str, Any] = {
        "intermediate_size": 112,
        "moe_intermediate_size": 40,
        "shared_expert_intermediate_size": 72,
        "num_experts": NUM_EXPERTS,
        "mlp_only_layers": [1],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    }
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**{**sizes, **fields}))


def _qwen3_moe() -> PreTrainedModel:
    fields: dict[str, Any] = {
        "intermediate_size": 112,
        "moe_intermediate_size": 64,
        "num_experts": NUM_EXPERTS,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    }
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**SIZES, **fields}))


def _olmoe() -> PreTrainedModel:
    sizes = {name: size for name, size in SIZES.items() if name != "head_dim"}
    config = OlmoeConfig(**sizes | {"num_key_value_heads": 4}, num_experts=NUM_EXPERTS, rope_parameters=ROPE)
    return OlmoeForCausalLM(config)


# ---- gpt-oss


def _gpt_oss(sizes: dict[str, Any], **fields: Any) -> PreTrainedModel:
    scaling = {
        "rope_type": "yarn",
        "rope_theta": 150000.0,
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 64,
    }
    config = GptOssConfig(
        **sizes,
        num_local_experts=NUM_EXPERTS,
        sliding_window=24,
        swiglu_limit=1.5,
        rope_parameters=scaling,
        **fields,
    )
    return GptOssForCausalLM(config)


def _large_sinks(made: PreTrainedModel) -> None:
    for layer in made.model.layers:
        layer.self_attn.sinks.copy_(torch.linspace(1, 4, len(layer.self_attn.sinks)))


def _as_mxfp4(made: PreTrainedModel) -> None:
    """Round weights to MXFP4; columns are the inputs, which are rows in transformers."""
    _large_sinks(made)
    for layer in made.model.layers:
        for matrix in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
            quantized = quantize("mxfp4", matrix.transpose(1, 2).contiguous())
            matrix.copy_(dequantize(quantized, torch.float32).transpose(1, 2))


def _mxfp4_tensors(tensors: Tensors) -> Tensors:
    found: Tensors = {}
    for name, values in tensors.items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            found[name] = values
            continue
        quantized = quantize("mxfp4", values.transpose(1, 2).contiguous())
        assert torch.equal(dequantize(quantized, torch.float32), values.transpose(1, 2))
        found[name + "_blocks"] = quantized.data.unflatten(-1, (-1, 16))
        found[name + "_scales"] = quantized.scales
    return found


def _gpt_oss_config(config: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """Return a config like the hub's, which has no `swiglu_alpha`."""
    return hub_style(config, "GptOssForCausalLM", swiglu_alpha=None, **fields)


def _mxfp4_config(config: dict[str, Any]) -> dict[str, Any]:
    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    return _gpt_oss_config(config, quantization_config=quantization, layer_types=None)


# ---- Llama 4


def _llama4(sizes: dict[str, Any], **fields: Any) -> PreTrainedModel:
    given: dict[str, Any] = {
        **sizes,
        "num_hidden_layers": 4,
        "intermediate_size_mlp": 112,
        "num_experts_per_tok": 1,
        "num_local_experts": NUM_EXPERTS,
        "attention_chunk_size": 32,
        "floor_scale": 16,
        "attn_scale": 0.3,
        **fields,
    }
    return Llama4ForCausalLM(Llama4TextConfig(**given))


def _scout() -> PreTrainedModel:
    """Return Llama 4 Scout, whose two frequency factors are equal."""
    scaling = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 16.0, "original_max_position_embeddings": 64}
    return _llama4(SIZES, rope_parameters=scaling | {"low_freq_factor": 1.0, "high_freq_factor": 1.0})


def _maverick() -> PreTrainedModel:
    scaling = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "original_max_position_embeddings": 64}
    return _llama4(
        ODD_SIZES,
        use_qk_norm=False,
        interleave_moe_layer_step=2,
        no_rope_layers=[1, 0, 1, 0],
        rope_parameters=scaling | {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
    )


def _mobilellm() -> PreTrainedModel:
    return _llama4(
        SIZES,
        moe_layers=[],
        num_local_experts=0,
        num_experts_per_tok=0,
        no_rope_layers=[1] * 4,
        attention_chunk_size=1024,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
    )


def _scout_tensors(tensors: Tensors) -> Tensors:
    extra = {
        name: torch.ones(4, 8) for name in ("vision_model.class_embedding", "multi_modal_projector.linear_1.weight")
    }
    return {f"language_model.{name}": values for name, values in tensors.items()} | extra


def _scout_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return a wrapper's config around the text model's; missing fields have defaults."""
    text = hub_style(
        config,
        "Llama4ForCausalLM",
        architectures=None,
        attn_temperature_tuning=None,
        no_rope_layers=[],
        no_rope_layer_interval=None,
        moe_layers=None,
        layer_types=None,
        tie_word_embeddings=None,
    )
    return {
        "architectures": ["Llama4ForConditionalGeneration"],
        "model_type": "llama4",
        "text_config": text,
        "vision_config": {"model_type": "llama4_vision_model"},
        "tie_word_embeddings": False,
    }


# ---- MiniMax-M2, GLM-4.5


def _minimax_m2(sizes: dict[str, Any], rotated: int) -> PreTrainedModel:
    rope = {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": rotated / sizes["head_dim"]}
    return biased(MiniMaxM2ForCausalLM(MiniMaxM2Config(**sizes, num_local_experts=NUM_EXPERTS, rope_parameters=rope)))


def _minimax_m2_config(config: dict[str, Any], rotated: int) -> dict[str, Any]:
    return hub_style(
        config,
        "MiniMaxM2ForCausalLM",
        partial_rotary_factor=None,
        rotary_dim=rotated,
        attn_type_list=[1] * config["num_hidden_layers"],
        num_mtp_modules=3,
        use_mtp=True,
        mtp_transformer_layers=1,
        qk_norm_type="per_layer",
        use_qk_norm=True,
        scoring_func="sigmoid",
        use_routing_bias=True,
        shared_intermediate_size=0,
    )


def _glm4_moe(sizes: dict[str, Any], **fields: Any) -> PreTrainedModel:
    rope = {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5}
    config = Glm4MoeConfig(
        **sizes | {"intermediate_size": 112, "moe_intermediate_size": 64},
        n_routed_experts=NUM_EXPERTS,
        attention_bias=True,
        rope_parameters=rope,
        **fields,
    )
    return biased(Glm4MoeForCausalLM(config))


def _glm4_moe_config(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    fields = hub_style(config, "Glm4MoeForCausalLM", num_nextn_predict_layers=1, num_mtp_layers=None, **changes)
    return fields | {"n_routed_experts": NUM_EXPERTS}


def _glm4_moe_tensors(tensors: Tensors) -> Tensors:
    return _further_layers(per_expert(tensors), 1)


ALL = {
    "mixtral": Tiny(
        model=_mixtral,
        hub_tensors=_mixtral_tensors,
        hub_config=lambda config: hub_style(config, "MixtralForCausalLM"),
    ),
    "qwen2_moe": Tiny(
        model=_qwen2_moe,
        hub_tensors=per_expert,
        hub_config=lambda config: hub_style(config, "Qwen2MoeForCausalLM", layer_types=None, qkv_bias=None),
    ),
    "qwen3_moe": Tiny(
        model=_qwen3_moe,
        hub_tensors=per_expert,
        hub_config=lambda config: hub_style(config, "Qwen3MoeForCausalLM", num_local_experts=None, num_experts=8),
    ),
    "olmoe": Tiny(
        model=_olmoe,
        hub_tensors=per_expert,
        hub_config=lambda config: hub_style(config, "OlmoeForCausalLM"),
    ),
    "gpt_oss": Tiny(
        model=lambda: _gpt_oss(ODD_SIZES),
        hub_tensors=dict,
        hub_config=_gpt_oss_config,
        adjust=_large_sinks,
    ),
    "gpt_oss_mxfp4": Tiny(
        model=lambda: _gpt_oss(SIZES),
        hub_tensors=_mxfp4_tensors,
        hub_config=_mxfp4_config,
        adjust=_as_mxfp4,
    ),
    "llama4_scout": Tiny(model=_scout, hub_tensors=_scout_tensors, hub_config=_scout_config),
    "llama4_maverick": Tiny(
        model=_maverick,
        hub_tensors=dict,
        hub_config=lambda config: hub_style(config, "Llama4ForCausalLM", attn_temperature_tuning=4),
    ),
    "mobilellm_r1": Tiny(
        model=_mobilellm,
        hub_tensors=dict,
        hub_config=lambda config: hub_style(config, "Llama4ForCausalLM", interleave_moe_layer_step=0),
    ),
    "minimax_m2": Tiny(
        model=lambda: _minimax_m2(SIZES, 16),
        hub_tensors=lambda tensors: _further_layers(_mixtral_tensors(tensors), 3),
        hub_config=lambda config: _minimax_m2_config(config, 16),
    ),
    "minimax_m2_odd": Tiny(
        model=lambda: _minimax_m2(ODD_SIZES, 12),
        hub_tensors=_mixtral_tensors,
        hub_config=lambda config: _minimax_m2_config(config, 12),
    ),
    "glm4_moe": Tiny(
        model=lambda: _glm4_moe(SIZES, use_qk_norm=True, routed_scaling_factor=2.5),
        hub_tensors=_glm4_moe_tensors,
        hub_config=_glm4_moe_config,
    ),
    "glm4_moe_air": Tiny(
        model=lambda: _glm4_moe(ODD_SIZES),
        hub_tensors=_glm4_moe_tensors,
        hub_config=lambda config: _glm4_moe_config(config, partial_rotary_factor=None),
    ),
}
