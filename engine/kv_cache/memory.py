"""The memory that a rank's share of a model takes, counted from its layout without allocating any.

What a rank holds is not what a checkpoint stores: matrices are unpacked where nothing multiplies them as they are, experts may be
quantised while they are loaded, and some kernels want copies, padding or tables.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping

import torch

from expertwire.engine.loader.param_specs import ParamSpec, StackedMatrix, tensors_of
from expertwire.engine.loader.parameters import ParameterLayout
from expertwire.engine.models.mixer_configs import LatentAttentionConfig
from expertwire.engine.models.model_config import ModelConfig
from expertwire.kernels.formats import BLOCK, GPU_LINEAR_FORMATS, GROUPS, ON_THE_FLY

# A parameter's kind, by the first of these that its name within the layer begins with; anything else is attention.
_KINDS = (
    ("embed", "embedding"),
    ("lm_head", "head"),
    ("w13", "experts"),
    ("w2", "experts"),
    ("shared.", "shared experts"),
    ("router", "routers"),
    ("choice_bias", "routers"),
    ("gate_up", "dense MLPs"),
    ("up", "dense MLPs"),
    ("down", "dense MLPs"),
    ("indexer.", "indexers"),
    ("mamba.", "recurrent mixers"),
    ("delta.", "recurrent mixers"),
    ("latent_", "experts' projections"),
    ("input_norm", "norms"),
    ("post_norm", "norms"),
    ("norm", "norms"),
)
KINDS = (*dict.fromkeys(kind for _, kind in _KINDS), "attention")


def kind_of(param: str) -> str:
    """Return the kind (one of `KINDS`) of the parameter with this name."""
    name = re.sub(r"^layers\.\d+\.", "", param)
    return next((kind for prefix, kind in _KINDS if name.startswith(prefix)), "attention")


def by_kind(numbers: Mapping[str, int]) -> dict[str, int]:
    """Return the sums of numbers given by parameter, of the kinds that there are, in the order of `KINDS`."""
    found: Counter[str] = Counter()
    for param, number in numbers.items():
        found[kind_of(param)] += number
    return {kind: found[kind] for kind in KINDS if found[kind]}


def held_bytes(
    config: ModelConfig, layout: ParameterLayout, device: str, *, quantize: str | None = None, fast: bool = False
) -> dict[str, int]:
    """Return the bytes, by kind, that a rank's weights take on a device once the model is bound.

    Args:
        layout: the rank's parameters.
        device: "cpu" or "cuda", with or without a number.
        quantize: as `Decoder` has it.
        fast: whether numerics are "fast".
    """
    return by_kind({param: held for param, _, held in _each(config, layout, device, quantize, fast)})


def peak_bytes(
    config: ModelConfig, layout: ParameterLayout, device: str, *, quantize: str | None = None, fast: bool = False
) -> int:
    """Return the most bytes that loading takes: parameters are loaded all at once as they are stored, then bound one by one.

    Arguments as those of `held_bytes`.
    """
    each = [(loaded, held) for _, loaded, held in _each(config, layout, device, quantize, fast)]
    return sum(max(pair) for pair in each) + max((max(pair) for pair in each), default=0)


def _each(
    config: ModelConfig, layout: ParameterLayout, device: str, quantize: str | None, fast: bool
) -> Iterator[tuple[str, int, int]]:
    """Yield each parameter's name, its bytes when it has been loaded, and its bytes when it has been bound."""
    on_gpu, dtype = device.startswith("cuda"), getattr(torch, config.dtype)
    parts = {f"{param}.{tensor}" for param in layout.quantized for tensor in ("data", "scales", "global_scales")}
    for param, spec in layout.specs.items():
        if param not in parts:
            loaded = spec_bytes(spec, dtype)
            yield param, loaded, _held(config, param, spec, dtype, quantize, on_gpu=on_gpu)
    for param, matrix in layout.quantized.items():
        loaded = sum(spec_bytes(spec, dtype) for spec in matrix.specs().values())
        yield param, loaded, _held_quantized(config, param, matrix, dtype, on_gpu=on_gpu)
    copies = (param for param in [*layout.specs, *layout.quantized] if fast and param.endswith(".kv_b"))
    for param in copies:  # latent attention's second way for prompts
        attention = config.layers[int(param.split(".")[1])].mixer
        if isinstance(attention, LatentAttentionConfig) and attention.indexer is None:
            kv_b = layout.quantized.get(param)
            shape = layout.specs[param].shape if kv_b is None else (kv_b.rows, kv_b.columns)
            yield param, 0, math.prod(shape) * dtype.itemsize
    if config.head == "lm" and config.tie_word_embeddings and not on_gpu:
        yield "lm_head", 0, spec_bytes(layout.specs["embed"], dtype)  # packed from a copy


def spec_bytes(spec: ParamSpec, dtype: torch.dtype) -> int:
    """Return the bytes of a parameter of a model in `dtype`."""
    return math.prod(spec.shape) * (spec.dtype or dtype).itemsize


def _held(
    config: ModelConfig, param: str, spec: ParamSpec, dtype: torch.dtype, quantize: str | None, *, on_gpu: bool
) -> int:
    """Return the bytes of a bound parameter that is stored as it is."""
    if param.endswith((".w13", ".w2")) and quantize is not None:
        columns = spec.shape[-1]
        rows = math.prod(spec.shape[:-1])
        return _expert_bytes(ON_THE_FLY[quantize], rows, columns, on_gpu=on_gpu)
    if param.endswith(".router") and spec.dtype == torch.float32 != dtype and on_gpu:
        return 3 * math.prod(spec.shape) * dtype.itemsize  # see `kernels.gpu.linear`: three terms
    return spec_bytes(spec, dtype)


def _held_quantized(config: ModelConfig, param: str, matrix: StackedMatrix, dtype: torch.dtype, *, on_gpu: bool) -> int:
    """Return the bytes of a bound matrix that is stored quantised."""
    assert matrix.method is not None, param
    format = matrix.method.format
    if matrix.lead:
        return _expert_bytes(format, math.prod(matrix.lead) * matrix.rows, matrix.columns, on_gpu=on_gpu)
    if on_gpu and format in GPU_LINEAR_FORMATS and not param.endswith(".kv_b"):
        blocks = 4 * matrix.rows if format == "fp8_block" else 0  # which block a row is in
        return sum(spec_bytes(spec, dtype) for spec in matrix.specs().values()) + blocks
    return matrix.rows * matrix.columns * dtype.itemsize


def _expert_bytes(format: str, rows: int, columns: int, *, on_gpu: bool) -> int:
    """Return the bytes of experts' matrices of so many rows together, as they are multiplied."""
    padded = columns + (-columns % BLOCK if on_gpu and format in GROUPS else 0)
    tensors = tensors_of(format, padded)
    per_row = sum(tensor.row_bytes for tensor in tensors if tensor.per == "row")
    per_block = sum(tensor.row_bytes for tensor in tensors if tensor.per == "block")
    return rows * per_row + -(-rows // BLOCK) * per_block
