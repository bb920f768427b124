"""Tiny random checkpoints in the hub's format, and the results of transformers for them.

Weights are scaled so that every sub-layer matters: the standard deviation of the logits is 2 to 4, and setting any one tensor
to zero changes some logit by more than 0.1 (`sensitivity`, `test_tiny_checkpoints.py`). The default initialization would
hide wrong experts.
"""

from __future__ import annotations

import expertwire  # noqa: F401  # isort: skip  (first: transformers must not take our `kernels` for another package's)

import atexit
import functools
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3MoeConfig,
)

Kind = Literal["mixtral", "qwen3_moe", "qwen3"]
KINDS: tuple[Kind, ...] = ("mixtral", "qwen3_moe", "qwen3")

# Widths differ where the family allows it, so that swapped dimensions do not pass unseen.
_COMMON = {
    "vocab_size": 320,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}
_QWEN3 = {"head_dim": 24, "rms_norm_eps": 1e-6, "attention_bias": False, "use_sliding_window": False}
_KINDS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "mixtral": (
        MixtralConfig,
        {"num_hidden_layers": 3, "intermediate_size": 96, "num_local_experts": 8, "num_experts_per_tok": 2},
    ),
    "qwen3_moe": (
        Qwen3MoeConfig,
        {
            "num_hidden_layers": 4,
            "intermediate_size": 112,
            "moe_intermediate_size": 64,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [1],
            **_QWEN3,
            # Multiples of 32, which the CPU kernels cover; the other families' heads are not.
            "hidden_size": 96,
            "head_dim": 32,
        },
    ),
    "qwen3": (Qwen3Config, {"num_hidden_layers": 3, "intermediate_size": 112, "max_window_layers": 3, **_QWEN3}),
}
_EOS = {"mixtral": "</s>", "qwen3_moe": "<|im_end|>", "qwen3": "<|im_end|>"}
_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_INSTRUCT = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant roles') }}{% endif %}{% endfor %}"
)


def make(
    kind: Kind,
    folder: Path | str,
    *,
    seed: int = 0,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    config_style: Literal["hub", "v5"] = "hub",
    shards: int = 1,
    **overrides: Any,
) -> Path:
    """Write a whole checkpoint (weights, config, tokenizer, chat template, generation config) and return its folder.

    Args:
        kind: family; see `_KINDS` for the shapes.
        folder: created if it does not exist.
        seed: of the weights.
        dtype: of the stored weights.
        config_style: of config.json: "hub" (rope_theta, torch_dtype) or "v5" (rope_parameters, dtype).
        shards: number of weight files; more than one with an index.
        overrides: fields of transformers' config class, such as num_hidden_layers=2 or norm_topk_prob=False.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _write_tokenizer(kind, folder)
    config_class, fields = _KINDS[kind]
    eos = tokenizer.token_to_id(_EOS[kind])
    ids = {"bos_token_id": tokenizer.token_to_id("<s>"), "eos_token_id": eos}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    config = config_class(**{**_COMMON, **fields, **ids, **rope, **overrides})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _scale_weights(model, seed)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    if shards > 1:
        _reshard(folder, shards)
    if config_style == "hub":
        _write_hub_config(folder / "config.json")
    end_ids = [eos] if kind == "mixtral" else [eos, tokenizer.token_to_id("<|endoftext|>")]
    _write_json(
        folder / "generation_config.json", {**ids, "eos_token_id": end_ids, "do_sample": True, "temperature": 0.6}
    )
    return folder


@functools.cache
def cached(kind: Kind, **options: Any) -> Path:
    """Return a folder written by `make`, once for equal options, and removed at exit. Do not change it."""
    return make(kind, tempfile.mkdtemp(prefix=f"{kind}-", dir=_scratch().name), **options)


def prompt(length: int, *, seed: int = 0, vocab_size: int = 300) -> list[int]:
    """Return random token ids that the tokenizers know."""
    return np.random.default_rng(seed).integers(0, vocab_size, length).tolist()


def safe_prompt(folder: Path | str, length: int, *, seed: int = 0, margin: float = 3e-4) -> list[int]:
    """Return a `prompt` for which no router is closer than `margin` to choosing other experts.

    Below about 1e-4, rounding makes different float32 implementations choose different experts, rightly.
    """
    for draw in range(100):
        ids = prompt(length, seed=1000 * seed + draw)
        if router_margin(folder, ids) > margin:
            return ids
    raise AssertionError(f"no prompt of {length} tokens has a margin of {margin} in {folder}")


def router_margin(folder: Path | str, token_ids: Sequence[int]) -> float:
    """Return the smallest difference between router logits of the last chosen expert and the first other one."""
    model = _reference(str(folder))
    if model.config.model_type == "qwen3":
        return float("inf")
    with torch.no_grad():
        layers = model(torch.tensor([list(token_ids)]), output_router_logits=True).router_logits
    top_k = model.config.num_experts_per_tok
    best = torch.stack(layers).topk(top_k + 1).values
    return float((best[..., -2] - best[..., -1]).min())


def reference_logits(folder: Path | str, token_ids: Sequence[int]) -> np.ndarray:
    """Return transformers' logits at every position, [T, V] float32, with eager attention."""
    with torch.no_grad():
        return _reference(str(folder))(torch.tensor([list(token_ids)])).logits[0].numpy()


