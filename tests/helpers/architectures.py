"""Tiny random models of every architecture, in the hub's format, and the results of transformers for them.

Each `architectures_*.py` adds entries to `all_of_them`.
"""

from __future__ import annotations

import expertwire  # noqa: F401  # isort: skip  (first: transformers must not take our `kernels` for another package's)

import functools
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from helpers import chat_templates
from helpers import tiny_checkpoints as tiny

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Tiny:
    """A tiny model and its form on the hub.

    Attributes:
        model: returns transformers' text model; its weights are then scaled so that every tensor matters.
        hub_tensors: converts the state dictionary, in which experts are fused, to the hub's tensors.
        hub_config: converts the config to the hub's config.json, with "architectures" and "torch_dtype".
        logits: returns the reference [T, V] of the model and token ids where transformers' own is wrong.
        adjust: changes the scaled weights.
    """

    model: Callable[[], PreTrainedModel]
    hub_tensors: Callable[[Tensors], Tensors]
    hub_config: Callable[[dict[str, Any]], dict[str, Any]]
    logits: Callable[[PreTrainedModel, torch.Tensor], torch.Tensor] | None = None
    adjust: Callable[[PreTrainedModel], None] | None = None


# The chat template of the models whose names begin so; the longest of them counts.
_CHATS = {
    "deepseek": "deepseek_r1",
    "deepseek_v3_fp8": "deepseek_v31",
    "deepseek_v32": "deepseek_v31",
    "glm4_moe": "glm_45",
    "glm4_moe_lite": "glm_47",
    "glm_moe_dsa": "glm_47",
    "gpt_oss": "gpt_oss",
    "granite": "granite_4",
    "kimi": "kimi_k2",
    "llama": "llama_3",
    "llama4": "llama_4",
    "mobilellm": "llama_4",
    "minimax": "minimax_m2",
    "ministral": "mistral",
    "mistral": "mistral",
    "mixtral": "mistral",
    "nemotron": "qwen3_coder",
    "olmoe": "olmoe",
    "phi": "phi_4_mini",
    "qwen2": "qwen3",
    "qwen3": "qwen3",
    "qwen3_5": "qwen3_coder",
}


def chat_family(name: str) -> str:
    """Return the family in `chat_templates.FAMILIES` whose chat template a model's checkpoint has."""
    return _CHATS[max((start for start in _CHATS if name.startswith(start)), key=len)]


@functools.cache
def all_of_them() -> dict[str, Tiny]:
    """Return the tiny models by name."""
    from helpers import (  # which import this module
        architectures_dense,
        architectures_hybrid,
        architectures_latent,
        architectures_moe,
    )

    return architectures_moe.ALL | architectures_latent.ALL | architectures_dense.ALL | architectures_hybrid.ALL


@functools.cache
def model(name: str) -> PreTrainedModel:
    """Return transformers' model, fp32."""
    described = all_of_them()[name]
    made = described.model().float().eval()
    tiny._scale_weights(made, seed=0)
    if described.adjust is not None:
        with torch.no_grad():
            described.adjust(made)
    return made


@functools.cache
def folder(name: str) -> Path:
    """Return the folder of a checkpoint in fp32, written once and removed at exit. Do not change it."""
    return write(name, Path(tempfile.mkdtemp(prefix="arch-", dir=tiny._scratch().name)))


def write(name: str, path: Path) -> Path:
    """Write the checkpoint into a folder."""
    described, made = all_of_them()[name], model(name)
    tied = made.config.tie_word_embeddings
    tensors = {n: t for n, t in made.state_dict().items() if not (tied and n == "lm_head.weight")}
    tensors = described.hub_tensors({n: t.detach().clone() for n, t in tensors.items()})
    save_file({n: t.contiguous() for n, t in tensors.items()}, path / "model.safetensors", metadata={"format": "pt"})
    config = described.hub_config(json.loads(json.dumps(made.config.to_dict(), default=str)))
    (path / "config.json").write_text(json.dumps(config, indent=2))
    chat_templates.write(path, chat_templates.FAMILIES[chat_family(name)])
    return path


def reference_logits(name: str, ids: Sequence[int]) -> np.ndarray:
    """Return the reference's logits, fp32 [T, V]."""
    described, made = all_of_them()[name], model(name)
    with torch.no_grad():
        tokens = torch.tensor([list(ids)])
        if described.logits is not None:
            return described.logits(made, tokens).numpy()
        return made(tokens, use_cache=False).logits[0].numpy()


def reference_greedy(name: str, ids: Sequence[int], num: int) -> tuple[list[int], float]:
    """Return the next tokens and the smallest difference between the best two logits of a step."""
    known, closest = list(ids), float("inf")
    for _ in range(num):
        last = reference_logits(name, known)[-1]
        second, best = np.sort(last)[-2:]
        closest = min(closest, float(best - second))
        known.append(int(last.argmax()))
    return known[len(ids) :], closest


def per_expert(tensors: Tensors, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj") -> Tensors:
    """Return fused experts [E, 2F, D] and [E, D, F] one by one, as `...experts.E.gate_proj.weight` and so on."""
    found: Tensors = {}
    for name, values in tensors.items():
        prefix, is_expert, part = name.rpartition(".experts.")
        if not is_expert or part not in ("gate_up_proj", "down_proj"):
            found[name] = values
            continue
        for e, matrix in enumerate(values):
            one = f"{prefix}.experts.{e}."
            if part == "down_proj":
                found[f"{one}{down}.weight"] = matrix
            else:
                found[f"{one}{gate}.weight"], found[f"{one}{up}.weight"] = matrix.chunk(2)
    return found


def biased(made: PreTrainedModel) -> PreTrainedModel:
    """Give a model random biases for the choice of experts, which are buffers."""
    generator = torch.Generator().manual_seed(1)
    for name, values in made.named_buffers():
        if name.endswith("e_score_correction_bias"):
            values.copy_(torch.randn(values.shape, generator=generator) * 0.3)
    return made


def hub_style(config: dict[str, Any], architecture: str, **changes: Any) -> dict[str, Any]:
    """Return a config of transformers 5 with the hub's fields: `rope_theta`, `rope_scaling`, `torch_dtype`.

    A change to None removes the field.
    """
    fields = dict(config)
    rope = dict(fields.pop("rope_parameters", None) or {})
    fields.pop("dtype", None)
    fields |= {"architectures": [architecture], "torch_dtype": "float32"}
    if "rope_theta" in rope:
        fields["rope_theta"] = rope.pop("rope_theta")
    partial = rope.pop("partial_rotary_factor", None)
    if partial is not None:
        fields["partial_rotary_factor"] = partial
    fields["rope_scaling"] = rope if rope.get("rope_type", "default") != "default" else None
    fields |= changes
    return {name: value for name, value in fields.items() if value is not None or name == "rope_scaling"}
