"""Mixtral: every layer a mixture of experts, no query and key norms; w1 is the gate, w3 up, w2 down."""

from __future__ import annotations

from expertwire.engine.decoder import Decoder
from expertwire.engine.weight_map import WeightMap


class Mixtral(Decoder):
    """`MixtralForCausalLM`."""

    def moe_map(self, i: int) -> WeightMap:
        moe = f"model.layers.{i}.block_sparse_moe."
        return self.expert_map(i, moe + "gate.weight", moe + "experts.{}.", "w1.weight", "w3.weight", "w2.weight")
