"""The headers of a checkpoint's weights; files that are missing, damaged or inconsistent are refused by name."""

import json

import pytest
import torch
from helpers import tiny_checkpoints as tiny
from safetensors.torch import load_file

from expertwire.engine.loader.checkpoint import MAX_HEADER_BYTES, Checkpoint
from expertwire.engine.models.hf_config import MAX_JSON_BYTES


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(("dtype", "stored"), [("float32", "F32"), ("bfloat16", "BF16"), ("float16", "F16")])
def test_the_headers_tell_what_the_files_hold(shards, dtype, stored):
    folder = tiny.cached("qwen3_moe", shards=shards, dtype=dtype)
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    assert len(list(folder.glob("*.safetensors"))) == shards
    checkpoint = Checkpoint(folder)
    assert set(checkpoint.tensors) == set(tensors)
    assert checkpoint.nbytes == sum(values.nbytes for values in tensors.values())
    for name, values in tensors.items():
        entry = checkpoint.tensors[name]
        assert (entry.shape, entry.dtype) == (tuple(values.shape), stored)
        with entry.file.open("rb") as file:
            file.seek(entry.offset)
            raw = file.read(entry.nbytes)
        assert raw == values.contiguous().view(-1).view(dtype=torch.uint8).numpy().tobytes()


@pytest.fixture
def sharded(tmp_path):
    return tiny.make("qwen3", tmp_path / "checkpoint", shards=2)


SECOND = "model-00002-of-00002.safetensors"


@pytest.mark.parametrize("removed", [1, 1000, "data", "header", "all"])
def test_a_truncated_shard_is_named_with_both_sizes(sharded, removed):
    file = sharded / SECOND
    size = file.stat().st_size
    header_end = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    left = {"data": header_end, "header": header_end - 1, "all": 3}.get(removed) or size - removed
    with file.open("r+b") as opened:
        opened.truncate(left)
    expected = {"header": rf"is truncated: {left} bytes.*{header_end}", "all": r"is not a safetensors file \(3 bytes\)"}
    with pytest.raises(
        ValueError, match=expected.get(removed, f"is truncated: {left} bytes, expected {size}")
    ) as error:
        Checkpoint(sharded)
    assert str(file) in str(error.value)


def test_bytes_after_the_data_are_refused(sharded):
    with (sharded / SECOND).open("ab") as file:
        file.write(b"\0")
    with pytest.raises(ValueError, match="is too long"):
        Checkpoint(sharded)


def test_a_missing_shard_is_named(sharded):
    (sharded / SECOND).unlink()
    with pytest.raises(ValueError, match=f"lacks {SECOND}, which model.safetensors.index.json lists"):
        Checkpoint(sharded)


def edit_index(folder, change):
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index)
    file.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda i: i["weight_map"].update(ghost=SECOND),
            rf"lists tensors that their files do not hold: ghost \({SECOND}\)",
        ),
        (
            lambda i: i["weight_map"].pop("model.norm.weight"),
            "does not list tensors that the files hold: model.norm.weight",
        ),
        (lambda i: i["weight_map"].update({"lm_head.weight": SECOND}), "do not hold: lm_head.weight"),
        (
            lambda i: i["weight_map"].update({"lm_head.weight": "../x.safetensors"}),
            "weight_map must map tensor names to file",
        ),
        (lambda i: i["weight_map"].update({"lm_head.weight": 3}), "weight_map must map tensor names to file"),
        (lambda i: i.pop("weight_map"), "weight_map must map tensor names to file"),
    ],
)
def test_a_wrong_index_is_refused(sharded, change, message):
    edit_index(sharded, change)
    with pytest.raises(ValueError, match=message):
        Checkpoint(sharded)


def save_header(file, header, data=b""):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(raw).to_bytes(8, "little") + raw + data)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 7]},
        {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]},
        {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2]},
        {"dtype": "F32", "shape": [2] + [1] * 64, "data_offsets": [0, 8]},
        {"dtype": "unknown", "shape": [2**63], "data_offsets": [0, 8]},
        {"dtype": None, "shape": [2], "data_offsets": [0, 8]},
        "x",
    ],
)
def test_a_damaged_entry_is_named(tmp_path, entry):
    save_header(tmp_path / "model.safetensors", {"w": entry}, bytes(8))
    with pytest.raises(ValueError, match=r"model.safetensors: the header's entry of w is damaged"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs pointer"),
        (
            b"\xff" * 100,
            rf"or its header is too large: {2**64 - 1} bytes in a file of 100; at most {MAX_HEADER_BYTES} are",
        ),
        (b"\xff" * 7, r"is not a safetensors file \(7 bytes\)"),
        ((5).to_bytes(8, "little") + b"{{{{{", "header is not valid JSON"),
        ((2).to_bytes(8, "little") + b"[]", "header must be a JSON object"),
    ],
)
def test_what_is_no_safetensors_file(tmp_path, content, message):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        Checkpoint(tmp_path)


def test_a_large_header_is_refused_unread(tmp_path):
    file = tmp_path / "model.safetensors"
    with file.open("wb") as opened:
        opened.write((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
        opened.truncate(1 << 30)
    with pytest.raises(
        ValueError, match=f"its header is too large: {MAX_HEADER_BYTES + 1} bytes in a file of"
    ) as error:
        Checkpoint(tmp_path)
    assert str(file) in str(error.value)


def test_a_large_index_is_refused_unread(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    with index.open("wb") as opened:
        opened.truncate(1 << 40)
    with pytest.raises(ValueError, match=f"at most {MAX_JSON_BYTES} bytes, got {1 << 40}") as error:
        Checkpoint(tmp_path)
    assert str(index) in str(error.value)


def test_folders_without_usable_weights(tmp_path):
    with pytest.raises(ValueError, match="has no weights"):
        Checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match=r"has only pickled weights \(\*\.bin\), which are not loaded"):
        Checkpoint(tmp_path)
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    with pytest.raises(ValueError, match="has safetensors files, but neither"):
        Checkpoint(tmp_path)
