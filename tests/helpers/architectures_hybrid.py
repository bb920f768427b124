"""Tiny models with recurrent states beside attention.

Decays reach from fractions of a token to thousands, so that states of earlier chunks and snapshots show; most models have sizes
of their own for each head, group and state, so that a swapped dimension does not pass unseen.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import (
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    NemotronHConfig,
    NemotronHForCausalLM,
    PreTrainedModel,
    Qwen3_5ForCausalLM,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from helpers.architectures import Tensors, Tiny, biased, hub_style, per_expert
from helpers.published_formats import MODELOPT_FP8, MODELOPT_NVFP4, QWEN, Published
from helpers.reference_phi4flash import Phi4Flash, Phi4FlashConfig

_EOS = {"bos_token_id": 298, "eos_token_id": 299, "pad_token_id": None}


def slow_decay(made: PreTrainedModel) -> None:
    """Give the heads of recurrent mixers decays and time steps of different sizes."""
    for name, values in made.named_parameters():
        num_heads = values.shape[0]
        if name.endswith("A_log"):
            values.copy_(torch.linspace(math.log(0.01), math.log(3), num_heads))
        elif name.endswith("dt_bias"):
            values.copy_(torch.linspace(0, -2.5, num_heads))


# ---- Nemotron-H and Nemotron 3

_KINDS = {"M": "linear_attention", "E": "moe", "*": "full_attention", "-": "mlp"}
_NEMOTRON = {
    "vocab_size": 320,
    "hidden_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 112,
    "ssm_state_size": 16,
    "mamba_num_heads": 6,
    "mamba_head_dim": 16,
    "n_groups": 2,
    "n_routed_experts": 8,
    "moe_intermediate_size": 48,
    "moe_shared_expert_intermediate_size": 80,
    "num_experts_per_tok": 3,
    "routed_scaling_factor": 2.5,
    "layer_norm_epsilon": 0.05,
    "max_position_embeddings": 1024,
    # transformers clamps the time step there; the published code does not.
    "time_step_min": 1e-30,
    "attn_implementation": "eager",
    **_EOS,
}


def _nemotron(pattern: str, **changes: Any) -> PreTrainedModel:
    config = NemotronHConfig(**_NEMOTRON | changes, layers_block_type=[_KINDS[letter] for letter in pattern])
    return biased(NemotronHForCausalLM(config))


def _nemotron_tensors(tensors: Tensors) -> Tensors:
    """Return the hub's tensors: experts one by one, and a layer for multi-token prediction."""
    found: Tensors = {"mtp.layers.0.eh_proj.weight": torch.ones(4, 8)}
    for name, values in tensors.items():
        hub, is_expert, part = name.replace("model.", "backbone.", 1).rpartition(".experts.")
        if not is_expert:
            found[part] = values
            continue
        found |= {f"{hub}.experts.{e}.{part}.weight": matrix for e, matrix in enumerate(values)}
    return found


def nemotron_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config like Nemotron's: a pattern of letters, and fields of rotary embeddings that it does not have."""
    letters = {kind: letter for letter, kind in _KINDS.items()}
    pattern = "".join(letters[kind] for kind in config["layers_block_type"])
    more = {
        "hybrid_override_pattern": pattern,
        "num_hidden_layers": len(pattern),
        "rope_theta": 10000,
        "norm_eps": 1e-5,
    }
    fields = hub_style(config, "NemotronHForCausalLM", **more)
    return {name: value for name, value in fields.items() if name not in ("layers_block_type", "rope_scaling")}


def _quantized(pattern: str, stored: Published, **changes: Any) -> Tiny:
    def adjust(made: PreTrainedModel) -> None:
        slow_decay(made)
        stored.round(made)

    return Tiny(
        model=lambda: _nemotron(pattern, **changes),
        hub_tensors=lambda tensors: stored.tensors(_nemotron_tensors(tensors)),
        hub_config=lambda config: nemotron_config(config) | {"quantization_config": stored.config},
        adjust=adjust,
    )


# ---- Granite 4.0

_GRANITE = {
    "vocab_size": 320,
    "hidden_size": 96,
    "num_hidden_layers": 4,
    "layer_types": ["mamba", "mamba", "attention", "mamba"],
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "intermediate_size": 48,
    "shared_intermediate_size": 80,
    "num_local_experts": 8,
    "num_experts_per_tok": 3,
    "mamba_n_heads": 12,
    "mamba_d_head": 16,
    "mamba_d_state": 24,
    "rms_norm_eps": 0.05,
    "max_position_embeddings": 1024,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.1,
    "logits_scaling": 0.7,
    "tie_word_embeddings": True,
    "attn_implementation": "eager",
    **_EOS,
}


