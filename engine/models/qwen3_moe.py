"""Qwen3-MoE: norms on query and key heads; layers are mixtures of experts unless the config says otherwise."""

from __future__ import annotations

from expertwire.engine.decoder import Decoder
from expertwire.engine.weight_map import WeightMap


class Qwen3Moe(Decoder):
    """`Qwen3MoeForCausalLM`."""

    def moe_map(self, i: int) -> WeightMap:
        mlp = f"model.layers.{i}.mlp."
        gate, up, down = "gate_proj.weight", "up_proj.weight", "down_proj.weight"
        return self.expert_map(i, mlp + "gate.weight", mlp + "experts.{}.", gate, up, down)
