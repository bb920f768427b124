"""Defaults of sampling parameters, from a checkpoint's `generation_config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from expertwire.engine.models.hf_config import read_json
from expertwire.scheduler.sampling_params import SamplingParams

NAME = "generation_config.json"
# Field of the file -> sampling parameter: those that vLLM reads. `do_sample` has no effect: temperature 0 is greedy.
_FIELDS: Mapping[str, str] = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


def default_sampling_params(folder: str | Path, generation_config: Literal["auto", "model", "none"]) -> dict[str, Any]:
    """Return the sampling parameters that the model sets for requests that leave them unset.

    Args:
        folder: the checkpoint's folder.
        generation_config: as `EngineConfig` has it.

    Raises:
        ValueError: the file is missing with "model", or it is malformed; the message names the field.
    """
    file = Path(folder) / NAME
    if generation_config == "none":
        return {}
    if not file.is_file():
        if generation_config == "model":
            raise ValueError(f"generation_config 'model': {folder} has no {NAME}; use 'auto' or 'none'")
        return {}
    values = read_json(file)
    found = {param: values[field] for field, param in _FIELDS.items() if values.get(field) is not None}
    try:
        SamplingParams(**found)
    except ValueError as error:
        raise ValueError(f"{file}: {error}; with generation_config 'none' its defaults are not read") from error
    return found
