"""A Hugging Face checkpoint folder: its hyperparameters and where each tensor lies; nothing here reads a weight or needs torch.

`config.json` is understood in the hub's style (`rope_theta`, `rope_scaling`, `torch_dtype`) and in that of transformers 5
(`rope_parameters`, `dtype`, `num_local_experts`). Every field that changes a result must be there, except those that the hub's
own files leave out or set to null, which mean: Mixtral's `head_dim` hidden_size / num_attention_heads; `sliding_window`,
`use_sliding_window`, `rope_scaling`, `mlp_only_layers` and the end-of-sequence ids none.

Safetensors files: an 8-byte little-endian length, a JSON header of that length, the data
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from expertwire.engine.config import DTYPES, ModelConfig

# Bytes of one element; a type that is not listed is only an error when its tensor is read.
ITEM_SIZES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_REQUIRED: Any = object()


def read_model_config(path: str | Path, dtype: Literal["auto", "float32", "bfloat16"] = "auto") -> ModelConfig:
    """The hyperparameters of the checkpoint in folder `path`.

    Args:
        path: folder with `config.json` and, optionally, `generation_config.json`, whose end-of-sequence ids win.
        dtype: of the result; "auto" takes the checkpoint's, which must not be float16.

    Raises:
        ValueError: no such folder or file, damaged JSON, a field that is missing, wrong or not supported: names file and field.
    """
    fields = _Fields(checkpoint_folder(path) / "config.json")
    architecture = _architecture(fields)
    if fields.get("quantization_config") is not None or (Path(path) / "hf_quant_config.json").exists():
        raise ValueError(f"{fields.file}: a quantised checkpoint (quantization_config) is not supported yet")
    if fields.get("hidden_act") != "silu":
        raise ValueError(f"{fields.file}: hidden_act must be 'silu', got {fields.get('hidden_act')!r}")
    family = _FAMILIES[architecture](fields)
    num_heads, num_kv_heads = fields.integer("num_attention_heads"), fields.integer("num_key_value_heads")
    if num_heads % num_kv_heads:
        raise ValueError(
            f"{fields.file}: num_attention_heads ({num_heads}) must be a multiple of num_key_value_heads ({num_kv_heads})"
        )
    vocab_size = fields.integer("vocab_size")
    return ModelConfig(
        architecture=architecture,
        dtype=_dtype(fields, dtype),
        vocab_size=vocab_size,
        hidden_size=fields.integer("hidden_size"),
        num_layers=fields.integer("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        rms_norm_eps=fields.number("rms_norm_eps"),
        rope_theta=_rope_theta(fields),
        max_position_embeddings=fields.integer("max_position_embeddings"),
        tie_word_embeddings=fields.flag("tie_word_embeddings"),
        eos_token_ids=_eos_token_ids(fields, vocab_size),
        **family,
    )


class _Fields:
    """A JSON object file whose fields are checked as they are taken."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._values = _read_json(file)

    def get(self, name: str) -> Any:
        """The value, or None if the field is missing."""
        return self._values.get(name)

    def integer(self, name: str, *, low: int = 1, default: Any = _REQUIRED) -> int:
        value = self._take(name, default)
        if value is not default and (not _is_int(value) or value < low):
            raise ValueError(f"{self.file}: {name} must be an integer >= {low}, got {value!r}")
        return value

    def number(self, name: str, value: object = None) -> float:
        """`value`, or the field `name` where it is None."""
        value = self._take(name, _REQUIRED) if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ValueError(f"{self.file}: {name} must be a number > 0, got {value!r}")
        return float(value)

    def flag(self, name: str, *, default: Any = _REQUIRED) -> bool:
        value = self._take(name, default)
        if not isinstance(value, bool):
            raise ValueError(f"{self.file}: {name} must be true or false, got {value!r}")
        return value

    def _take(self, name: str, default: Any) -> Any:
        value = self._values.get(name)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise ValueError(f"{self.file}: the field {name!r} is missing")
        return default


def _mixtral(fields: _Fields) -> dict[str, Any]:
    expert_size = fields.integer("intermediate_size")
    _check_window(fields, fields.get("sliding_window"))
    return {
        "head_dim": _head_dim(fields, default=None),
        "attention_bias": False,
        "qk_norm": False,
        "intermediate_size": expert_size,
        "sparse_layers": (True,) * fields.integer("num_hidden_layers"),
        "expert_size": expert_size,
        "renormalize": True,
        **_experts(fields, "num_local_experts"),
    }


def _qwen3(fields: _Fields) -> dict[str, Any]:
    num_layers = fields.integer("num_hidden_layers")
    if fields.flag("use_sliding_window", default=False):
        layer_types = fields.get("layer_types")
        # The layers from max_window_layers on slide.
        slides = (
            "sliding_attention" in layer_types
            if isinstance(layer_types, list)
            else fields.integer("max_window_layers", low=0) < num_layers
        )
        _check_window(fields, fields.get("sliding_window") if slides else None)
    return {
        "head_dim": _head_dim(fields),
        "attention_bias": fields.flag("attention_bias"),
        "qk_norm": True,
        "intermediate_size": fields.integer("intermediate_size"),
        "sparse_layers": (False,) * num_layers,
    }


