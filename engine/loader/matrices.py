"""A parameter that is a matrix, or one for each expert: several of a checkpoint's stacked, as they are or quantised.

A quantised one is a parameter for each of the tensors of `kernels.formats.Quantized`. M rows, K columns, E experts, e here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from expertwire.engine.loader.quantization import Method
from expertwire.engine.loader.weight_map import Destination, ParamSpec
from expertwire.kernels.formats import BLOCK, GROUPS

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class QuantizedTensor:
    """One tensor of a quantised matrix: of each row, or of each block of rows, or of each part, `columns`.

    `fan_in` and `value` are those of `ParamSpec`.
    """

    name: str
    per: str = "row"
    columns: Shape
    dtype: torch.dtype
    fan_in: int | None = None
    value: float | None = None


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """[M, K], whose `parts` are the rows of the checkpoint's matrices, or with `lead` dimensions [e, M, K].

    Attributes:
        method: how it is stored; None: as it is.
        dtype: of one that is stored as it is; None: the model's.
    """

    param: str
    parts: tuple[int, ...]
    columns: int
    method: Method | None = None
    lead: Shape = ()
    dtype: torch.dtype | None = None

    @property
    def rows(self) -> int:
        return sum(self.parts)

    def span(self, p: int, per: str = "row") -> slice:
        """Where part p is, of something that there is of each row, block of rows or part."""
        sizes = {"row": self.parts, "block": [-(-rows // BLOCK) for rows in self.parts], "part": [1] * len(self.parts)}[
            per
        ]
        start = sum(sizes[:p])
        return slice(start, start + sizes[p])

    def count(self, per: str) -> int:
        """How many of them there are."""
        return self.span(len(self.parts) - 1, per).stop

    def specs(self, experts: tuple[int, ...] | None = None) -> Iterator[tuple[str, ParamSpec]]:
        """The parameters by name; `experts` as `ParamSpec` has them.

        Raises:
            ValueError: the format cannot have so many columns.
        """
        if self.method is None:
            shape = (*self.lead, self.rows, self.columns)
            yield self.param, ParamSpec(shape=shape, fan_in=self.columns, dtype=self.dtype, experts=experts)
            return
        group = GROUPS.get(self.method.format, 1)
        if self.columns % group:
            raise ValueError(
                f"{self.param} is stored as {self.method.format}: its {self.columns} columns must be a multiple of {group}"
            )
        for tensor in tensors_of(self.method.format, self.columns):
            yield (
                f"{self.param}.{tensor.name}",
                ParamSpec(
                    shape=(*self.lead, self.count(tensor.per), *tensor.columns),
                    fan_in=tensor.fan_in,
                    value=tensor.value,
                    dtype=tensor.dtype,
                    experts=experts,
                ),
            )

    def single(
        self, module: str, p: int, index: tuple[int, ...] = ()
    ) -> Iterator[tuple[str, Destination, list[Shape]]]:
        """Part p from the tensors of a module: name, destination, and the shapes that the tensor may have besides the region's.
        `index`: of the leading dimensions."""
        if self.method is None:
            yield module + ".weight", Destination(param=self.param, region=(*index, self.span(p))), []
            return
        for tensor in tensors_of(self.method.format, self.columns):
            name, repeated = self._stored_as(tensor, fused=False)
            span = self.span(p, tensor.per)
            shapes: list[Shape] = [(span.stop - span.start, 1), (), (1,), (1, 1)] if repeated else []
            param = f"{self.param}.{tensor.name}"
            yield module + name, Destination(param=param, region=(*index, span), repeated=repeated), shapes

    def fused(
        self, whole: str, p: int, e: int, slot: int, experts: int, *, by_columns: bool, pairs: bool
    ) -> Iterator[tuple[str, Destination, list[Shape]]]:
        """Part p of expert e, which lies in `slot`, from the tensors of all experts; otherwise as `single`.

        `by_columns` and `pairs`: how the fused tensors lie, see `family.Names`.
        """
        several = len(self.parts) > 1
        taken = (slice(p, None, 2) if pairs else self.span(p),) if several else ()
        if self.method is None:
            destination = Destination(
                param=self.param,
                region=(slot, self.span(p)),
                source=(e, slice(None), *taken) if by_columns else (e, *taken),
                stored=(experts, *((self.columns, self.rows) if by_columns else (self.rows, self.columns))),
                transposed=by_columns,
            )
            yield whole, destination, []
            return
        for tensor in tensors_of(self.method.format, self.columns):
            name, repeated = self._stored_as(tensor, fused=True)
            assert not (pairs and tensor.per == "block"), f"{whole}: blocks of rows that alternate"
            stored = (experts, self.count(tensor.per), *tensor.columns)
            source = (e, *(taken if tensor.per == "row" or not several else (self.span(p, tensor.per),)))
            shapes: list[Shape] = []
            if repeated:
                shapes = [(experts, self.rows, 1), (experts, 1, 1), (experts, 1), (experts,)]
            elif tensor.name == "data" and self.method.format == "mxfp4":
                shapes = [(*stored[:-1], stored[-1] // 16, 16)]  # the bytes of a group in a dimension of their own
            destination = Destination(
                param=f"{self.param}.{tensor.name}",
                region=(slot, self.span(p, tensor.per)),
                source=source,
                stored=stored,
                repeated=repeated,
            )
            yield whole + name, destination, shapes

    def _stored_as(self, tensor: QuantizedTensor, *, fused: bool) -> tuple[str, bool]:
        """The suffix of a tensor's name, and whether it is repeated for rows."""
        assert self.method is not None, self.param
        method = self.method
        names = {
            "data": (method.data, method.fused_data),
            "scales": (method.scales, method.fused_scales),
            "global_scales": (method.global_scales, method.fused_global_scales),
        }[tensor.name]
        return names[fused] or "", tensor.name == "global_scales" or (tensor.name == "scales" and method.wide)


