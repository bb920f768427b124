"""Where the tensors of a checkpoint go: the vocabulary that models and the loader share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ParamSpec:
    """A parameter that a rank holds. `fan_in` scales the random weights of `--load-format dummy` (None: filled with ones).

    `experts`, where the first dimension is experts: their logical ids, so that random weights are the same on whatever rank.
    """

    shape: tuple[int, ...]
    fan_in: int | None
    experts: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Destination:
    """The region of a parameter that one checkpoint tensor fills: `params[param][region] = tensor`.

    `region` indexes leading dimensions with integers or slices with explicit bounds; () is the whole parameter. Regions of
    different tensors are disjoint.
    """

    param: str
    region: tuple[int | slice, ...] = ()

    def shape(self, param_shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that the checkpoint's tensor must have."""
        kept = [i.stop - i.start for i in self.region if isinstance(i, slice)]
        return (*kept, *param_shape[len(self.region) :])

    def size(self, param_shape: tuple[int, ...]) -> int:
        return math.prod(self.shape(param_shape))


# Checkpoint tensor name -> everywhere it goes on this rank; () is "knowingly not read here" (for instance another rank's expert).
WeightMap = Mapping[str, tuple[Destination, ...]]