def _granite(**changes: Any) -> PreTrainedModel:
    return GraniteMoeHybridForCausalLM(GraniteMoeHybridConfig(**_GRANITE | changes))


def _granite_tensors(tensors: Tensors) -> Tensors:
    names = {
        "experts.gate_up_proj": "input_linear.weight",
        "experts.down_proj": "output_linear.weight",
        "router.weight": "router.layer.weight",
    }
    found = {}
    for name, values in tensors.items():
        for ours, hub in names.items():
            if "block_sparse_moe." in name:
                name = name.replace(ours, hub)
        found[name] = values
    return found


def _granite_adjust(made: PreTrainedModel) -> None:
    """Larger weights, as the residual multiplier would hide what a layer adds."""
    slow_decay(made)
    for name, values in made.named_parameters():
        if name.endswith(("o_proj.weight", "out_proj.weight", "output_linear.weight", "experts.down_proj")):
            values.mul_(4)
        elif "embed_tokens" in name:
            values.mul_(0.25)


def granite_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config like Granite's."""
    kinds = {"linear_attention": "mamba", "full_attention": "attention"}
    layers = [kinds.get(kind, kind) for kind in config["layer_types"]]
    position = config["position_embedding_type"] or "nope"
    more = {"layer_types": layers, "position_embedding_type": position, "time_step_limit": None}
    return hub_style(config, "GraniteMoeHybridForCausalLM", **more)


# ---- Phi-4-mini-flash, by a reference of our own


def _flash_adjust(made: Any) -> None:
    """Decays of all lengths, lambdas that differ, and outputs of mixers that are about as large as those of the MLPs."""
    generator, names = torch.Generator().manual_seed(7), dict(made.named_parameters())
    for name, values in made.named_parameters():
        if name.endswith("A_log"):
            values.copy_(torch.linspace(math.log(0.02), math.log(4), values.numel()).view(values.shape))
        elif name.endswith("dt_proj.bias"):
            values.copy_(torch.linspace(0.5, -3, values.numel()))
        elif name.endswith((".D", "subln.weight")):
            values.copy_(1 + 0.3 * torch.randn(values.shape, generator=generator))
        elif "lambda_" in name:
            values.mul_(0.4)
        elif name.endswith("out_proj.weight") and name.replace("out_proj", "Wqkv") in names:
            values.mul_(4)
        elif name.endswith("x_proj.weight"):
            values.mul_(0.2)
        elif name.endswith("out_proj.weight"):
            values.mul_(0.03)


def flash_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config like the published one, which has no fields of Mamba's."""
    return config | {"architectures": ["Phi4FlashForCausalLM"], "torch_dtype": "float32"}


# ---- Qwen3-Next, Qwen3.5 and Qwen3.6

_QWEN = {
    "vocab_size": 320,
    "hidden_size": 96,
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 32,
    "rms_norm_eps": 0.01,
    "max_position_embeddings": 1024,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
    "attn_implementation": "eager",
    **_EOS,
}
_QWEN_MOE = {
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 80,
}


# Each key head has whole blocks of fp8.
_WIDE = {"linear_num_value_heads": 4, "linear_key_head_dim": 128, "linear_value_head_dim": 128}


def _qwen_adjust(made: PreTrainedModel) -> None:
    """Weights of zero-centred norms around zero."""
    slow_decay(made)
    for name, values in made.named_parameters():
        if "norm" in name and "linear_attn.norm" not in name:
            values.sub_(1)


def _qwen_rounded(made: PreTrainedModel) -> None:
    _qwen_adjust(made)
    QWEN.round(made)


def _qwen_next_tensors(tensors: Tensors) -> Tensors:
    return per_expert(tensors) | {"mtp.fc.weight": torch.ones(4, 8)}


def _qwen_tensors(tensors: Tensors) -> Tensors:
    """Return the hub's tensors of Qwen3.5: the text model's within a wrapper, experts fused, beside what is not loaded."""
    more = {"model.visual.patch_embed.proj.weight": torch.ones(4, 8), "mtp.layers.0.mlp.gate.weight": torch.ones(4, 8)}
    return {name.replace("model.", "model.language_model.", 1): values for name, values in tensors.items()} | more


def qwen_next_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config like Qwen3-Next's."""
    return hub_style(config, "Qwen3NextForCausalLM")