def fit(destination: Destination, found: Shape | None, shapes: Sequence[Shape]) -> Destination:
    """The destination for a tensor of the shape `found`, if that is one of the `shapes` that are allowed besides its own."""
    if found is None or found not in shapes:
        return destination
    source = destination.source
    if destination.repeated and source and math.prod(found) == found[0]:
        source = source[:1]  # one number for each expert
    return replace(destination, stored=found, source=source)


def tensors_of(format: str, columns: int) -> tuple[QuantizedTensor, ...]:
    """Of a quantised matrix of so many columns. Dummy values have about the spread of dense ones."""
    spread, fp8 = columns**-0.5, torch.float8_e4m3fn
    match format:
        case "fp8_block":
            blocks = (-(-columns // BLOCK),)
            return (
                QuantizedTensor(name="data", columns=(columns,), dtype=fp8, fan_in=1),
                QuantizedTensor(name="scales", per="block", columns=blocks, dtype=torch.float32, value=spread),
            )
        case "fp8_row":
            return (
                QuantizedTensor(name="data", columns=(columns,), dtype=fp8, fan_in=1),
                QuantizedTensor(name="scales", columns=(), dtype=torch.float32, value=spread),
            )
        case "int4":
            return (
                QuantizedTensor(name="data", columns=(columns // 8,), dtype=torch.int32),
                QuantizedTensor(name="scales", columns=(columns // 32,), dtype=torch.bfloat16, value=spread / 4.6),
            )
        case "mxfp4":
            exponent = 127 + round(math.log2(spread / 2.7))
            return (
                QuantizedTensor(name="data", columns=(columns // 2,), dtype=torch.uint8),
                QuantizedTensor(name="scales", columns=(columns // 32,), dtype=torch.uint8, value=exponent),
            )
    assert format == "nvfp4", format
    return (
        QuantizedTensor(name="data", columns=(columns // 2,), dtype=torch.uint8),
        QuantizedTensor(name="scales", columns=(columns // 16,), dtype=fp8, value=1.0),
        QuantizedTensor(name="global_scales", per="part", columns=(), dtype=torch.float32, value=spread / 2.7),
    )
