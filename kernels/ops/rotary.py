"""Rotary position embedding: pair i of a head's first `size` numbers is rotated by `position * frequency_i`.

    (x, y) -> (x cos a - y sin a, y cos a + x sin a),   a = position * theta^(-2i / size)      (RoFormer, Su et al.,
    2021)

Pairs are (x_i, x_{i + size/2}), as in the Llama family, or (x_2i, x_{2i+1}), *interleaved*. A model whose context
was extended after training scales the frequencies (`variants`), and some multiply cosines and sines by an
*attention factor*, so that scores grow by its square. LongRoPE has two sets of frequencies, of which each sequence uses one: the
tables have the rows of both, one behind the other (`tables`).

T tokens, H heads, d head size, r rotated numbers of a head, Y positions of the tables.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from expertwire.kernels.ops.variants import LinearScaling, Llama3, LongRope, Rope, Yarn

Scaling = LinearScaling | Llama3 | Yarn | LongRope


@dataclass(frozen=True)
class RopeInputs:
    """A step's tokens as the ops that rotate and write a cache take them (`rope_and_cache` of each kind of attention).

    Attributes:
        tables: `tables` of the rotated numbers, the first r of a head.
        positions_T: i64, rows of the tables.
        slot_mapping_T: i64, block * block_size + offset. On a GPU a token with a negative one is not stored.
        interleaved: pairs are (x_2i, x_2i+1), not (x_i, x_i+r/2).
    """

    tables: tuple[Tensor, Tensor]
    positions_T: Tensor
    slot_mapping_T: Tensor
    interleaved: bool = False

    @property
    def size(self) -> int:
        return self.tables[0].shape[1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Cosines, sines, positions and slots."""
        return *self.tables, self.positions_T, self.slot_mapping_T

    def arrays(self) -> tuple[np.ndarray, ...]:
        """Return `tensors` as kernels on the host take them."""
        return tuple(tensor.numpy() for tensor in self.tensors)


def tables(num_positions: int, rope: Rope, device: str) -> tuple[Tensor, Tensor]:
    """Return cosines and signed sines, fp32 [Y, size], multiplied by the attention factor.

    Columns i and i + size/2 belong to pair i, interleaved or not; the first half of the sines is negative, as
    `rotate` expects. Row y belongs to position y. With `LongRope` that is so for sequences of at most
    `original_max_position` tokens; row `original_max_position + y` belongs to position y of a longer one, and there
    are none of these if `num_positions`, that of the longest sequence, is not more.
    """
    assert rope.size % 2 == 0, f"{rope.size} rotated numbers are no pairs"
    angles, factor = _angles(num_positions, rope)
    cos, sin = angles.cos() * factor, angles.sin() * factor
    return torch.cat((cos, cos), dim=-1).to(device), torch.cat((-sin, sin), dim=-1).to(device)


def softmax_scale(size: int, scaling: Scaling | None) -> float:
    """Return latent attention's scale of scores for heads of `size` numbers: size^-0.5, with YaRN times mscale^2.

    DeepSeek-V2 applies that part of the attention factor to scores, so that it also covers the numbers without
    position.
    """
    if isinstance(scaling, Yarn) and scaling.mscale_all_dim:
        return size**-0.5 * _mscale(scaling.factor, scaling.mscale_all_dim) ** 2
    return size**-0.5


def reference(x_THd: Tensor, positions_T: Tensor, theta: float) -> Tensor:
    """Rotate whole heads in halves in fp64, by the formula; round once to x's dtype."""
    half = x_THd.shape[-1] // 2
    inverse = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = positions_T.double()[:, None, None] * inverse
    first, second = x_THd.double().split(half, dim=-1)
    turned = (first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin())
    return torch.cat(turned, dim=-1).to(x_THd.dtype)


