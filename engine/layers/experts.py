"""The parameters of a layer's experts, which a checkpoint stores one by one or fused, quantized or not.

D model width, F expert width, e physical experts of this rank.
"""

from __future__ import annotations

from collections.abc import Sequence

from expertwire.engine.loader.param_specs import ParamSpec, StackedMatrix
from expertwire.engine.loader.parameters import Destination, ParameterLayout
from expertwire.engine.loader.quantization import METHODS, QuantMethod, is_ignored
from expertwire.engine.models.model_config import MoeConfig, TensorNames


def declare(
    layout: ParameterLayout,
    param: str,
    source: str,
    moe: MoeConfig,
    names: TensorNames,
    width: int,
    here: Sequence[int],
) -> None:
    """Add `w13` [e, 2F, D], gate above up, or [e, F, D] without a gate, `w2` [e, D, F] and their biases, of the experts `here`,
    in this order."""
    is_fused, method = _stored_as(layout, source, names, names.gate if moe.activation.gated else names.up)
    lead = (len(here),)
    w13 = StackedMatrix(
        param=param + "w13",
        parts=moe.w13_parts,
        columns=width,
        method=method,
        lead=lead,
    )
    w2 = StackedMatrix(param=param + "w2", parts=(width,), columns=moe.intermediate_size, method=method, lead=lead)
    for matrix in (w13, w2):
        layout.add(matrix, tuple(here))
        if moe.bias:
            shape = (len(here), matrix.rows)
            layout.specs[matrix.param + "_bias"] = ParamSpec(shape=shape, fan_in=matrix.columns, experts=tuple(here))
    slots_of: dict[int, list[int]] = {e: [] for e in range(moe.num_experts)}
    for slot, logical in enumerate(here):
        slots_of[logical].append(slot)
    for e, slots in slots_of.items():
        one = source + names.experts.format(e)
        first = (names.gate, names.up) if moe.activation.gated else (names.up,)
        for matrix, p, module, whole in (
            *((w13, p, module, names.fused[0]) for p, module in enumerate(first)),
            (w2, 0, names.down, names.fused[1]),
        ):
            if is_fused:
                _fused(layout, source + whole, matrix, p, e, slots, moe, names)
            else:
                _single(layout, one + module, matrix, p, slots, moe)


def _stored_as(layout: ParameterLayout, source: str, names: TensorNames, one: str) -> tuple[bool, QuantMethod | None]:
    """Return whether tensors hold all experts, and how they are quantized; `one`: a module of each expert."""
    quantization = layout.quantization
    method = None
    if quantization is not None and quantization.expert_method is not None:
        method = METHODS[quantization.expert_method]
    fused, single = source + names.fused[0], source + names.experts.format(0) + one
    is_fused = layout.has(fused) or (method is not None and layout.has(fused + method.data[1]))
    if method is None or quantization is None:
        return is_fused, None
    if layout.stored is None:
        return False, None if is_ignored(single, quantization.ignored_modules) else method
    name = fused if is_fused else single
    is_quantized = layout.has_quantized(name + method.data[is_fused], name + method.scales[is_fused])
    return is_fused, method if is_quantized else None


def _single(
    layout: ParameterLayout, module: str, matrix: StackedMatrix, p: int, slots: list[int], moe: MoeConfig
) -> None:
    """Add a matrix of one expert, which may be on this rank several times or not at all."""
    method = matrix.method
    suffixes = [".weight"]
    if method is not None:
        suffixes = [method.data[0], method.scales[0], method.global_scales[0], *method.ignored]
    layout.ignore(*(module + suffix for suffix in (*suffixes, ".bias" if moe.bias else "") if suffix))
    for slot in slots:
        layout.assign_part(matrix, p, module, (slot,))
        if moe.bias:
            layout.assign(module + ".bias", Destination(param=matrix.param + "_bias", region=(slot, matrix.span(p))))


def _fused(
    layout: ParameterLayout,
    prefix: str,
    matrix: StackedMatrix,
    p: int,
    expert: int,
    slots: list[int],
    moe: MoeConfig,
    names: TensorNames,
) -> None:
    """Add a matrix of one expert from tensors that hold all experts."""
    for slot in slots:
        layout.assign_fused_part(matrix, p, prefix, expert, slot, moe.num_experts, names)
        if moe.bias:
            destination = Destination(
                param=matrix.param + "_bias",
                region=(slot, matrix.span(p)),
                source=(expert, *matrix.rows_of_part(p, interleaved=names.interleaved)),
                stored=(moe.num_experts, matrix.rows),
            )
            layout.assign(prefix + "_bias", destination)
    if matrix.method is not None:
        layout.ignore(*(prefix + suffix for suffix in matrix.method.ignored))
