"""Write the file of a model family, and read a checkpoint's config with it.

python examples/own_model.py

The family below is a plain Qwen3-MoE. To serve a model, put its family into engine/models/ and name its
architecture in engine/models/registry.py; docs/adding_a_model.md says the rest and names the test.
"""

import importlib.resources
from dataclasses import replace
from pathlib import Path

from expertwire.engine.models import config_readers
from expertwire.engine.models.hf_config import HfConfig
from expertwire.engine.models.model_config import LayerConfig, ModelFamily
from expertwire.engine.models.registry import read_model_config


def layers(hf: HfConfig) -> tuple[LayerConfig, ...]:
    """Return the layers that a `config.json` describes. A field that changes results is read, or refused by name."""
    if hf.get("clip_qkv") is not None:
        raise hf.error(f"clip_qkv must be null, got {hf.get('clip_qkv')!r}")
    attention = replace(config_readers.attention(hf), qk_norm="head")
    moe = config_readers.moe(hf, "num_experts", size="moe_intermediate_size", renormalize=hf.flag("norm_topk_prob"))
    return (LayerConfig(mixer=attention, mlp=moe),) * hf.integer("num_hidden_layers")


MY_MOE = ModelFamily(layers=layers)  # tensor names as in Llama and Qwen: the default


def main() -> None:
    folder = Path(str(importlib.resources.files("expertwire"))) / "demo_model"
    read = MY_MOE.layers(HfConfig(folder / "config.json"))
    for index, layer in enumerate(read):
        print(index, layer)
    print("the same as the registry's:", read == read_model_config(folder).layers)


if __name__ == "__main__":
    main()
