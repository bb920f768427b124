"""Checkpoints that attacks need besides the demo model, made of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import expertwire

NAN_TOKEN = 42  # of the "nan" model
_LONG: Mapping[str, object] = {
    "max_position_embeddings": 131_072,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
}
# A long prompt is computed in small chunks, so that it does not keep others waiting.
LONG_ARGS = (
    "--load-format", "dummy", "--kv-cache-memory-bytes", str(256 << 20), "--chunked-prefill-size", "128",
    "--max-num-batched-tokens", "512",
)  # fmt: skip


def demo_model() -> Path:
    """Return the folder of the demo model."""
    return Path(expertwire.__file__).with_name("demo_model")


def folder_of(model: str, parent: Path) -> Path:
    """Return the folder of a model, made in `parent` if needed.

    "demo" is the demo model; "long" one of a single small layer, random weights and 131,072 positions; "nan" is the demo model
    with an embedding that is not a number for one token, `NAN_TOKEN`.
    """
    if model == "demo":
        return demo_model()
    folder = parent / model
    if not folder.exists():
        shutil.copytree(demo_model(), folder)
        if model == "long":
            (folder / "model.safetensors").unlink()
            _change_config(folder, _LONG)
        else:
            _spoil_embedding(folder)
    return folder


def _change_config(folder: Path, fields: Mapping[str, object]) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def _spoil_embedding(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = "model.embed_tokens.weight"
    tensors["lm_head.weight"] = tensors[name].clone()
    tensors[name][NAN_TOKEN] = float("nan")
    save_file(tensors, file)
    _change_config(folder, {"tie_word_embeddings": False})
