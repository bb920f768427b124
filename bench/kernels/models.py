"""Shapes of real models for `bench kernels`, and the least cost of their layers: bytes and
floating-point operations.

A rank of EP P holds E / P experts; every rank brings T tokens, so a rank's experts get T * K rows
on average. Floors assume uniform routing unless the number of touched experts is given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

WEIGHT_BYTES: Mapping[str, float] = {
    "dense": 2.0,
    "fp8_block": 1.0,
    "fp8_row": 1.0,
    "int4": 0.5 + 2 / 32,
    "mxfp4": 0.5 + 1 / 32,
    "nvfp4": 0.5 + 1 / 16,
}
RATES: Mapping[str, str] = {
    "fp8_block": "fp8",
    "fp8_row": "fp8",
}  # which matrix rate bounds a format; the others': bf16
TOKENS = tuple(2**i for i in range(14))


@dataclass(frozen=True, kw_only=True)
class Model:
    """An expert layer: E experts, K of them a token, model width D, expert width F."""

    name: str
    num_experts: int
    top_k: int
    D: int
    F: int
    activation: str = "swiglu"
    biases: bool = False

    def local_experts(self, ep: int) -> int:
        """Return the experts of a rank.

        Raises:
            ValueError: the number of ranks does not divide the number of experts.
        """
        if self.num_experts % ep:
            raise ValueError(f"{self.num_experts} experts of {self.name} on {ep} ranks")
        return self.num_experts // ep

    def layer_bytes(self, format: str, ep: int = 1) -> float:
        """Return the bytes of the weights of a rank's experts."""
        return self.local_experts(ep) * 3 * self.D * self.F * WEIGHT_BYTES[format]


QWEN3 = Model(name="qwen3-30b", num_experts=128, top_k=8, D=2048, F=768)
MIXTRAL = Model(name="mixtral-8x7b", num_experts=8, top_k=2, D=4096, F=14336)
DEEPSEEK = Model(name="deepseek-v3", num_experts=256, top_k=8, D=7168, F=2048)
GPT_OSS = Model(name="gpt-oss-120b", num_experts=128, top_k=4, D=2880, F=2880, activation="swiglu_clamped", biases=True)
KIMI = Model(name="kimi-k2", num_experts=384, top_k=8, D=7168, F=2048)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The least bytes to move and FLOP to compute; `rate` names the matrix rate, "bf16" or "fp8"."""

    bytes: float
    flops: float
    rate: str = "bf16"


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """Rates measured on the device: bytes/s of a copy, read and written, and FLOP/s of a large matrix product."""

    bytes_per_s: float
    flops_per_s: Mapping[str, float]


def touched(num_experts: int, top_k: int, num_tokens: int) -> float:
    """Return the mean number of experts that get a row under uniform routing."""
    return num_experts * (1 - (1 - top_k / num_experts) ** num_tokens)


def experts_cost(
    model: Model, format: str, num_tokens: float, num_rows: float | None = None, num_touched: float | None = None
) -> Cost:
    """Return the cost of both products: weights of the touched experts once, tokens in and out, the
    hidden layer out and in.

    Args:
        num_tokens: tokens that the rank's experts see; with EP 1 all.
        num_rows: routed rows; `num_tokens * top_k` unless given.
        num_touched: experts of this rank that get a row; `touched` of all experts unless given.
    """
    if num_rows is None:
        num_rows = num_tokens * model.top_k
    if num_touched is None:
        num_touched = touched(model.num_experts, model.top_k, int(num_tokens))
    weights = num_touched * 3 * model.D * model.F * WEIGHT_BYTES[format]
    activations = num_tokens * 2 * model.D * 2 + num_rows * 2 * model.F * 2
    flops = num_rows * 6 * model.D * model.F
    return Cost(bytes=weights + activations, flops=flops, rate=RATES.get(format, "bf16"))


def linear_cost(num_tokens: int, inputs: int, outputs: int, out_bytes: int = 2) -> Cost:
    """Return the cost of a dense layer in bf16."""
    moved = 2 * inputs * outputs + num_tokens * (2 * inputs + out_bytes * outputs)
    return Cost(bytes=moved, flops=2 * num_tokens * inputs * outputs)


def attention_cost(
    lengths: list[int], nums: list[int], *, heads: int, kv_heads: int, dim: int, window: int = 0
) -> Cost:
    """Return the cost: visible keys and values once, queries in and results out, in bf16; products of
    visible pairs only.
    """
    pairs = keys = 0
    for length, num in zip(lengths, nums, strict=True):
        first = length - num
        if window:
            pairs += sum(min(position + 1, window) for position in range(first, length))
            keys += min(length, window + num - 1)
        else:
            pairs += num * first + num * (num + 1) // 2
            keys += length
    moved = keys * 2 * kv_heads * dim * 2 + sum(nums) * 2 * heads * dim * 2
    return Cost(bytes=moved, flops=pairs * heads * dim * 4)


def latent_cost(lengths: list[int], nums: list[int], *, heads: int, rank: int, rotated: int) -> Cost:
    """Return the cost of absorbed latent attention: a row of the cache is read once, for keys and values."""
    pairs = sum(num * (length - num) + num * (num + 1) // 2 for length, num in zip(lengths, nums, strict=True))
    moved = sum(lengths) * (rank + rotated) * 2 + sum(nums) * heads * (2 * rank + rotated) * 2
    return Cost(bytes=moved, flops=pairs * heads * 2 * (2 * rank + rotated))


def floor_us(cost: Cost, ceilings: Ceilings) -> tuple[float, str]:
    """Return the least time in microseconds, and its bound: "memory" or "compute"."""
    memory, compute = cost.bytes / ceilings.bytes_per_s, cost.flops / ceilings.flops_per_s[cost.rate]
    return 1e6 * max(memory, compute), "memory" if memory >= compute else "compute"
