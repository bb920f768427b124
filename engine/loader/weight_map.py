"""Where the tensors of a checkpoint go: the vocabulary that models and the loader share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class ParamSpec:
    """A parameter that a rank holds.

    Attributes:
        dtype: None: the model's.
        fan_in: scales the random weights of `--load-format dummy`; None: filled with `value`, or, if that is None, random bits.
        experts: where the first dimension is experts, their logical ids, so that random weights are the same on whatever rank.
    """

    shape: tuple[int, ...]
    fan_in: int | None
    value: float | None = 1.0
    dtype: torch.dtype | None = None
    experts: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Destination:
    """The region of a parameter that one checkpoint tensor, or a part of it, fills: `params[param][region] = tensor[source]`.

    `region` indexes leading dimensions with integers or slices with explicit bounds; () is the whole parameter. Regions of
    different tensors are disjoint.

    Attributes:
        source: likewise, of the checkpoint's tensor; () is all of it. Steps are allowed.
        stored: the shape of that tensor; None: that of the region.
        transposed: the last two dimensions of what `source` leaves change places.
        repeated: what `source` leaves is one number for the whole region, or one for each of its rows, in whatever shape.
    """

    param: str
    region: tuple[int | slice, ...] = ()
    source: tuple[int | slice, ...] = ()
    stored: tuple[int, ...] | None = None
    transposed: bool = False
    repeated: bool = False

    def shape(self, param_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of the region."""
        kept = [i.stop - i.start for i in self.region if isinstance(i, slice)]
        return (*kept, *param_shape[len(self.region) :])

    def expected(self, param_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of the checkpoint's tensor."""
        return self.shape(param_shape) if self.stored is None else self.stored

    @property
    def lead(self) -> int | None:
        """The only index of the tensor's first dimension that is read; None: all of them."""
        first = self.source[0] if self.source else None
        return first if isinstance(first, int) else None


# Checkpoint tensor name -> everywhere it goes on this rank; () is "knowingly not read here" (for instance another rank's expert).
WeightMap = Mapping[str, tuple[Destination, ...]]
