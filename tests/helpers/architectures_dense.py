"""Tiny dense models."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Ministral3Config,
    Ministral3ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from helpers.architectures import Tensors, Tiny, hub_style

SIZES = {
    "vocab_size": 320,
    "hidden_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "intermediate_size": 112,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "attn_implementation": "eager",
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.3,
}
PARTIAL = 0.75
PAIRS = 12  # of heads of 32 numbers, of which 3/4 are rotated


def long_rope(original_max_position: int) -> dict[str, Any]:
    """Return LongRoPE of a model for 1024 tokens: with an original length of 16 most prompts are long, with 512 none is."""
    return {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "partial_rotary_factor": PARTIAL,
        "short_factor": [1 + 0.1 * i for i in range(PAIRS)],
        "long_factor": [1.5 + 0.7 * i for i in range(PAIRS)],
        "original_max_position_embeddings": original_max_position,
    }


def default_rope(theta: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta}


def _llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, "tie_word_embeddings": True}, rope_parameters=LLAMA3))


def _mistral() -> PreTrainedModel:
    config = MistralConfig(**SIZES, head_dim=32, sliding_window=40, rope_parameters=default_rope(1e4))
    return MistralForCausalLM(config)


def _ministral3() -> PreTrainedModel:
    return Ministral3ForCausalLM(Ministral3Config(**SIZES, head_dim=32, rope_parameters=YARN))


def _qwen3() -> PreTrainedModel:
    fields = {"head_dim": 32, "use_sliding_window": True, "sliding_window": 40, "max_window_layers": 2}
    return Qwen3ForCausalLM(
        Qwen3Config(**{**SIZES, "tie_word_embeddings": True}, **fields, rope_parameters=default_rope(1e6))
    )


def _qwen2() -> PreTrainedModel:
    fields = {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 2}
    return Qwen2ForCausalLM(Qwen2Config(**SIZES, **fields, rope_parameters=default_rope(1e6)))


def _phi3(original_max_position: int | None, **changes: Any) -> PreTrainedModel:
    fields = {**SIZES, "hidden_size": 128, "pad_token_id": 0, "eos_token_id": 2, "rope_parameters": default_rope(1e4)}
    if original_max_position is not None:
        # Outside of the scaling, too: there it has a default, which would win.
        fields["original_max_position_embeddings"] = original_max_position
        fields["rope_parameters"] = long_rope(original_max_position)
    return Phi3ForCausalLM(Phi3Config(**fields | changes))


def _wrapped(tensors: Tensors) -> Tensors:
    """Add a vision tower and a projector before the language model."""
    others = {
        "vision_tower.patch_conv.weight": torch.ones(2, 3),
        "multi_modal_projector.linear_1.weight": torch.ones(2),
    }
    return others | {f"language_model.{name}": values for name, values in tensors.items()}


def wrapped_config(config: dict[str, Any], **text: Any) -> dict[str, Any]:
    """Return a config like Ministral 3's: transformers 5's fields in `text_config`, type and tokens outside."""
    fields = {**config, "sliding_window": None, **text}
    del fields["dtype"], fields["architectures"]
    return {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "model_type": "mistral3",
        "dtype": "float32",
        "text_config": {name: value for name, value in fields.items() if value is not None or name == "sliding_window"},
        "vision_config": {"model_type": "pixtral", "hidden_size": 1024, "num_hidden_layers": 24},
    }


def _phi_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config like Phi-4-mini's: the scaling has a `type`, and the original length is outside."""
    fields = hub_style(config, "Phi3ForCausalLM", attention_bias=False, mlp_bias=False, lm_head_bias=False)
    scaling = fields["rope_scaling"]
    if scaling is not None:
        fields["original_max_position_embeddings"] = scaling["original_max_position_embeddings"]
        fields["rope_scaling"] = {name: scaling[name] for name in ("short_factor", "long_factor")} | {
            "type": "longrope"
        }
    return fields


def same(tensors: Tensors) -> Tensors:
    return tensors


ALL = {
    "llama": Tiny(
        model=_llama,
        hub_tensors=same,
        hub_config=lambda config: hub_style(config, "LlamaForCausalLM", head_dim=None),
    ),
    "mistral": Tiny(
        model=_mistral, hub_tensors=same, hub_config=lambda config: hub_style(config, "MistralForCausalLM")
    ),
    "ministral3": Tiny(model=_ministral3, hub_tensors=_wrapped, hub_config=wrapped_config),
    "qwen2": Tiny(
        model=_qwen2,
        hub_tensors=same,
        hub_config=lambda config: hub_style(config, "Qwen2ForCausalLM", layer_types=None),
    ),
    "qwen3": Tiny(
        model=_qwen3,
        hub_tensors=same,
        hub_config=lambda config: hub_style(config, "Qwen3ForCausalLM", layer_types=None),
    ),
    "phi3": Tiny(model=lambda: _phi3(None, sliding_window=40), hub_tensors=same, hub_config=_phi_config),
    "phi4_mini": Tiny(model=lambda: _phi3(16, tie_word_embeddings=True), hub_tensors=same, hub_config=_phi_config),
    "phi4_mini_short": Tiny(model=lambda: _phi3(512), hub_tensors=same, hub_config=_phi_config),
}
