"""What models vary of the ops, as plain values: whoever reads a model's configuration needs them, and no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Score = Literal["softmax", "sigmoid", "sqrt_softplus"]


@dataclass(frozen=True, kw_only=True)
class Groups:
    """Choose among the experts of the `kept` best of `number` equal groups; `by` is what makes a group good."""

    number: int
    kept: int
    by: Literal["best", "two_best"]


@dataclass(frozen=True)
class Activation:
    """What lies between the two products of an expert.

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
        """Alpha, limit and offset of `gate_reference`."""
        assert self.gated, self
        return (1.0, math.inf, 0.0) if self.kind == "swiglu" else (self.alpha, self.limit, 1.0)


@dataclass(frozen=True, kw_only=True)
class Yarn:
    """YaRN (Peng et al., 2023): low frequencies divided by `factor`, high ones kept, a ramp between the two bounds.

    `attention_factor` multiplies cosines and sines; None: 0.1 ln(factor) + 1, or the ratio of the two `mscale`s where they are
    given (DeepSeek-V2). `truncate`: the bounds are whole numbers.
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
    """Llama 3.1: wavelengths above `original_max_position / low_freq_factor` are stretched by `factor`, those below
    `original_max_position / high_freq_factor` kept, and between the two there is a blend."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(frozen=True, kw_only=True)
class Linear:
    """Positions divided by `factor`."""

    factor: float


@dataclass(frozen=True, kw_only=True)
class LongRope:
    """LongRoPE (Ding et al., 2024; Phi-3): each frequency divided by a factor of its own, from one of two lists: `long_factor`
    where positions beyond `original_max_position` are served, else `short_factor`. `attention_factor` None:
    sqrt(1 + ln(max_position / original) / ln(original))."""

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_position: int
    max_position: int
    attention_factor: float | None = None


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary embedding of the first `size` numbers of a head, in pairs (x_i, x_i+size/2) or, `interleaved`, (x_2i, x_2i+1)."""

    theta: float
    size: int
    interleaved: bool = False
    scaling: Yarn | Llama3 | Linear | LongRope | None = None


@dataclass(frozen=True, kw_only=True)
class Routing:
    """How experts are chosen and weighed, see `kernels.ops.routing`; `scales_input`: the weight multiplies what the
    expert is given,
    not what it returns, of which there is one then (`top_k` 1)."""

    top_k: int
    renormalize: bool
    score: Score = "softmax"
    groups: Groups | None = None
    scale: float = 1.0
    scales_input: bool = False
