"""Tiny models with latent attention."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DeepseekV32Config,
    DeepseekV32ForCausalLM,
    Glm4MoeLiteConfig,
    Glm4MoeLiteForCausalLM,
    GlmMoeDsaConfig,
    GlmMoeDsaForCausalLM,
    Mistral4Config,
    Mistral4ForCausalLM,
    PreTrainedModel,
)

from helpers.architectures import Tensors, Tiny, biased, hub_style, per_expert
from helpers.published_formats import DEEPSEEK, KIMI, MISTRAL

NUM_LAYERS = 3
SIZES = {
    "vocab_size": 320,
    "hidden_size": 96,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 112,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "q_lora_rank": 48,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 16,
    "v_head_dim": 40,
    "max_position_embeddings": 1024,
    "attn_implementation": "eager",
}
DENSE_FIRST = ["dense"] + ["sparse"] * (NUM_LAYERS - 1)
# So many heads that hardly a score is zero: of equal ones transformers sees any.
INDEXER = {"index_topk": 32, "index_head_dim": 32, "index_n_heads": 16}
# Large enough for a norm that takes another one's to show.
EPS = 0.1


def yarn(theta: float = 1e4, **fields: Any) -> dict[str, Any]:
    """Return YaRN whose original context is shorter than prompts of 70 tokens."""
    return {
        "rope_type": "yarn",
        "rope_theta": theta,
        "original_max_position_embeddings": 64,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        **fields,
    }


def _deepseek_v2(**changes: Any) -> PreTrainedModel:
    fields = {
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 3.0,
        "rope_parameters": yarn(factor=40.0, mscale=0.707, mscale_all_dim=0.707),
        "rms_norm_eps": EPS,
    }
    return DeepseekV2ForCausalLM(DeepseekV2Config(**{**SIZES, **fields, **changes}))


def _deepseek_v3(**changes: Any) -> PreTrainedModel:
    fields = {
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 4,
        "topk_group": 2,
        "rope_parameters": yarn(factor=40.0, mscale=1.0, mscale_all_dim=1.0),
    }
    return biased(DeepseekV3ForCausalLM(DeepseekV3Config(**{**SIZES, **fields, **changes})))


def _kimi_k2() -> PreTrainedModel:
    scaling = yarn(5e4, factor=32.0, beta_fast=1.0, mscale=1.0, mscale_all_dim=1.0)
    return _deepseek_v3(n_group=1, topk_group=1, rope_parameters=scaling, routed_scaling_factor=2.827)


def _deepseek_v32() -> PreTrainedModel:
    config = DeepseekV32Config(
        **{**SIZES, **INDEXER},
        n_group=4,
        topk_group=2,
        first_k_dense_replace=1,
        rope_parameters=yarn(factor=40.0, mscale=1.0, mscale_all_dim=1.0),
    )
    return biased(DeepseekV32ForCausalLM(config))


def _glm4_moe_lite() -> PreTrainedModel:
    rope = {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 1.0}
    config = Glm4MoeLiteConfig(**SIZES, rms_norm_eps=EPS, rope_parameters=rope, mlp_layer_types=DENSE_FIRST)
    return biased(Glm4MoeLiteForCausalLM(config))


def _glm_moe_dsa() -> PreTrainedModel:
    rope = {"rope_type": "default", "rope_theta": 1e6}
    config = GlmMoeDsaConfig(
        **{**SIZES, **INDEXER}, rms_norm_eps=EPS, rope_parameters=rope, mlp_layer_types=DENSE_FIRST
    )
    return biased(GlmMoeDsaForCausalLM(config))


def _mistral4() -> PreTrainedModel:
    scaling = yarn(factor=128.0, mscale=1.0, mscale_all_dim=1.0, llama_4_scaling_beta=0.3)
    return Mistral4ForCausalLM(Mistral4Config(**{**SIZES, "qk_nope_head_dim": 16}, rope_parameters=scaling))


def _deepseek_config(config: dict[str, Any], architecture: str, **changes: Any) -> dict[str, Any]:
    """Return a config like DeepSeek's: the scaling has a `type`, and there is no list of layers."""
    fields = hub_style(config, architecture, mlp_layer_types=None, layer_types=None, **changes)
    if fields["rope_scaling"] is not None:
        fields["rope_scaling"]["type"] = fields["rope_scaling"].pop("rope_type")
    return fields


def _v3_config(config: dict[str, Any], architecture: str = "DeepseekV3ForCausalLM", **changes: Any) -> dict[str, Any]:
    routing = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1}
    return _deepseek_config(config, architecture, num_nextn_predict_layers=1, **routing, **changes)


def _v2_config(config: dict[str, Any], method: str) -> dict[str, Any]:
    routing = {"topk_method": method, "scoring_func": "softmax", "moe_layer_freq": 1, "norm_topk_prob": False}
    return _deepseek_config(config, "DeepseekV2ForCausalLM", **routing)


