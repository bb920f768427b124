"""Heads of decoders: a language model's, which gives logits, and those of reward models and classifiers, which give scores.

    "lm"      lm_head(x), or the embedding's transpose where the two are tied; [O, V]
    "score"   score(x), one linear layer, as transformers' `*ForSequenceClassification` has it; [O, labels]
    "reward"  score.2(relu(score.0(x))), with biases, as Qwen2.5-Math-RM and -PRM have it on the hub; [O, labels]

O rows, D model width, V vocabulary, or labels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from expertwire.engine.loader.parameters import LoadedParameters, ParameterLayout
from expertwire.engine.models.model_config import ModelConfig
from expertwire.kernels.registry import Ops

Head = Callable[[Tensor], Tensor]


def declare(layout: ParameterLayout, config: ModelConfig) -> None:
    """Declare the parameters of a decoder's head."""
    width, names = config.hidden_size, config.tensor_names
    lm_head = layout.first_stored(names.heads, ".weight")
    match config.head:
        case "lm":
            if config.tie_word_embeddings:
                layout.ignore(lm_head + ".weight")  # some checkpoints have it nevertheless
            else:
                layout.matrix("lm_head", (lm_head, config.vocab_size), columns=width)
        case "score":
            layout.matrix("lm_head", ("score", config.num_labels), columns=width, quantized=False)
        case "reward":
            layout.matrix("lm_head_in", ("score.0", width), columns=width, quantized=False)
            layout.vector("lm_head_in_bias", ("score.0.bias", width), fan_in=width)
            layout.matrix("lm_head", ("score.2", config.num_labels), columns=width, quantized=False)
            layout.vector("lm_head_bias", ("score.2.bias", config.num_labels), fan_in=width)


def bind(p: LoadedParameters, config: ModelConfig, embed_VD: Tensor, ops: Ops, dtype: torch.dtype) -> Head:
    """Return the function from hidden states [O, D] to fp32 [O, V]."""
    if config.head == "reward":
        inner = ops.linear(p.weight("lm_head_in"), p.tensor("lm_head_in_bias"), dtype=dtype)
        outer = ops.linear(p.weight("lm_head"), p.tensor("lm_head_bias"), dtype=dtype)
        return lambda x_OD: outer(torch.relu(inner(x_OD))).float()
    if config.head == "lm" and config.tie_word_embeddings:
        # The embedding is read row by row, the head may be repacked: a tied head needs a copy.
        head = ops.linear(embed_VD if ops.on_device else embed_VD.clone(), dtype=dtype)
    else:
        head = ops.linear(p.weight("lm_head"), dtype=dtype)
    scale = config.logits_scale
    return lambda x_OD: head(x_OD).float() if scale == 1 else head(x_OD).float() * scale
