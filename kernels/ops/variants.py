"""Variants of the ops in models, as plain values without torch, for readers of model configurations."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

CHUNK = 64  # positions after which the states of mixers in chunked form move on (`kernels.ops.recurrent`)
Score = Literal["softmax", "sigmoid", "sqrt_softplus"]


@dataclass(frozen=True, kw_only=True)
class ExpertGroups:
    """Group-limited routing: choose among the experts of the `kept` best of `number` equal groups, ranked `by`."""

    number: int
    kept: int
    by: Literal["best", "two_best"]


@dataclass(frozen=True)
class Activation:
    """Activation between the two products of an expert.

    "swiglu": `silu(gate) * up`. "swiglu_clamped" (gpt-oss): gate clamped above at `limit`, up on both sides, then
    `gate * sigmoid(alpha * gate) * (up + 1)`. "relu2": `max(up, 0) ** 2`, without a gate.
    """

    kind: str = "swiglu"
    alpha: float = 1.702
    limit: float = 7.0

    def __post_init__(self) -> None:
        kinds = ("swiglu", "swiglu_clamped", "relu2")
        if self.kind not in kinds:
            raise ValueError(f"Activation.kind is {self.kind!r}, must be one of {kinds}")

    @property
    def gated(self) -> bool:
        return self.kind != "relu2"

    @property
    def gating(self) -> tuple[float, float, float]:
        """Return alpha, limit and offset of `experts.gate_reference`."""
        assert self.gated, self
        return (1.0, math.inf, 0.0) if self.kind == "swiglu" else (self.alpha, self.limit, 1.0)


SWIGLU = Activation()


@dataclass(frozen=True, kw_only=True)
class Yarn:
    """YaRN (Peng et al., 2023): low frequencies are divided by `factor`, high ones kept, with a ramp between two
    bounds.

    `attention_factor` multiplies cosines and sines; None: 0.1 ln(factor) + 1, or the ratio of both `mscale`s if given
    (DeepSeek-V2). `truncate`: the bounds are rounded to whole numbers.
    """

    factor: float
    original_max_position: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    truncate: bool = True


@dataclass(frozen=True, kw_only=True)
class Llama3:
    """Llama 3.1: wavelengths above `original_max_position / low_freq_factor` are stretched by `factor`.

    Those below `original_max_position / high_freq_factor` are kept, those between are interpolated.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Positions are divided by `factor`."""

    factor: float


@dataclass(frozen=True, kw_only=True)
class LongRope:
    """LongRoPE (Ding et al., 2024; Phi-3): each frequency is divided by its own factor.

    A sequence of at most `original_max_position` tokens has `short_factor`, a longer one `long_factor` throughout.
    `attention_factor` None: sqrt(1 + ln(max_position / original) / ln(original)).
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_position: int
    max_position: int
    attention_factor: float | None = None


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary embedding of a head's first `size` numbers; pairs as in `kernels.ops.rotary`."""

    theta: float
    size: int
    interleaved: bool = False
    scaling: Yarn | Llama3 | LinearScaling | LongRope | None = None


@dataclass(frozen=True, kw_only=True)
class Routing:
    """Choice and weights of experts, see `kernels.ops.routing`.

    `scales_input`: the weight multiplies the expert's input instead of its output; `top_k` is 1 then (Llama 4).
    """

    top_k: int
    renormalize: bool
    score: Score = "softmax"
    groups: ExpertGroups | None = None
    scale: float = 1.0
    scales_input: bool = False
