"""Specifications of parameters: a tensor, or the tensors of a matrix in which matrices of the checkpoint are stacked."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from expertwire.engine.loader.quantization import QuantMethod
from expertwire.kernels.formats import BLOCK, GROUPS

Shape = tuple[int, ...]
Index = tuple[int | slice, ...]


@dataclass(frozen=True, kw_only=True)
class ParamSpec:
    """A parameter that a rank holds.

    Attributes:
        shape: its shape.
        fan_in: number of inputs, which scales the random weights of `--load-format dummy`; None: filled with `value`, or, if
            that is None, with random bits.
        value: see `fan_in`.
        dtype: None: the model's.
        experts: logical ids of the experts along the first dimension, so that random weights are the same on every rank;
            None: the first dimension is not experts.
    """

    shape: Shape
    fan_in: int | None
    value: float | None = 1.0
    dtype: torch.dtype | None = None
    experts: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class MatrixTensor:
    """One of the tensors that a stored matrix consists of; a matrix that is not quantized has one, named "".

    Attributes:
        name: name of the parameter within the matrix, as in `kernels.formats.QuantizedWeight`.
        per: what its rows stand for: a "row", a "block" of rows or a "part" of the matrix.
        columns: shape of one of its rows.
        dtype, fan_in, value: as `ParamSpec` has them.
    """

    name: str
    per: str = "row"
    columns: Shape
    dtype: torch.dtype | None
    fan_in: int | None = None
    value: float | None = None

    @property
    def row_bytes(self) -> int:
        """The bytes of one row of a quantized matrix's tensor."""
        assert self.dtype is not None, self.name
        return math.prod(self.columns) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class StackedMatrix:
    """A parameter [rows, columns] or [experts, rows, columns], in which matrices of the checkpoint are stacked by rows.

    Attributes:
        param: its name.
        parts: rows of each of the stacked matrices.
        columns: columns of all of them.
        method: how it is quantized; None: it is not.
        lead: leading dimensions.
        dtype: of a matrix that is not quantized; None: the model's.
    """

    param: str
    parts: tuple[int, ...]
    columns: int
    method: QuantMethod | None = None
    lead: Shape = ()
    dtype: torch.dtype | None = None

    @property
    def rows(self) -> int:
        return sum(self.parts)

    def span(self, p: int, per: str = "row") -> slice:
        """Return where part `p` lies in a tensor with an entry per row, block of rows or part."""
        sizes = [{"row": rows, "block": -(-rows // BLOCK), "part": 1}[per] for rows in self.parts]
        start = sum(sizes[:p])
        return slice(start, start + sizes[p])

    def count(self, per: str) -> int:
        """Return the number of rows, blocks of rows or parts."""
        return self.span(len(self.parts) - 1, per).stop

    def rows_of_part(self, p: int, per: str = "row", *, interleaved: bool) -> Index:
        """Return the index of part `p` in a checkpoint tensor that holds all parts, whose rows may alternate."""
        if len(self.parts) == 1:
            return ()
        assert not (interleaved and per == "block"), f"{self.param}: blocks of rows that alternate"
        return (slice(p, None, 2) if interleaved and per == "row" else self.span(p, per),)

    def tensors(self) -> Iterator[tuple[str, MatrixTensor]]:
        """Yield the parameter's name and description of each tensor."""
        if self.method is None:
            yield self.param, MatrixTensor(name="", columns=(self.columns,), dtype=self.dtype, fan_in=self.columns)
            return
        for tensor in tensors_of(self.method.format, self.columns):
            yield f"{self.param}.{tensor.name}", tensor

    def specs(self, experts: tuple[int, ...] | None = None) -> dict[str, ParamSpec]:
        """Return the parameters by name; `experts` as `ParamSpec` has them.

        Raises:
            ValueError: the format does not support this number of columns.
        """
        group = GROUPS.get(self.method.format, 1) if self.method is not None else 1
        if self.method is not None and self.columns % group:
            raise ValueError(
                f"{self.param} is stored as {self.method.format}: its {self.columns} columns must be a multiple of {group}"
            )
        return {
            param: ParamSpec(
                shape=(*self.lead, self.count(tensor.per), *tensor.columns),
                fan_in=tensor.fan_in,
                value=tensor.value,
                dtype=tensor.dtype,
                experts=experts,
            )
            for param, tensor in self.tensors()
        }


def tensors_of(format: str, columns: int) -> tuple[MatrixTensor, ...]:
    """Return the tensors of a quantized matrix with this number of columns; dummy values have about the spread of dense ones."""
    spread, fp8 = columns**-0.5, torch.float8_e4m3fn
    match format:
        case "fp8_block":
            blocks = (-(-columns // BLOCK),)
            return (
                MatrixTensor(name="data", columns=(columns,), dtype=fp8, fan_in=1),
                MatrixTensor(name="scales", per="block", columns=blocks, dtype=torch.float32, value=spread),
            )
        case "fp8_row":
            return (
                MatrixTensor(name="data", columns=(columns,), dtype=fp8, fan_in=1),
                MatrixTensor(name="scales", columns=(), dtype=torch.float32, value=spread),
            )
        case "int4":
            return (
                MatrixTensor(name="data", columns=(columns // 8,), dtype=torch.int32),
                MatrixTensor(name="scales", columns=(columns // 32,), dtype=torch.bfloat16, value=spread / 4.6),
            )
        case "mxfp4":
            exponent = 127 + round(math.log2(spread / 2.7))
            return (
                MatrixTensor(name="data", columns=(columns // 2,), dtype=torch.uint8),
                MatrixTensor(name="scales", columns=(columns // 32,), dtype=torch.uint8, value=exponent),
            )
    assert format == "nvfp4", format
    return (
        MatrixTensor(name="data", columns=(columns // 2,), dtype=torch.uint8),
        MatrixTensor(name="scales", columns=(columns // 16,), dtype=fp8, value=1.0),
        MatrixTensor(name="global_scales", per="part", columns=(), dtype=torch.float32, value=spread / 2.7),
    )
