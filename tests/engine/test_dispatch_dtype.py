"""The dispatch dtype: fp8 if asked for, chosen by the engine, or refused with the reason."""

import importlib.resources
import json

import pytest
import torch
from safetensors.torch import save_file

from expertwire.engine.config import validation
from expertwire.engine.config.engine_config import EngineConfig
from expertwire.engine.models.registry import read_model_config

FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}


@pytest.fixture
def model(tmp_path):
    """A folder with the config of a model of three layers of experts, and maybe weights: of layers that are quantised, and of
    layers that are not."""

    def write(*, quantised=(), plain=(), **fields):
        known = importlib.resources.files("expertwire.bench") / "configs" / "qwen3-30b-a3b" / "config.json"
        small = {"num_hidden_layers": 3, "num_experts": 4, "num_experts_per_tok": 2}
        (tmp_path / "config.json").write_text(json.dumps(json.loads(known.read_text()) | small | fields))
        name = "model.layers.{}.mlp.experts.0.gate_proj.weight"
        tensors = {name.format(i): torch.zeros(1) for i in (*quantised, *plain)}
        tensors |= {name.format(i) + "_scale_inv": torch.ones(1) for i in quantised}
        if tensors:
            save_file(tensors, tmp_path / "model.safetensors")
        return str(tmp_path)

    return write


def sends_fp8(folder, *, on_gpu=True, **options):
    options = {"ep_size": 2} | options
    return validation.sends_fp8(EngineConfig(model=folder, **options), read_model_config(folder, "auto"), on_gpu=on_gpu)


def test_by_oneself_where_every_layer_quantises_rows_just_so(model):
    folder = model(quantization_config=FP8)
    assert sends_fp8(folder)
    assert not sends_fp8(folder, on_gpu=False)
    assert not sends_fp8(folder, ep_size=1), "nothing travels"
    assert sends_fp8(folder, on_gpu=False, dispatch_dtype="fp8")
    assert not sends_fp8(model(quantization_config=FP8, hidden_size=192))
    plain = model()
    assert not sends_fp8(plain)
    assert sends_fp8(plain, quantization="fp8"), "then all layers are"


@pytest.mark.parametrize("asked_by", ["tensors", "config"])
def test_layers_that_are_not_quantised_are_named(model, asked_by):
    if asked_by == "tensors":
        folder = model(quantization_config=FP8, quantised=[1], plain=[0, 2])
    else:
        skipped = ["model.layers.0.mlp.experts", "model.layers.2.mlp"]
        folder = model(quantization_config={**FP8, "modules_to_not_convert": skipped})
    assert not sends_fp8(folder)
    message = "^dispatch_dtype 'fp8' needs, on a GPU, .* in every layer, and the checkpoint has those of layers 0, 2 as they are"
    options = {"dispatch_dtype": "fp8", "device": "cuda", "ep_size": 2}
    with pytest.raises(ValueError, match=message):
        validation.check_dispatch(EngineConfig(model=folder, **options), read_model_config(folder, "auto"))
