"""The parameters of one rank and the checkpoint tensors that fill them, as the layers declare them.

The tensor names of the checkpoint show whether a matrix is quantized; without a checkpoint its config does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from expertwire.engine.loader.checkpoint import StoredTensor
from expertwire.engine.loader.param_specs import Index, MatrixTensor, ParamSpec, Shape, StackedMatrix
from expertwire.engine.loader.quantization import METHODS, PACKED_DTYPES, QuantMethod, is_ignored
from expertwire.engine.models.model_config import QuantizationConfig, TensorNames
from expertwire.kernels.formats import BLOCK, QuantizedWeight, Weight


@dataclass(frozen=True, kw_only=True)
class Destination:
    """The region of a parameter that a checkpoint tensor fills: `params[param][region] = tensor[source]`.

    Regions of different tensors are disjoint.

    Attributes:
        param: name of the parameter.
        region: index of leading dimensions, of integers and slices with explicit bounds; () is the whole parameter.
        source: index into the checkpoint's tensor, likewise; slices may have steps.
        stored: shape of the checkpoint's tensor; None: that of the region.
        transposed: whether the last two dimensions of `tensor[source]` are swapped.
        repeated: whether `tensor[source]`, whatever its shape, has one number for the whole region or one for each of its rows.
    """

    param: str
    region: Index = ()
    source: Index = ()
    stored: Shape | None = None
    transposed: bool = False
    repeated: bool = False

    def expected_shape(self, param_shape: Shape) -> Shape:
        """Return the shape that the checkpoint's tensor must have."""
        if self.stored is not None:
            return self.stored
        kept = [i.stop - i.start for i in self.region if isinstance(i, slice)]
        return (*kept, *param_shape[len(self.region) :])

    @property
    def lead(self) -> int | None:
        """The index of the tensor's first dimension that is read; None: all of them are."""
        first = self.source[0] if self.source else None
        return first if isinstance(first, int) else None


# Checkpoint tensor -> the regions that it fills on this rank; () if it is known and not needed, such as another rank's expert.
WeightMap = Mapping[str, tuple[Destination, ...]]


