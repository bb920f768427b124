"""`expertwire inspect`: exact parameter counts of real models from their configs alone, and the contents of files."""

import expertwire  # noqa: F401  # isort: skip  (first: transformers must not take our `kernels` for another package's)

import json
from pathlib import Path

import pytest
import torch
import transformers
from helpers import architectures
from helpers import tiny_checkpoints as tiny
from helpers.slow import slow_but
from safetensors.torch import load_file, save_file

from expertwire.deploy import cli
from expertwire.engine.loader.inspection import inspect

CONFIGS = Path(__file__).parents[2] / "bench" / "configs"
# transformers' classes; between what the makers' active parameters are, in billions; what they leave out.
PUBLISHED = {
    "mixtral-8x7b": ("Mixtral", (12.85, 12.95), ()),  # 12.9B in the announcement
    "qwen1.5-moe-a2.7b": ("Qwen2Moe", (2.65, 2.75), ()),  # 2.7B and 14.3B in all, in the model card
    "qwen3-30b-a3b": ("Qwen3Moe", (3.3, 3.4), ()),  # 3.3B in the model card, cut off
    "deepseek-v3": ("DeepseekV3", (37, 38), ()),  # 37B in arXiv 2412.19437, cut off
    "kimi-k2-thinking": ("DeepseekV3", (31.5, 32.5), ("embedding",)),  # 32B in the model card
    "gpt-oss-120b": (
        "GptOss",
        (5.125, 5.135),
        ("embedding",),
    ),  # 5.13B in the model card, which says what it leaves out
    "nemotron-3-nano": ("NemotronH", (3.2, 3.3), ("embedding",)),  # 3.2B, and 3.6B with embeddings, in the model card
    "nemotron-3-super": ("NemotronH", (12.7, 12.8), ()),  # 120.6B and 12.7B active in arXiv 2604.12374, cut off
    "granite-4.0-h-small": ("GraniteMoeHybrid", (8.8, 9.2), ()),  # 9B in the model card
    "qwen3-next-80b-a3b": ("Qwen3Next", (3.2, 3.3), ("embedding", "head")),  # 3B in the model card
    "qwen3.5-35b-a3b": ("Qwen3_5Moe", (2.9, 3.0), ("embedding",)),  # 3B in the model card
    "mistral-small-4": ("Mistral4", (6.25, 6.75), ()),  # 6.5B in the model card, to half a billion
}


def reference_total(name, family):
    fields = json.loads((CONFIGS / name / "config.json").read_text())
    fields = fields.get("text_config", fields)
    fields = {
        k: v
        for k, v in fields.items()
        if k not in ("architectures", "model_type", "quantization_config", "torch_dtype", "norm_eps")
    }
    if fields.get("position_embedding_type") == "nope":
        fields["position_embedding_type"] = None
    text = "Text" if family == "Qwen3_5Moe" else ""
    config = getattr(transformers, f"{family}{text}Config")(**fields)
    with torch.device("meta"):
        model = getattr(transformers, f"{family}ForCausalLM")(config)
    return sum(values.numel() for values in model.parameters())


@pytest.mark.parametrize("name", slow_but(("mixtral-8x7b", "gpt-oss-120b", "nemotron-3-nano"), PUBLISHED))
def test_real_models_have_the_published_parameters(name):
    family, (low, high), without = PUBLISHED[name]
    found = inspect(CONFIGS / name)
    assert found.total == reference_total(name, family)
    counted = (found.active - sum(found.parameters[kind] for kind in without)) / 1e9
    assert low <= counted < high


def run(capsys, *argv):
    code = cli.main(["inspect", *map(str, argv)])
    found = capsys.readouterr()
    return code, found.out, found.err


def test_memory_of_a_rank_and_of_a_request(capsys):
    code, out, _ = run(capsys, CONFIGS / "deepseek-v3", "--ep-size", 32, "--context", 1000)
    assert code == 0
    found = inspect(CONFIGS / "deepseek-v3", 32)
    experts = 58 * 8 * 3 * 7168 * 2048
    scales = experts // 128 // 128 * 4
    assert found.rank_bytes["cpu"]["experts"] == found.rank_bytes["cuda"]["experts"] == experts + scales
    assert found.cache_bytes(1000) == {"latent": 61 * 576 * 2 * 1000}
    assert "671,026,404,352" in out
    assert "0.07 GB" in out or "70.27 MB" in out


def test_a_window_keeps_no_more_than_its_tokens():
    found = inspect(CONFIGS / "gpt-oss-120b")
    assert found.cache_bytes(8192) == {"full": 18 * 2048 * 8192, "window 128": 18 * 2048 * 128}
    assert found.cache_bytes(100) == {"full": 18 * 2048 * 100, "window 128": 18 * 2048 * 100}


@pytest.mark.parametrize("name", list(architectures.all_of_them()))
def test_files_hold_what_is_counted(name):
    folder = architectures.folder(name)
    found = inspect(folder)
    stored = load_file(folder / "model.safetensors")
    nbytes = sum(values.nbytes for values in stored.values())
    assert sum(found.stored_bytes.values()) + sum(entry.nbytes for entry in found.ignored) == nbytes
    assert all(entry.number and entry.tensors.why for entry in found.ignored)


def test_what_is_wrong_is_named(tmp_path, capsys):
    folder = tiny.make("qwen3_moe", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.mlp.gate.weight"]
    save_file(tensors, folder / "model.safetensors")
    code, _, err = run(capsys, folder)
    assert (code, "missing: model.layers.0.mlp.gate.weight" in err) == (2, True), err
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["MambaForCausalLM"]}))
    code, _, err = run(capsys, folder)
    assert code == 2
    assert "architectures must begin with one of" in err
    assert "got ['MambaForCausalLM']" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--ep-size", 129), "--ep-size must be at most 128"),
        (("--context", 50000), "--context must be at most 40960"),
        (("--ep-size", 0), "must be an integer >= 1"),
    ],
)
def test_options_out_of_range_are_refused(options, message, capsys):
    try:
        code = cli.main(["inspect", str(CONFIGS / "qwen3-30b-a3b"), *map(str, options)])
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    assert message in capsys.readouterr().err
