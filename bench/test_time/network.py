"""The demo models' forward for many rows at once on one core, to sample what an engine's bench has no hours for.

One token a row and a step, a cache of keys and values with a slot a row, fp32 products of the checkpoint's bf16 weights.

Shape letters: S sequences of a step, A requests admitted, each with a slot, Y positions of a sequence, L layers, D model width,
F expert width, E experts, N = S*k routed rows, H query heads, G key/value heads, d a whole head, V vocabulary; k is top-k, q H/G.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor


class Network:
    """A Qwen3-MoE checkpoint with tied embeddings, as `tools/train_demo_model.py` writes it, with its cache.

    Args:
        folder: of the checkpoint.
        max_positions: length of the longest sequence.
    """

    def __init__(self, folder: Path, max_positions: int) -> None:
        self.config = json.loads((folder / "config.json").read_text())
        self._weights = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
        self._positions = max_positions
        half = self.config["head_dim"] // 2
        inverse_d = self.config["rope_theta"] ** -(torch.arange(half) / half).repeat(2)
        angles_Yd = torch.arange(max_positions)[:, None] * inverse_d
        self._cos_Yd = angles_Yd.cos()
        self._sin_Yd = angles_Yd.sin() * torch.tensor((-1.0, 1.0)).repeat_interleave(half)
        self._experts = [self._stacked_experts(layer) for layer in range(self.config["num_hidden_layers"])]
        self._kv_L2AGYd = torch.zeros(0)

    @property
    def active_parameters(self) -> int:
        """Parameters that a token uses: all but the experts that it is not routed to."""
        c = self.config
        unused = (c["num_experts"] - c["num_experts_per_tok"]) * c["num_hidden_layers"]
        all_of_them = sum(tensor.numel() for tensor in self._weights.values())
        return all_of_them - unused * 3 * c["hidden_size"] * c["moe_intermediate_size"]

    def reserve(self, slots: int) -> None:
        """Make room for `slots` sequences; those that are there stay."""
        c, old = self.config, self._kv_L2AGYd
        if old.dim() == 6 and old.shape[2] >= slots:
            return
        shape = (c["num_hidden_layers"], 2, slots, c["num_key_value_heads"], self._positions, c["head_dim"])
        self._kv_L2AGYd = torch.zeros(shape)
        if old.dim() == 6:
            self._kv_L2AGYd[:, :, : old.shape[2]] = old

    def copy(self, sources: list[int], targets: list[int], num_positions: int) -> None:
        """Copy the first positions of some slots to others; all are read before any is written."""
        used_L2AGYd = self._kv_L2AGYd[..., :num_positions, :]
        used_L2AGYd[:, :, targets] = used_L2AGYd[:, :, sources]

    @torch.inference_mode()
    def step(self, ids_S: Tensor, positions_S: Tensor, slots_S: Tensor) -> Tensor:
        """Return the log-probabilities after one more token of each row [S, V], rows in the order of their slots."""
        w, eps = self._weights, self.config["rms_norm_eps"]
        x_SD = w["model.embed_tokens.weight"][ids_S]
        for layer in range(self.config["num_hidden_layers"]):
            stem = f"model.layers.{layer}."
            y_SD = F.rms_norm(x_SD, x_SD.shape[-1:], w[stem + "input_layernorm.weight"], eps)
            x_SD = x_SD + self._attention(layer, y_SD, positions_S, slots_S)
            y_SD = F.rms_norm(x_SD, x_SD.shape[-1:], w[stem + "post_attention_layernorm.weight"], eps)
            x_SD = x_SD + self._moe(layer, y_SD)
        y_SD = F.rms_norm(x_SD, x_SD.shape[-1:], w["model.norm.weight"], eps)
        return F.linear(y_SD, w["model.embed_tokens.weight"]).log_softmax(-1)

    def _attention(self, layer: int, x_SD: Tensor, positions_S: Tensor, slots_S: Tensor) -> Tensor:
        c, stem = self.config, f"model.layers.{layer}.self_attn."
        num_kv_heads, size = c["num_key_value_heads"], c["head_dim"]

        def heads(name: str) -> Tensor:
            return F.linear(x_SD, self._weights[f"{stem}{name}_proj.weight"]).view(len(x_SD), -1, size)

        def rotated(x_SHd: Tensor, name: str) -> Tensor:
            x_SHd = F.rms_norm(x_SHd, (size,), self._weights[f"{stem}{name}_norm.weight"], c["rms_norm_eps"])
            cos_Sd, sin_Sd = self._cos_Yd[positions_S, None], self._sin_Yd[positions_S, None]
            return x_SHd * cos_Sd + x_SHd.roll(size // 2, dims=-1) * sin_Sd

        k_AGYd, v_AGYd = self._kv_L2AGYd[layer]
        k_AGYd[slots_S, :, positions_S] = rotated(heads("k"), "k")
        v_AGYd[slots_S, :, positions_S] = heads("v")
        length = int(positions_S.max()) + 1
        q_SGqd = rotated(heads("q"), "q").view(len(x_SD), num_kv_heads, -1, size)
        first, last = int(slots_S[0]), int(slots_S[-1])
        # Neighbours are read where they are: to gather them costs as much as the rest of the attention.
        where = slice(first, last + 1) if last - first + 1 == len(slots_S) else slots_S
        scores_SGqY = q_SGqd @ k_AGYd[where, :, :length].transpose(-1, -2) * size**-0.5
        later_SY = torch.arange(length) > positions_S[:, None]
        weights_SGqY = scores_SGqY.masked_fill_(later_SY[:, None, None], -torch.inf).softmax(-1)
        y_SD = (weights_SGqY @ v_AGYd[where, :, :length]).flatten(1)
        return F.linear(y_SD, self._weights[stem + "o_proj.weight"])

    def _moe(self, layer: int, x_SD: Tensor) -> Tensor:
        top_k = self.config["num_experts_per_tok"]
        gate_ED = self._weights[f"model.layers.{layer}.mlp.gate.weight"]
        weights_Sk, ids_Sk = F.linear(x_SD, gate_ED).softmax(-1).topk(top_k)
        weights_Sk = weights_Sk / weights_Sk.sum(-1, keepdim=True)
        order_N = ids_Sk.flatten().argsort(stable=True)
        counts_E = ids_Sk.flatten().bincount(minlength=self.config["num_experts"]).tolist()
        outputs = []
        for rows_ND, (w13, w2) in zip((x_SD[order_N // top_k]).split(counts_E), self._experts[layer], strict=True):
            gate_NF, up_NF = F.linear(rows_ND, w13).chunk(2, dim=-1)
            outputs.append(F.linear(F.silu(gate_NF) * up_NF, w2))
        y_ND = torch.empty_like(torch.cat(outputs)).index_copy_(0, order_N, torch.cat(outputs))
        return (y_ND.view(len(x_SD), top_k, -1) * weights_Sk[..., None]).sum(1)

    def _stacked_experts(self, layer: int) -> list[tuple[Tensor, Tensor]]:
        """Return each expert's gate and up projections in one, and its down projection."""
        stems = [f"model.layers.{layer}.mlp.experts.{e}." for e in range(self.config["num_experts"])]
        w = self._weights
        return [
            (torch.cat((w[s + "gate_proj.weight"], w[s + "up_proj.weight"])), w[s + "down_proj.weight"]) for s in stems
        ]