def _qwen3_moe(fields: _Fields) -> dict[str, Any]:
    num_layers = fields.integer("num_hidden_layers")
    if fields.flag("use_sliding_window", default=False):
        _check_window(fields, fields.get("sliding_window"))
    step = fields.integer("decoder_sparse_step")
    dense = fields.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(_is_int(i) and 0 <= i < num_layers for i in dense):
        raise ValueError(f"{fields.file}: mlp_only_layers must be a list of layers below {num_layers}, got {dense!r}")
    return {
        "head_dim": _head_dim(fields),
        "attention_bias": fields.flag("attention_bias"),
        "qk_norm": True,
        "intermediate_size": fields.integer("intermediate_size"),
        "sparse_layers": tuple(i not in dense and (i + 1) % step == 0 for i in range(num_layers)),
        "expert_size": fields.integer("moe_intermediate_size"),
        "renormalize": fields.flag("norm_topk_prob"),
        **_experts(fields, "num_experts" if fields.get("num_experts") is not None else "num_local_experts"),
    }


_FAMILIES: Mapping[str, Callable[[_Fields], dict[str, Any]]] = {
    "MixtralForCausalLM": _mixtral,
    "Qwen3MoeForCausalLM": _qwen3_moe,
    "Qwen3ForCausalLM": _qwen3,
}
ARCHITECTURES = tuple(_FAMILIES)


def _architecture(fields: _Fields) -> str:
    match fields.get("architectures"):
        case [str(architecture), *_] if architecture in _FAMILIES:
            return architecture
        case found:
            raise ValueError(
                f"{fields.file}: architectures must begin with one of {', '.join(ARCHITECTURES)}, got {found!r}"
            )


def _dtype(fields: _Fields, wanted: str) -> Any:
    dtype = wanted if wanted != "auto" else fields.get("dtype") or fields.get("torch_dtype")
    if dtype not in DTYPES:
        raise ValueError(
            f"{fields.file}: dtype {dtype!r} is not supported; pass dtype={' or dtype='.join(map(repr, DTYPES))}"
        )
    return dtype


def _head_dim(fields: _Fields, default: Any = _REQUIRED) -> int:
    head_dim = fields.integer("head_dim", default=default)
    if head_dim is None:
        hidden_size, num_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
        if hidden_size % num_heads:
            raise ValueError(
                f"{fields.file}: hidden_size ({hidden_size}) must be a multiple of num_attention_heads ({num_heads}) "
                f"where head_dim is not given"
            )
        head_dim = hidden_size // num_heads
    if head_dim % 2:
        raise ValueError(f"{fields.file}: head_dim must be even (rotary embedding), got {head_dim}")
    return head_dim


def _experts(fields: _Fields, name: str) -> dict[str, int]:
    num_experts, top_k = fields.integer(name), fields.integer("num_experts_per_tok")
    if top_k > num_experts:
        raise ValueError(f"{fields.file}: num_experts_per_tok ({top_k}) must be at most {name} ({num_experts})")
    return {"num_experts": num_experts, "top_k": top_k}