@dataclass
class ParameterLayout:
    """The parameters of one rank.

    Attributes:
        stored: the checkpoint's tensors; None: there is no checkpoint.
        quantization: what the checkpoint's config says.
        specs: the parameters, by name.
        sources: the weight map, which knows every tensor of the checkpoint.
        quantized: the quantized matrices by name; each consists of several parameters.
        zero_centred_norms: whether norms' weights are stored less one.
        centred: those that are.
    """

    stored: Mapping[str, StoredTensor] | None
    quantization: QuantizationConfig | None
    specs: dict[str, ParamSpec] = field(default_factory=dict)
    sources: dict[str, tuple[Destination, ...]] = field(default_factory=dict)
    quantized: dict[str, StackedMatrix] = field(default_factory=dict)
    zero_centred_norms: bool = False
    centred: set[str] = field(default_factory=set)

    def has(self, name: str) -> bool:
        """Return whether the checkpoint has this tensor."""
        return self.stored is not None and name in self.stored

    def has_quantized(self, data: str, scales: str) -> bool:
        """Return whether the checkpoint has a quantized matrix: its scales or, if these are missing, data that need some."""
        found = self.stored.get(data) if self.stored is not None else None
        return self.has(scales) or (found is not None and found.dtype in PACKED_DTYPES)

    def first_stored(self, names: Sequence[str], suffix: str) -> str:
        """Return the first of the names that the checkpoint has with this suffix, or the first name if it has none."""
        return next((name for name in names if self.has(name + suffix)), names[0])

    def ignore(self, *names: str) -> None:
        """Add checkpoint tensors that may exist and are not needed on this rank."""
        for name in names:
            self.sources.setdefault(name, ())

    def assign(self, name: str, *destinations: Destination, shapes: Sequence[Shape] = ()) -> None:
        """Add regions that a checkpoint tensor fills; it may have one of `shapes` instead of the expected one."""
        found = self.stored[name].shape if self.stored is not None and name in self.stored else None
        fitted = [_with_shape(d, found) if found is not None and found in shapes else d for d in destinations]
        self.sources[name] = (*self.sources.get(name, ()), *fitted)

    def vector(
        self, param: str, *parts: tuple[str, int], fan_in: int | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """Add a parameter of one dimension, in which checkpoint tensors of the given sizes are concatenated."""
        self.specs[param] = ParamSpec(shape=(sum(size for _, size in parts),), fan_in=fan_in, dtype=dtype)
        start = 0
        for name, size in parts:
            self.assign(name, Destination(param=param, region=(slice(start, start + size),)))
            start += size

    def norm(self, param: str, part: tuple[str, int]) -> None:
        """Add the weights of a norm of the decoder: in fp32 if they are stored less one, as bf16 has no bits for one more."""
        self.vector(param, part, dtype=torch.float32 if self.zero_centred_norms else None)
        if self.zero_centred_norms:
            self.specs[param] = replace(self.specs[param], value=0.0)
            self.centred.add(param)

    def matrix(
        self,
        param: str,
        *parts: tuple[str, int],
        columns: int,
        dtype: torch.dtype | None = None,
        quantized: bool = True,
    ) -> None:
        """Add a matrix in which modules with the given numbers of rows are stacked; `quantized`: they may be."""
        method = self._linear_method([module for module, _ in parts]) if quantized else None
        rows = tuple(rows for _, rows in parts)
        matrix = StackedMatrix(param=param, parts=rows, columns=columns, method=method, dtype=dtype)
        self.add(matrix)
        for p, (module, _) in enumerate(parts):
            self.assign_part(matrix, p, module)
            self.ignore(*(module + suffix for suffix in (method.ignored if method is not None else ())))

    def matrix_in_turns(self, param: str, module: str, parts: tuple[int, ...], turns: int, *, columns: int) -> None:
        """Add a matrix of parts of the given numbers of rows; a module has them in turns, each with its share of every part.

        Raises:
            ValueError: it is quantized, and not in blocks that end where shares do.
        """
        method = self._linear_method([module])
        matrix = StackedMatrix(param=param, parts=parts, columns=columns, method=method)
        self.add(matrix)
        shares = [rows // turns for rows in parts]
        in_blocks = method is None or (method.format == "fp8_block" and all(rows % BLOCK == 0 for rows in shares))
        if not in_blocks:
            raise ValueError(
                f"{module} is quantized, with rows in turns of {shares}: allowed are blocks of fp8 that divide these by {BLOCK}"
            )
        for name, tensor in matrix.tensors():
            suffix, _ = _stored_as(matrix, tensor, fused=False)
            size = {"row": 1, "block": BLOCK}[tensor.per]
            taken = 0
            for turn in range(turns):
                for p, share in enumerate(shares):
                    start, number = matrix.span(p, tensor.per).start + turn * share // size, share // size
                    destination = Destination(
                        param=name,
                        region=(slice(start, start + number),),
                        source=(slice(taken, taken + number),),
                        stored=(matrix.count(tensor.per), *tensor.columns),
                    )
                    self.assign(module + suffix, destination)
                    taken += number
        self.ignore(*(module + suffix for suffix in (method.ignored if method is not None else ())))

    def add(self, matrix: StackedMatrix, experts: tuple[int, ...] | None = None) -> None:
        """Add the parameters of a matrix; `experts` as `ParamSpec` has them."""
        self.specs |= matrix.specs(experts)
        if matrix.method is not None:
            self.quantized[matrix.param] = matrix

    def assign_part(self, matrix: StackedMatrix, p: int, module: str, index: tuple[int, ...] = ()) -> None:
        """Fill part `p` of a matrix from a module's tensors; `index`: of the leading dimensions."""
        for param, tensor in matrix.tensors():
            suffix, repeated = _stored_as(matrix, tensor, fused=False)
            span = matrix.span(p, tensor.per)
            shapes: list[Shape] = [(span.stop - span.start, 1), (), (1,), (1, 1)] if repeated else []
            destination = Destination(param=param, region=(*index, span), repeated=repeated)
            self.assign(module + suffix, destination, shapes=shapes)

    def assign_fused_part(
        self, matrix: StackedMatrix, p: int, prefix: str, expert: int, slot: int, num_experts: int, names: TensorNames
    ) -> None:
        """Fill part `p` of the expert in `slot` from tensors that hold all experts and whose names begin with `prefix`."""
        for param, tensor in matrix.tensors():
            suffix, repeated = _stored_as(matrix, tensor, fused=True)
            taken = matrix.rows_of_part(p, tensor.per, interleaved=names.interleaved)
            source: Index = (expert, *taken)
            stored: Shape = (num_experts, matrix.count(tensor.per), *tensor.columns)
            transposed = matrix.method is None and names.fused_layout == "columns"
            if transposed:
                source, stored = (expert, slice(None), *taken), (num_experts, matrix.columns, matrix.rows)
            shapes: list[Shape] = []
            if repeated:
                shapes = [(num_experts, matrix.rows, 1), (num_experts, 1, 1), (num_experts, 1), (num_experts,)]
            elif matrix.method is not None and matrix.method.format == "mxfp4" and tensor.name == "data":
                shapes = [(*stored[:-1], stored[-1] // 16, 16)]  # the bytes of a group in a dimension of their own
            destination = Destination(
                param=param,
                region=(slot, matrix.span(p, tensor.per)),
                source=source,
                stored=stored,
                transposed=transposed,
                repeated=repeated,
            )
            self.assign(prefix + suffix, destination, shapes=shapes)

    def _linear_method(self, modules: list[str]) -> QuantMethod | None:
        quantization = self.quantization
        if quantization is None or quantization.linear_method is None:
            return None
        method = METHODS[quantization.linear_method]
        if self.stored is None:
            return None if any(is_ignored(module, quantization.ignored_modules) for module in modules) else method
        data, scales = method.data[0], method.scales[0]
        return method if any(self.has_quantized(module + data, module + scales) for module in modules) else None

    def loaded(self, tensors: dict[str, Tensor]) -> LoadedParameters:
        """Return the filled parameters, to be taken one by one."""
        for name in self.centred & tensors.keys():
            tensors[name] += 1
        return LoadedParameters(tensors, self.quantized)


def _stored_as(matrix: StackedMatrix, tensor: MatrixTensor, *, fused: bool) -> tuple[str, bool]:
    """Return the suffix of a tensor's name in the checkpoint, and whether it is repeated for each row."""
    if matrix.method is None:
        return "" if fused else ".weight", False
    suffix = matrix.method.suffix(tensor.name, fused=fused)
    return suffix, tensor.name == "global_scales" or (tensor.name == "scales" and matrix.method.repeated_scales)


def _with_shape(destination: Destination, shape: Shape) -> Destination:
    source = destination.source
    if destination.repeated and source and math.prod(shape) == shape[0]:
        source = source[:1]  # one number per expert
    return replace(destination, stored=shape, source=source)


class LoadedParameters:
    """Filled parameters. Whoever takes one has the only reference, so that the old form is freed once it is converted."""

    def __init__(self, tensors: dict[str, Tensor], quantized: Mapping[str, StackedMatrix], prefix: str = "") -> None:
        self._tensors, self._quantized, self._prefix = tensors, quantized, prefix

    def within(self, prefix: str) -> LoadedParameters:
        """Return those whose names begin with `prefix`."""
        return LoadedParameters(self._tensors, self._quantized, self._prefix + prefix)

    def name(self, name: str) -> str:
        """Return the whole name, for messages."""
        return self._prefix + name

    def tensor(self, name: str) -> Tensor:
        """Take a parameter."""
        return self._tensors.pop(self._prefix + name)

    def maybe(self, name: str) -> Tensor | None:
        """Take a parameter that need not exist."""
        return self._tensors.pop(self._prefix + name, None)

    def weight(self, name: str) -> Weight:
        """Take a matrix, quantized or not."""
        matrix = self._quantized.get(self._prefix + name)
        if matrix is None or matrix.method is None:
            return self.tensor(name)
        return QuantizedWeight(
            format=matrix.method.format,
            data=self.tensor(name + ".data"),
            scales=self.tensor(name + ".scales"),
            parts=matrix.parts,
            global_scales=self.maybe(name + ".global_scales"),
        )

    def rest(self) -> list[str]:
        """Return the names of the parameters that nobody has taken."""
        return sorted(self._tensors)