def reference_greedy(folder: Path | str, token_ids: Sequence[int], n: int) -> tuple[list[int], list[float]]:
    """Return transformers' n greedy tokens (end of sequence ignored) and the difference of the two best logits at each."""
    model, ids, gaps = _reference(str(folder)), [], []
    step, cache = torch.tensor([list(token_ids)]), None
    with torch.no_grad():
        for _ in range(n):
            output = model(step, past_key_values=cache, use_cache=True)
            best = output.logits[0, -1].topk(2)
            ids.append(int(best.indices[0]))
            gaps.append(float(best.values[0] - best.values[1]))
            step, cache = best.indices[:1].view(1, 1), output.past_key_values
    return ids, gaps


def sensitivity(folder: Path | str) -> dict[str, float]:
    """Return, for every tensor by its name on the hub, the largest change of a logit when it is set to zero."""
    ids = prompt(64, seed=1)
    before, changes = reference_logits(folder, ids), {}
    for name, values in _hub_tensors(_reference(str(folder))).items():
        kept = values.clone()
        values.zero_()
        changes[name] = float(np.abs(reference_logits(folder, ids) - before).max())
        values.copy_(kept)
    return changes


transformers.utils.logging.disable_progress_bar()


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    scratch = tempfile.TemporaryDirectory(prefix="expertwire-tiny-")
    atexit.register(scratch.cleanup)
    return scratch


@functools.cache
def _reference(folder: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()


def _hub_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return views of the parameters by the hub's names (transformers 5 fuses the experts of a layer)."""
    tensors = {}
    w1, w3, w2 = ("w1", "w3", "w2") if model.config.model_type == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    for name, values in model.state_dict().items():
        if model.config.model_type == "mixtral":
            name = name.replace(".mlp.", ".block_sparse_moe.")
        prefix, _, part = name.rpartition(".experts.")
        for expert, expert_values in enumerate(values if prefix else ()):
            if part == "down_proj":
                tensors[f"{prefix}.experts.{expert}.{w2}.weight"] = expert_values
            else:
                gate, up = expert_values.chunk(2)
                tensors |= {
                    f"{prefix}.experts.{expert}.{w1}.weight": gate,
                    f"{prefix}.experts.{expert}.{w3}.weight": up,
                }
        if not prefix and not (name == "lm_head.weight" and model.config.tie_word_embeddings):
            tensors[name] = values
    return tensors


@torch.no_grad()
def _scale_weights(model: PreTrainedModel, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, values in model.named_parameters():
        noise = torch.randn(values.shape, generator=generator)
        fan_in = values.shape[-1]
        if "norm" in name:
            noise = 1 + 0.3 * noise
        elif name.endswith("bias"):
            noise = 0.5 * noise
        elif "embed_tokens" in name:
            noise = noise * (3 / fan_in**0.5 if model.config.tie_word_embeddings else 1)
        elif "lm_head" in name:
            noise = noise * 2.8 / fan_in**0.5
        else:
            noise = noise * 1.6 / fan_in**0.5
        values.copy_(noise)


def _reshard(folder: Path, shards: int) -> None:
    """Split model.safetensors into shards of about equally many tensors, in the order of their names, with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for shard, names in enumerate(np.array_split(sorted(tensors), shards), 1):
        file = f"model-{shard:05}-of-{shards:05}.safetensors"
        save_file({str(name): tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
        weight_map |= {str(name): file for name in names}
    total = sum(values.nbytes for values in tensors.values())
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_hub_config(file: Path) -> None:
    """Rewrite transformers 5's config.json like the hub's files: older names, and no field that they lack."""
    fields = json.loads(file.read_text())
    rope = fields.pop("rope_parameters")
    fields["rope_theta"], fields["torch_dtype"] = rope["rope_theta"], fields.pop("dtype")
    if rope["rope_type"] != "default":
        fields["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
    fields["transformers_version"] = "4.51.0"
    if fields["model_type"] == "mixtral":
        if fields["head_dim"] is None:
            del fields["head_dim"]
    else:
        fields.setdefault("rope_scaling", None)
        fields.pop("layer_types", None)
        if "num_local_experts" in fields:
            fields["num_experts"] = fields.pop("num_local_experts")
    _write_json(file, dict(sorted(fields.items())))


def _write_tokenizer(kind: Kind, folder: Path) -> Tokenizer:
    """Write and return a byte-level tokenizer of about 300 tokens; only Mixtral's starts texts with <s>."""
    specials = ["<unk>", "<s>", "</s>"] if kind == "mixtral" else []
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300 - 3,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        ["the token then there and another one when they are routed to an expert in turn"] * 4, trainer
    )
    names: dict[str, str | None] = {"bos_token": None, "eos_token": _EOS[kind], "pad_token": "<|endoftext|>"}
    if kind == "mixtral":
        names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    else:
        tokenizer.add_special_tokens(
            [AddedToken(t, normalized=False) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    template = _INSTRUCT if kind == "mixtral" else _CHATML
    fields = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 1024,
        "chat_template": template,
        **names,
    }
    _write_json(folder / "tokenizer_config.json", fields)
    return tokenizer


def _write_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n")
