"""What a rank holds of a model, and where in a checkpoint it is: declared once, by the layers, parameter by parameter.

Whether a matrix is stored as it is or quantised is seen from the names that the checkpoint has; without one, from what its config
says.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from expertwire.engine.loader.checkpoint import StoredTensor
from expertwire.engine.loader.matrices import Matrix, Shape, fit
from expertwire.engine.loader.quantization import METHODS, PACKED_DTYPES, Method, is_skipped
from expertwire.engine.loader.weight_map import Destination, ParamSpec
from expertwire.engine.models.model_config import Quantization
from expertwire.kernels.formats import Quantized, Weight

Part = tuple[str, int]  # a module of the checkpoint, or a tensor, and its rows


@dataclass
class Layout:
    """The parameters of one rank.

    Attributes:
        stored: the checkpoint's tensors; None: there is none.
        quantization: what its config says.
        specs: by parameter.
        sources: by tensor of the checkpoint; those that another rank or nobody reads go nowhere.
        quantized: the matrices that are stored so, each of them several parameters.
    """

    stored: Mapping[str, StoredTensor] | None
    quantization: Quantization | None
    specs: dict[str, ParamSpec] = field(default_factory=dict)
    sources: dict[str, tuple[Destination, ...]] = field(default_factory=dict)
    quantized: dict[str, Matrix] = field(default_factory=dict)

    def has(self, name: str) -> bool:
        return self.stored is not None and name in self.stored

    def has_quantized(self, data: str, scales: str) -> bool:
        """Whether the checkpoint has a matrix quantised: it has the scales, or, should these be lost, data that need some."""
        found = self.stored.get(data) if self.stored is not None else None
        return self.has(scales) or (found is not None and found.dtype in PACKED_DTYPES)

    def first_stored(self, names: Sequence[str], suffix: str) -> str:
        """The first of several names that the checkpoint has, with this suffix; the first of all if it has none."""
        return next((name for name in names if self.has(name + suffix)), names[0])

    def ignore(self, *names: str) -> None:
        """Tensors that may be there, and go nowhere on this rank."""
        for name in names:
            self.sources.setdefault(name, ())

    def read(self, name: str, *destinations: Destination) -> None:
        """Where a tensor goes, besides where it goes already."""
        self.sources[name] = (*self.sources.get(name, ()), *destinations)

    def vector(self, param: str, *parts: Part, fan_in: int | None = None, dtype: torch.dtype | None = None) -> None:
        """Whole tensors of so many numbers, one behind the other."""
        self.specs[param] = ParamSpec(shape=(sum(size for _, size in parts),), fan_in=fan_in, dtype=dtype)
        start = 0
        for name, size in parts:
            self.read(name, Destination(param=param, region=(slice(start, start + size),)))
            start += size

    def matrix(
        self, param: str, *parts: Part, columns: int, dtype: torch.dtype | None = None, quantized: bool = True
    ) -> None:
        """Modules of so many rows each, one over the other. `quantized`: they may be."""
        method = self._method([module for module, _ in parts]) if quantized else None
        matrix = Matrix(
            param=param, parts=tuple(rows for _, rows in parts), columns=columns, method=method, dtype=dtype
        )
        self.declare(matrix)
        for p, (module, _) in enumerate(parts):
            self.read_fitting(matrix.single(module, p))
            self.ignore(*(module + suffix for suffix in (method.ignored if method is not None else ())))

    def declare(self, matrix: Matrix, experts: tuple[int, ...] | None = None) -> None:
        """The parameters of a matrix."""
        self.specs |= matrix.specs(experts)
        if matrix.method is not None:
            self.quantized[matrix.param] = matrix

    def read_fitting(self, given: Iterable[tuple[str, Destination, list[Shape]]]) -> None:
        """Tensors whose shape may be another than their region's, as `Matrix` tells them."""
        for name, destination, shapes in given:
            found = self.stored[name].shape if self.stored is not None and name in self.stored else None
            self.read(name, fit(destination, found, shapes))

    def _method(self, modules: list[str]) -> Method | None:
        quantization = self.quantization
        if quantization is None or quantization.linears is None:
            return None
        method = METHODS[quantization.linears]
        if self.stored is None:
            return None if any(is_skipped(module, quantization.skipped) for module in modules) else method
        is_quantized = any(self.has_quantized(module + method.data, module + method.scales) for module in modules)
        return method if is_quantized else None

    def parameters(self, tensors: dict[str, Tensor]) -> Parameters:
        """The loaded tensors of `specs`, to be taken one by one."""
        return Parameters(tensors, self.quantized)


class Parameters:
    """Loaded parameters; who takes one has the only reference, so that memory holds one copy and one parameter more."""

    def __init__(self, tensors: dict[str, Tensor], quantized: Mapping[str, Matrix], prefix: str = "") -> None:
        self._tensors, self._quantized, self._prefix = tensors, quantized, prefix

    def within(self, prefix: str) -> Parameters:
        """Those whose names begin so."""
        return Parameters(self._tensors, self._quantized, self._prefix + prefix)

    def name(self, name: str) -> str:
        """The whole name, for messages."""
        return self._prefix + name

    def tensor(self, name: str) -> Tensor:
        return self._tensors.pop(self._prefix + name)

    def maybe(self, name: str) -> Tensor | None:
        return self._tensors.pop(self._prefix + name, None)

    def weight(self, name: str) -> Weight:
        """A matrix, as it is or quantised."""
        matrix = self._quantized.get(self._prefix + name)
        if matrix is None or matrix.method is None:
            return self.tensor(name)
        return Quantized(
            format=matrix.method.format,
            data=self.tensor(name + ".data"),
            scales=self.tensor(name + ".scales"),
            parts=matrix.parts,
            global_scales=self.maybe(name + ".global_scales"),
        )

    def rest(self) -> list[str]:
        """What nobody has taken."""
        return sorted(self._tensors)