def qwen_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config like Qwen3.5's: the text model's in a section, whose rope parameters have sections for images."""
    kind = "Moe" if "num_experts" in config else ""
    text = {name: value for name, value in config.items() if name not in ("architectures", "dtype", "layer_types")}
    rope = config["rope_parameters"] | {"mrope_interleaved": True, "mrope_section": [2, 1, 1]}
    return {
        "architectures": [f"Qwen3_5{kind}ForConditionalGeneration"],
        "model_type": f"qwen3_5{'_moe' if kind else ''}",
        "text_config": text | {"dtype": "float32", "rope_parameters": rope, "full_attention_interval": 3},
        "tie_word_embeddings": config["tie_word_embeddings"],
        "vision_config": {"model_type": "qwen3_5_vision", "hidden_size": 8},
    }


ALL = {
    "phi4_flash": Tiny(
        model=lambda: Phi4Flash(Phi4FlashConfig()),
        hub_tensors=lambda tensors: tensors,
        hub_config=flash_config,
        logits=lambda made, ids: made.logits(ids),
        adjust=_flash_adjust,
    ),
    "qwen3_next": Tiny(
        model=lambda: Qwen3NextForCausalLM(
            Qwen3NextConfig(**_QWEN | _QWEN_MOE, mlp_only_layers=[1], intermediate_size=112)
        ),
        hub_tensors=_qwen_next_tensors,
        hub_config=qwen_next_config,
        adjust=_qwen_adjust,
    ),
    "qwen3_next_fp8": Tiny(
        model=lambda: Qwen3NextForCausalLM(Qwen3NextConfig(**_QWEN | _QWEN_MOE | _WIDE)),
        hub_tensors=lambda tensors: QWEN.tensors(_qwen_next_tensors(tensors)),
        hub_config=lambda config: qwen_next_config(config) | {"quantization_config": QWEN.config},
        adjust=_qwen_rounded,
    ),
    "qwen3_5_moe_fp8": Tiny(
        model=lambda: Qwen3_5MoeForCausalLM(Qwen3_5MoeTextConfig(**_QWEN | _QWEN_MOE)),
        hub_tensors=lambda tensors: QWEN.tensors(_qwen_tensors(per_expert(tensors))),
        hub_config=lambda config: qwen_config(config) | {"quantization_config": QWEN.config},
        adjust=_qwen_rounded,
    ),
    "qwen3_5": Tiny(
        model=lambda: Qwen3_5ForCausalLM(Qwen3_5TextConfig(**_QWEN, intermediate_size=112, tie_word_embeddings=True)),
        hub_tensors=_qwen_tensors,
        hub_config=qwen_config,
        adjust=_qwen_adjust,
    ),
    "qwen3_5_moe": Tiny(
        model=lambda: Qwen3_5MoeForCausalLM(Qwen3_5MoeTextConfig(**_QWEN | _QWEN_MOE)),
        hub_tensors=_qwen_tensors,
        hub_config=qwen_config,
        adjust=_qwen_adjust,
    ),
    "nemotron_h": Tiny(
        model=lambda: _nemotron("M-M*-"),
        hub_tensors=_nemotron_tensors,
        hub_config=nemotron_config,
        adjust=slow_decay,
    ),
    "nemotron3_nano": Tiny(
        model=lambda: _nemotron("MEM*E"),
        hub_tensors=_nemotron_tensors,
        hub_config=nemotron_config,
        adjust=slow_decay,
    ),
    "nemotron3_super": Tiny(
        model=lambda: _nemotron("ME*EM", moe_latent_size=64, hidden_size=80, mamba_num_heads=5, n_groups=1),
        hub_tensors=_nemotron_tensors,
        hub_config=nemotron_config,
        adjust=slow_decay,
    ),
    "nemotron3_nano_fp8": _quantized("MEM*E", MODELOPT_FP8),
    "nemotron3_super_nvfp4": _quantized("ME*EM", MODELOPT_NVFP4, moe_latent_size=64),
    "granite_h": Tiny(model=_granite, hub_tensors=_granite_tensors, hub_config=granite_config, adjust=_granite_adjust),
    "granite_h_dense": Tiny(
        model=lambda: _granite(
            num_local_experts=0, position_embedding_type="rope", mamba_n_groups=2, tie_word_embeddings=False
        ),
        hub_tensors=_granite_tensors,
        hub_config=granite_config,
        adjust=_granite_adjust,
    ),
}
