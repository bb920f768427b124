"""A checkpoint's `config.json`, read for any family.

The hub's style is understood (`rope_theta`, `rope_scaling`, `torch_dtype`) and that of transformers 5 (`rope_parameters`,
`dtype`, `num_local_experts`). Every field that changes a result must be there, except those that the hub's own files leave out or
set to null, for which each reader says what that means (`engine.models.config_readers` has those of several
families). No torch is needed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from expertwire.engine.config.fields import Fields, read_json
from expertwire.engine.loader import quantization
from expertwire.engine.loader.checkpoint import checkpoint_folder
from expertwire.engine.models import registry
from expertwire.engine.models.model_config import ModelConfig
from expertwire.scheduler.checks import is_int

DTYPES = ("float32", "bfloat16")
MAX_LAYERS = 4096


def read_model_config(
    path: str | Path,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    kv_cache_dtype: Literal["auto", "fp8"] = "auto",
) -> ModelConfig:
    """The hyperparameters of the checkpoint in folder `path`.

    Args:
        path: folder with `config.json` and, optionally, `generation_config.json`, whose end-of-sequence ids win.
        dtype: of the result; "auto" takes the checkpoint's, which must not be float16.
        kv_cache_dtype: of the result.

    Raises:
        ValueError: no such folder or file, damaged JSON, a field that is missing, wrong or not supported: names file and field.
    """
    outer = Fields(checkpoint_folder(path) / "config.json")
    architecture, family = registry.family_of(outer)
    fields = outer.inner("text_config") if outer.get("text_config") is not None else outer
    fields.one_of(fields.first("hidden_act", "hidden_activation"), "silu")
    vocab_size = fields.integer("vocab_size")
    fields.integer("num_hidden_layers", high=MAX_LAYERS)  # before a family makes as many
    return ModelConfig(
        architecture=architecture,
        model_type=str(fields.get("model_type") or outer.get("model_type") or ""),
        dtype=_dtype(outer, fields, dtype),
        kv_cache_dtype=kv_cache_dtype,
        vocab_size=vocab_size,
        hidden_size=fields.integer("hidden_size"),
        layers=family.layers(fields),
        rms_norm_eps=fields.number("rms_norm_eps"),
        max_position_embeddings=fields.integer("max_position_embeddings"),
        tie_word_embeddings=_tied(outer, fields),
        eos_token_ids=_eos_token_ids(outer, fields, vocab_size),
        quantization=quantization.read(outer) or quantization.read(fields),
        skipped=family.skipped(fields),
    )


def _dtype(outer: Fields, fields: Fields, wanted: str) -> Any:
    found = next((f.get(name) for f in (fields, outer) for name in ("dtype", "torch_dtype") if f.get(name)), None)
    dtype = wanted if wanted != "auto" else found
    if dtype not in DTYPES:
        raise ValueError(
            f"{outer.file}: dtype {dtype!r} is not supported; pass dtype={' or dtype='.join(map(repr, DTYPES))}"
        )
    return dtype


def _tied(outer: Fields, fields: Fields) -> bool:
    """What a wrapper's text_config says counts: the wrapper's own word may be a default that its text model does not share. Where
    neither says anything (Mistral Small 3.1) they are not tied."""
    if fields is outer:
        return fields.flag("tie_word_embeddings")
    return fields.flag("tie_word_embeddings", default=outer.flag("tie_word_embeddings", default=False))


def _eos_token_ids(outer: Fields, fields: Fields, vocab_size: int) -> tuple[int, ...]:
    file, ids = outer.file, outer.get("eos_token_id")
    if ids is None:
        ids = fields.get("eos_token_id")
    generation_file = file.with_name("generation_config.json")
    if generation_file.exists():
        generation_ids = read_json(generation_file).get("eos_token_id")
        if generation_ids is not None:
            file, ids = generation_file, generation_ids
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    if not all(is_int(i) and 0 <= i < vocab_size for i in ids):
        raise ValueError(f"{file}: eos_token_id must be a token id below {vocab_size} or a list of them, got {ids!r}")
    return tuple(ids)