def _rope_theta(fields: _Fields) -> float:
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"{fields.file}: rope_parameters and rope_scaling must be objects or null, got {rope!r}")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind != "default":
        raise ValueError(f"{fields.file}: rope scaling {kind!r} is not supported yet, only 'default'")
    partial = rope.get("partial_rotary_factor", fields.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise ValueError(f"{fields.file}: partial_rotary_factor {partial!r} is not supported yet, only 1")
    return fields.number("rope_theta", rope.get("rope_theta"))


def _check_window(fields: _Fields, window: object) -> None:
    """Refuses a window that hides tokens; one as long as the longest context is none."""
    if window is None:
        return
    longest = fields.integer("max_position_embeddings")
    if fields.integer("sliding_window") < longest:
        raise ValueError(
            f"{fields.file}: sliding_window ({window}) below max_position_embeddings ({longest}) is not supported yet"
        )


def _eos_token_ids(fields: _Fields, vocab_size: int) -> tuple[int, ...]:
    file, ids = fields.file, fields.get("eos_token_id")
    generation_file = file.with_name("generation_config.json")
    if generation_file.exists():
        generation_ids = _read_json(generation_file).get("eos_token_id")
        if generation_ids is not None:
            file, ids = generation_file, generation_ids
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    if not all(_is_int(i) and 0 <= i < vocab_size for i in ids):
        raise ValueError(f"{file}: eos_token_id must be a token id below {vocab_size} or a list of them, got {ids!r}")
    return tuple(ids)


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """Where the bytes of a tensor are. `dtype` is safetensors' name ("BF16"), `offset` counts from the file's first byte."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class Checkpoint:
    """The tensors of a folder's safetensors files; opening it reads and verifies every header, but no weight.

    `model.safetensors` is used if it is there, else the shards of `model.safetensors.index.json` (transformers' order).

    Args:
        path: folder of the checkpoint.

    Raises:
        ValueError: no weights or only pickled ones; a shard that is missing, truncated or damaged; an index that names a tensor
            its file does not hold, or leaves one out. The message names the file and what is wrong.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = checkpoint_folder(path)
        single, index = self.path / "model.safetensors", self.path / "model.safetensors.index.json"
        if single.is_file():
            self.tensors: Mapping[str, StoredTensor] = _read_header(single)
        elif index.is_file():
            self.tensors = _read_indexed(index)
        else:
            raise ValueError(_no_weights(self.path))

    def names(self) -> Iterable[str]:
        return self.tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def dtype(self, name: str) -> str:
        """safetensors' name of the stored type, such as "BF16"."""
        return self.tensors[name].dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(stored.nbytes for stored in self.tensors.values())


def _no_weights(folder: Path) -> str:
    if any(folder.glob("*.safetensors")):
        return f"{folder} has safetensors files, but neither model.safetensors nor model.safetensors.index.json"
    for pattern in ("*.bin", "*.pt", "*.pth"):
        if any(folder.glob(pattern)):
            return f"{folder} has only pickled weights ({pattern}), which are not loaded; save them as safetensors"
    return f"{folder} has no weights (model.safetensors or model.safetensors.index.json with its shards)"


def _read_indexed(index: Path) -> dict[str, StoredTensor]:
    files = _read_json(index).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(f, str) and f == Path(f).name for f in files.values()):
        raise ValueError(f"{index}: weight_map must map tensor names to file names in the same folder")
    shards = {}
    for shard in sorted(set(files.values())):
        if not (index.parent / shard).is_file():
            raise ValueError(f"{index.parent} lacks {shard}, which {index.name} lists")
        shards[shard] = _read_header(index.parent / shard)
    absent = [f"{name} ({file})" for name, file in files.items() if name not in shards[file]]
    if absent:
        raise ValueError(f"{index} lists tensors that their files do not hold: {some(absent)}")
    unlisted = [f"{name} ({file})" for file, tensors in shards.items() for name in tensors if name not in files]
    if unlisted:
        raise ValueError(f"{index} does not list tensors that the files hold: {some(unlisted)}")
    return {name: shards[file][name] for name, file in files.items()}


def _read_header(file: Path) -> dict[str, StoredTensor]:
    size = file.stat().st_size
    with file.open("rb") as opened:
        prefix = opened.read(8)
        length = int.from_bytes(prefix, "little")
        if prefix == b"version ":
            raise ValueError(f"{file} is a git-lfs pointer, not the weights; run `git lfs pull`")
        if len(prefix) < 8 or length > MAX_HEADER_BYTES:
            raise ValueError(f"{file} is not a safetensors file ({size} bytes)")
        header_bytes = opened.read(length)
    if len(header_bytes) < length:
        raise ValueError(f"{file} is truncated: {size} bytes, its header alone should end at {8 + length}")
    header = _parse_json(header_bytes, f"{file}: the header")
    header.pop("__metadata__", None)
    tensors = {name: _stored(file, 8 + length, name, entry) for name, entry in header.items()}
    expected = max((t.offset + t.nbytes for t in tensors.values()), default=8 + length)
    if size != expected:
        kind = "is truncated" if size < expected else "is too long"
        raise ValueError(f"{file} {kind}: {size} bytes, expected {expected} from its header")
    return tensors


def _stored(file: Path, data_start: int, name: str, entry: object) -> StoredTensor:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)]} if (
            0 <= begin <= end
            and all(_is_int(n) and n >= 0 for n in shape)
            and (dtype not in ITEM_SIZES or end - begin == math.prod(shape) * ITEM_SIZES[dtype])
        ):
            return StoredTensor(
                file=file, dtype=dtype, shape=tuple(shape), offset=data_start + begin, nbytes=end - begin
            )
        case _:
            raise ValueError(f"{file}: the header's entry of {name} is damaged: {entry!r}")


def some(names: Iterable[str], limit: int = 10) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def checkpoint_folder(path: str | Path) -> Path:
    """The folder `path`. Raises ValueError if there is none."""
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(
            f"model: there is no folder {str(path)!r}; give the folder of a downloaded Hugging Face checkpoint"
        )
    return folder


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ValueError(f"{file.parent} has no {file.name}; a Hugging Face checkpoint has one")
    return _parse_json(file.read_bytes(), str(file))


def _parse_json(text: bytes, source: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{source} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{source} must be a JSON object, got {type(values).__name__}")
    return values


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
