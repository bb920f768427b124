"""The registry of model families, and reading a checkpoint's config through it.

A new model is a file beside this one and a line in `FAMILIES`. The configs of the hub are read (`rope_theta`, `rope_scaling`,
`torch_dtype`) and those of transformers 5 (`rope_parameters`, `dtype`, `num_local_experts`). Every field that changes a result
must be present, except those that the hub's own files leave out or set to null, for which the family states the default. No
torch is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from expertwire.engine.loader import quantization
from expertwire.engine.loader.checkpoint import checkpoint_folder
from expertwire.engine.models.config_readers import mtp_layers
from expertwire.engine.models.deepseek import DEEPSEEK_V2, DEEPSEEK_V3, DEEPSEEK_V32
from expertwire.engine.models.glm import GLM4_MOE, GLM4_MOE_LITE, GLM_MOE_DSA
from expertwire.engine.models.gpt_oss import GPT_OSS
from expertwire.engine.models.granite import GRANITE_MOE_HYBRID
from expertwire.engine.models.hf_config import HfConfig, read_json
from expertwire.engine.models.kimi_k25 import KIMI_K25
from expertwire.engine.models.llama import LLAMA
from expertwire.engine.models.llama4 import LLAMA4
from expertwire.engine.models.minimax_m2 import MINIMAX_M2
from expertwire.engine.models.mistral import MINISTRAL3, MISTRAL, MISTRAL3, MISTRAL4
from expertwire.engine.models.mixtral import MIXTRAL
from expertwire.engine.models.model_config import ModelConfig, ModelFamily
from expertwire.engine.models.nemotron_h import NEMOTRON_H
from expertwire.engine.models.olmoe import OLMOE
from expertwire.engine.models.phi3 import PHI3
from expertwire.engine.models.phi4flash import PHI4_FLASH
from expertwire.engine.models.qwen2 import QWEN2
from expertwire.engine.models.qwen2_moe import QWEN2_MOE
from expertwire.engine.models.qwen3 import QWEN3, QWEN3_MOE
from expertwire.engine.models.qwen3_next import QWEN3_5, QWEN3_5_MOE, QWEN3_NEXT
from expertwire.scheduler.config import is_int
from expertwire.scheduler.sampling_params import MAX_LOGPROBS

DTYPES = ("float32", "bfloat16")
MAX_LAYERS = 4096

FAMILIES: Mapping[str, ModelFamily] = MappingProxyType(
    {
        "MixtralForCausalLM": MIXTRAL,
        "Qwen3MoeForCausalLM": QWEN3_MOE,
        "Qwen2MoeForCausalLM": QWEN2_MOE,
        "Qwen2ForCausalLM": QWEN2,
        "Qwen3ForCausalLM": QWEN3,
        "GptOssForCausalLM": GPT_OSS,
        "Llama4ForConditionalGeneration": LLAMA4,
        "Llama4ForCausalLM": LLAMA4,
        "MiniMaxM2ForCausalLM": MINIMAX_M2,
        "OlmoeForCausalLM": OLMOE,
        "Glm4MoeForCausalLM": GLM4_MOE,
        "DeepseekV2ForCausalLM": DEEPSEEK_V2,
        "DeepseekV3ForCausalLM": DEEPSEEK_V3,
        "DeepseekV32ForCausalLM": DEEPSEEK_V32,
        "KimiK25ForConditionalGeneration": KIMI_K25,
        "Glm4MoeLiteForCausalLM": GLM4_MOE_LITE,
        "GlmMoeDsaForCausalLM": GLM_MOE_DSA,
        "Mistral3ForConditionalGeneration": MISTRAL3,
        "Mistral4ForCausalLM": MISTRAL4,
        "LlamaForCausalLM": LLAMA,
        "MistralForCausalLM": MISTRAL,
        "Ministral3ForCausalLM": MINISTRAL3,
        "Phi3ForCausalLM": PHI3,
        "Phi4FlashForCausalLM": PHI4_FLASH,
        "NemotronHForCausalLM": NEMOTRON_H,
        "GraniteMoeHybridForCausalLM": GRANITE_MOE_HYBRID,
        "Qwen3NextForCausalLM": QWEN3_NEXT,
        "Qwen3_5ForConditionalGeneration": QWEN3_5,
        "Qwen3_5ForCausalLM": QWEN3_5,
        "Qwen3_5MoeForConditionalGeneration": QWEN3_5_MOE,
        "Qwen3_5MoeForCausalLM": QWEN3_5_MOE,
    }
)

# Beside these, every "...ForCausalLM" may be a "...ForSequenceClassification".
_REWARD_MODELS = {"Qwen2ForRewardModel": 1, "Qwen2ForProcessRewardModel": 2}  # their numbers of labels


def read_model_config(
    path: str | Path,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    kv_cache_dtype: Literal["auto", "fp8"] = "auto",
    snapshot_every: int = 512,
) -> ModelConfig:
    """Return the configuration of the checkpoint in folder `path`.

    Args:
        path: folder with `config.json` and, optionally, `generation_config.json`, whose end-of-sequence ids win.
        dtype: of the model; "auto": the checkpoint's, which must not be float16.
        kv_cache_dtype, snapshot_every: as `ModelConfig` has them.

    Raises:
        ValueError: the folder or a file is missing or damaged, the architecture is not supported, or a field is missing, wrong or
            not supported. The message names file and field.
    """
    hf = HfConfig(checkpoint_folder(path) / "config.json")
    architecture = _architecture(hf)
    family, head, num_labels = _family(hf, architecture)
    text = hf.section("text_config") if hf.get("text_config") is not None else hf
    text.one_of(text.first_present("hidden_act", "hidden_activation", "mlp_hidden_act"), family.activation)
    vocab_size = text.integer("vocab_size")
    text.integer("num_hidden_layers", high=MAX_LAYERS, default=0)  # before a family creates that many
    mtp = mtp_layers(text, family.mtp_field) if family.mtp_field is not None else ()
    layers, fields = family.layers(text), dict(family.fields(text))
    if "rms_norm_eps" not in fields:
        fields["rms_norm_eps"] = text.number("rms_norm_eps")
    if "tie_word_embeddings" not in fields:
        fields["tie_word_embeddings"] = _tie_word_embeddings(hf, text)
    return ModelConfig(
        architecture=architecture,
        model_type=str(text.get("model_type") or hf.get("model_type") or ""),
        dtype=_dtype(hf, text, dtype),
        kv_cache_dtype=kv_cache_dtype,
        vocab_size=vocab_size,
        hidden_size=text.integer("hidden_size"),
        layers=layers,
        max_position_embeddings=text.integer("max_position_embeddings"),
        eos_token_ids=_eos_token_ids(hf, text, vocab_size),
        quantization=quantization.read(hf) or quantization.read(text),
        tensor_names=family.names,
        head=head,
        num_labels=num_labels,
        ignored_tensors=(*family.ignored_tensors, *mtp),
        snapshot_every=snapshot_every,
        **fields,
    )


def _architecture(hf: HfConfig) -> str:
    match hf.get("architectures"):
        case [str(architecture), *_] if architecture in _REWARD_MODELS or _generator(architecture) in FAMILIES:
            return architecture
        case found:
            raise hf.error(f"architectures must begin with one of {', '.join(FAMILIES)}, got {found!r}")


def _generator(architecture: str) -> str:
    """Return the name of the language model of which a classifier has the decoder; any other name is returned as it is."""
    return architecture.replace("ForSequenceClassification", "ForCausalLM")


def _family(hf: HfConfig, architecture: str) -> tuple[ModelFamily, Literal["lm", "score", "reward"], int]:
    """Return the family, the kind of head and the number of labels."""
    if architecture in _REWARD_MODELS:
        return QWEN2, "reward", _REWARD_MODELS[architecture]
    if architecture in FAMILIES:
        return FAMILIES[architecture], "lm", 0
    labels = hf.get("id2label")  # transformers writes it unless there are two, its default
    if not isinstance(labels, dict | None) or labels == {}:
        raise hf.error(f"id2label must be an object with a name for each label, got {labels!r}")
    if labels is not None and len(labels) > MAX_LOGPROBS:
        raise hf.error(f"id2label must have at most {MAX_LOGPROBS} labels, got {len(labels)}")
    return FAMILIES[_generator(architecture)], "score", 2 if labels is None else len(labels)


def _dtype(hf: HfConfig, text: HfConfig, wanted: str) -> Any:
    found = next((c.get(name) for c in (text, hf) for name in ("dtype", "torch_dtype") if c.get(name)), None)
    dtype = wanted if wanted != "auto" else found
    if dtype not in DTYPES:
        raise hf.error(f"dtype {dtype!r} is not supported; pass dtype={' or dtype='.join(map(repr, DTYPES))}")
    return dtype


def _tie_word_embeddings(hf: HfConfig, text: HfConfig) -> bool:
    """Return the field of `text_config` if it is there: the wrapper's may be a default that its text model does not share. If
    neither has it (Mistral Small 3.1), they are not tied."""
    if text is hf:
        return hf.flag("tie_word_embeddings")
    return text.flag("tie_word_embeddings", default=hf.flag("tie_word_embeddings", default=False))


def _eos_token_ids(hf: HfConfig, text: HfConfig, vocab_size: int) -> tuple[int, ...]:
    file, ids = hf.file, hf.get("eos_token_id")
    if ids is None:
        ids = text.get("eos_token_id")
    generation_file = file.with_name("generation_config.json")
    if generation_file.exists():
        generation_ids = read_json(generation_file).get("eos_token_id")
        if generation_ids is not None:
            file, ids = generation_file, generation_ids
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    if not all(is_int(i) and 0 <= i < vocab_size for i in ids):
        raise ValueError(f"{file}: eos_token_id must be a token id below {vocab_size} or a list of them, got {ids!r}")
    return tuple(ids)