def rotate(x_THd: Tensor, cos_T1d: Tensor, sin_T1d: Tensor) -> Tensor:
    """Rotate pairs in halves; tables are gathered at the tokens' positions and have a head dimension of one."""
    return torch.addcmul(x_THd * cos_T1d, x_THd.roll(x_THd.shape[-1] // 2, -1), sin_T1d)


def rotate_at(x_THr: Tensor, rope: RopeInputs) -> Tensor:
    """Rotate at the tokens' positions, in halves or interleaved; r = 0 is allowed."""
    if rope.interleaved:
        x_THr = x_THr.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
    x_THr = rotate(x_THr, *(table[rope.positions_T].unsqueeze(1) for table in rope.tables))
    return x_THr.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2) if rope.interleaved else x_THr


def _angles(num_positions: int, rope: Rope) -> tuple[Tensor, float]:
    """Return the angles of the tables' rows, fp32 [Y, size / 2], and the attention factor."""
    position_Y, scaling = torch.arange(num_positions).float(), rope.scaling
    if not isinstance(scaling, LongRope):
        frequencies, factor = _scaled(rope, scaling)
        return position_Y[:, None] * frequencies, factor
    periods, original = _periods(rope), scaling.original_max_position
    parts = [(scaling.short_factor, position_Y[:original])]
    if num_positions > original:
        parts.append((scaling.long_factor, position_Y))
    assert all(len(factors) == len(periods) for factors, _ in parts), f"factors not for {len(periods)} pairs: {scaling}"
    angles = [some_Y[:, None] * (1.0 / (torch.tensor(factors) * periods)) for factors, some_Y in parts]
    return torch.cat(angles), _long_rope_factor(scaling)


def _periods(rope: Rope) -> Tensor:
    return rope.theta ** (torch.arange(0, rope.size, 2).float() / max(rope.size, 1))


def _scaled(rope: Rope, scaling: LinearScaling | Llama3 | Yarn | None) -> tuple[Tensor, float]:
    """Return frequencies fp32 [size / 2] and the attention factor.

    In fp32 as in the models' own code: at position 10^5 a frequency's rounding turns a pair by 0.01 rad.
    """
    periods = _periods(rope)
    frequencies = 1.0 / periods
    match scaling:
        case None:
            return frequencies, 1.0
        case LinearScaling():
            return frequencies / scaling.factor, 1.0
        case Llama3():
            return _llama3(frequencies, scaling), 1.0
        case Yarn():
            return _yarn(periods, rope, scaling), _yarn_factor(scaling)


def _llama3(frequencies: Tensor, scaling: Llama3) -> Tensor:
    turns = scaling.original_max_position / (2 * math.pi / frequencies)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0, 1)
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies


def _yarn(periods: Tensor, rope: Rope, scaling: Yarn) -> Tensor:
    def pair_of(turns: float) -> float:
        """Return the (fractional) pair that makes so many turns over the original context."""
        wavelength = scaling.original_max_position / (turns * 2 * math.pi)
        return rope.size * math.log(wavelength) / (2 * math.log(rope.theta))

    low, high = pair_of(scaling.beta_fast), pair_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.size - 1)
    if low == high:
        high += 0.001
    divided = ((torch.arange(rope.size // 2).float() - low) / (high - low)).clamp(0, 1)
    return divided / (scaling.factor * periods) + (1 - divided) / periods


def _mscale(factor: float, m: float) -> float:
    return 0.1 * m * math.log(factor) + 1.0 if factor > 1 else 1.0


def _yarn_factor(scaling: Yarn) -> float:
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return _mscale(scaling.factor, scaling.mscale) / _mscale(scaling.factor, scaling.mscale_all_dim)
    return _mscale(scaling.factor, 1.0)


def _long_rope_factor(scaling: LongRope) -> float:
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    ratio = scaling.max_position / scaling.original_max_position
    return math.sqrt(1 + math.log(ratio) / math.log(scaling.original_max_position)) if ratio > 1 else 1.0