def _glm_config(config: dict[str, Any], architecture: str) -> dict[str, Any]:
    """Return a config as transformers 5 writes it."""
    return {**config, "architectures": [architecture], "dtype": "float32", "num_nextn_predict_layers": 1}


def _kimi_config(config: dict[str, Any]) -> dict[str, Any]:
    return {**_v3_config(config), "model_type": "kimi_k2", "num_nextn_predict_layers": 0}


def _wrapped(text: dict[str, Any], architecture: str, model_type: str) -> dict[str, Any]:
    """Wrap a text model, whose head is not tied whatever the wrapper says."""
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "dtype": "float32",
        "tie_word_embeddings": True,
        "text_config": {name: value for name, value in text.items() if name not in ("architectures", "dtype")},
        "vision_config": {"model_type": "vision", "hidden_size": 8, "vocab_size": 7},
    }


def with_predictor(tensors: Tensors) -> Tensors:
    """Return experts one by one and, after the last layer, one for multi-token prediction, as DeepSeek has it."""
    tensors = per_expert(tensors)
    last, extra = f"model.layers.{NUM_LAYERS - 1}.", f"model.layers.{NUM_LAYERS}."
    width = tensors["model.norm.weight"]
    own = {
        "embed_tokens.weight": tensors["model.embed_tokens.weight"],
        "enorm.weight": width,
        "hnorm.weight": width,
        "eh_proj.weight": torch.cat((torch.diag(width), torch.diag(width)), 1),
        "shared_head.norm.weight": width,
        "shared_head.head.weight": tensors["lm_head.weight"],
    }
    own |= {name.removeprefix(last): values for name, values in tensors.items() if name.startswith(last)}
    return tensors | {extra + name: values.clone() for name, values in own.items()}


def _multimodal(tensors: Tensors) -> Tensors:
    vision = "vision_tower.patch_conv.weight", "multi_modal_projector.linear_1.weight", "mm_projector.proj.0.weight"
    text = {"language_model." + name: values for name, values in tensors.items()}
    return text | {name: torch.ones(8, 3) for name in vision}


ALL = {
    "deepseek_v2": Tiny(
        model=lambda: _deepseek_v2(topk_method="group_limited_greedy", n_group=4, topk_group=2),
        hub_tensors=per_expert,
        hub_config=lambda config: _v2_config(config, "group_limited_greedy"),
    ),
    "deepseek_v2_lite": Tiny(
        model=lambda: _deepseek_v2(topk_method="greedy", n_group=1, topk_group=1, q_lora_rank=None),
        hub_tensors=per_expert,
        hub_config=lambda config: {**_v2_config(config, "greedy"), "q_lora_rank": None},
    ),
    "deepseek_v3": Tiny(model=_deepseek_v3, hub_tensors=with_predictor, hub_config=_v3_config),
    "deepseek_v3_fp8": Tiny(
        model=_deepseek_v3,
        adjust=DEEPSEEK.round,
        hub_tensors=lambda tensors: DEEPSEEK.tensors(with_predictor(tensors)),
        hub_config=lambda config: _v3_config(config, quantization_config=DEEPSEEK.config),
    ),
    "kimi_k2": Tiny(model=_kimi_k2, hub_tensors=per_expert, hub_config=_kimi_config),
    "kimi_k25_int4": Tiny(
        model=_kimi_k2,
        adjust=KIMI.round,
        hub_tensors=lambda tensors: _multimodal(KIMI.tensors(per_expert(tensors))),
        hub_config=lambda config: _wrapped(
            {**_kimi_config(config), "quantization_config": KIMI.config}, "KimiK25ForConditionalGeneration", "kimi_k25"
        ),
    ),
    "deepseek_v32": Tiny(
        model=_deepseek_v32,
        hub_tensors=with_predictor,
        hub_config=lambda config: _v3_config(config, "DeepseekV32ForCausalLM"),
    ),
    "glm4_moe_lite": Tiny(
        model=_glm4_moe_lite,
        hub_tensors=with_predictor,
        hub_config=lambda config: _glm_config(config, "Glm4MoeLiteForCausalLM"),
    ),
    "glm_moe_dsa": Tiny(
        model=_glm_moe_dsa,
        hub_tensors=with_predictor,
        hub_config=lambda config: _glm_config(config, "GlmMoeDsaForCausalLM"),
    ),
    "mistral4": Tiny(
        model=_mistral4,
        hub_tensors=lambda tensors: tensors,
        hub_config=lambda config: {**config, "architectures": ["Mistral4ForCausalLM"], "dtype": "float32"},
    ),
    "mistral_small4_fp8": Tiny(
        model=_mistral4,
        adjust=MISTRAL.round,
        hub_tensors=lambda tensors: _multimodal(MISTRAL.tensors(tensors)),
        hub_config=lambda config: {
            **_wrapped(config, "Mistral3ForConditionalGeneration", "mistral3"),
            "quantization_config": MISTRAL.config,
        },
    ),
}
