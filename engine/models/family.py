"""What sets the families of models apart: how their config says what the layers are, and what their checkpoints call the tensors.

A family's file in `engine.models` makes one `Family`; everything else is shared. Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from expertwire.engine.config.fields import Fields
from expertwire.engine.models.model_config import Layer, Skipped


@dataclass(frozen=True, kw_only=True)
class Names:
    """What a checkpoint calls its tensors: modules, without ".weight".

    Attributes:
        prefixes: of the decoder; the first one that the checkpoint has.
        heads: of the language model's head, likewise.
        qkv: one module each for query, key and value, or one for all of them.
        output: of attention.
        mlp, moe: prefixes of a dense MLP and of a mixture of experts, within a layer.
        gate, up, down: within an MLP, a shared expert and each expert; `gate_up`: of a dense MLP that holds both in one.
        router, choice_bias: within `moe`; the latter is a whole tensor's name.
        experts: prefix of one expert, a format string of its id, within `moe`.
        fused: the tensors of all experts in one, gate and up, then down, within `moe`.
        fused_layout: of the fused tensors of unquantised experts: "rows" [E, 2F, D] and [E, D, F], gate over up; "columns"
            [E, D, 2F] and [E, F, D]. `pairs`: in fused tensors of any format gate and up alternate.
        shared: prefix of the shared expert, within `moe`.
    """

    prefixes: tuple[str, ...] = ("model.",)
    heads: tuple[str, ...] = ("lm_head",)
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    output: str = "self_attn.o_proj"
    mlp: str = "mlp."
    moe: str = "mlp."
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    gate_up: str | None = None
    router: str = "gate"
    choice_bias: str = "gate.e_score_correction_bias"
    experts: str = "experts.{}."
    fused: tuple[str, str] = ("experts.gate_up_proj", "experts.down_proj")
    fused_layout: Literal["rows", "columns"] = "rows"
    pairs: bool = False
    shared: str = "shared_experts."


DEFAULT_NAMES = Names()


def no_extras(fields: Fields) -> tuple[Skipped, ...]:
    """Of a family whose checkpoints hold the decoder alone."""
    return ()


@dataclass(frozen=True, kw_only=True)
class Family:
    """`layers`: from config.json, or its `text_config` where it has one. `skipped`: tensors that its checkpoints hold besides."""

    layers: Callable[[Fields], tuple[Layer, ...]]
    names: Names = DEFAULT_NAMES
    skipped: Callable[[Fields], tuple[Skipped, ...]] = no_extras
