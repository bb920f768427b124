"""The experts of a layer in a checkpoint: one by one, or all in one tensor, as they are or quantised.

D model width, F expert width, E experts, e experts here.
"""

from __future__ import annotations

from collections.abc import Sequence

from expertwire.engine.loader.layout import Layout
from expertwire.engine.loader.matrices import Matrix
from expertwire.engine.loader.quantization import METHODS, Method, is_skipped
from expertwire.engine.loader.weight_map import Destination, ParamSpec
from expertwire.engine.models.family import Names
from expertwire.engine.models.model_config import Moe


def declare(layout: Layout, param: str, source: str, moe: Moe, names: Names, width: int, here: Sequence[int]) -> None:
    """`w13` [e, 2F, D], gate over up, and `w2` [e, D, F] of the experts that are here, in this order, and their biases."""
    is_fused, method = _stored_as(layout, source, names)
    lead = (len(here),)
    w13 = Matrix(param=param + "w13", parts=(moe.size, moe.size), columns=width, method=method, lead=lead)
    w2 = Matrix(param=param + "w2", parts=(width,), columns=moe.size, method=method, lead=lead)
    for matrix in (w13, w2):
        layout.declare(matrix, tuple(here))
        if moe.bias:
            shape = (len(here), matrix.rows)
            layout.specs[matrix.param + "_bias"] = ParamSpec(shape=shape, fan_in=matrix.columns, experts=tuple(here))
    slots_of: dict[int, list[int]] = {e: [] for e in range(moe.num_experts)}
    for slot, logical in enumerate(here):
        slots_of[logical].append(slot)
    for e, slots in slots_of.items():
        one = source + names.experts.format(e)
        for matrix, p, module, whole in (
            (w13, 0, names.gate, names.fused[0]),
            (w13, 1, names.up, names.fused[0]),
            (w2, 0, names.down, names.fused[1]),
        ):
            if is_fused:
                _fused(layout, source + whole, matrix, p, e, slots, moe, names)
            else:
                _single(layout, one + module, matrix, p, slots, moe)


def _stored_as(layout: Layout, source: str, names: Names) -> tuple[bool, Method | None]:
    """Whether all experts are in one tensor, and the method of their quantisation."""
    quantization = layout.quantization
    method = METHODS[quantization.experts] if quantization is not None and quantization.experts is not None else None
    fused, single = source + names.fused[0], source + names.experts.format(0) + names.gate
    is_fused = any(layout.has(fused + suffix) for suffix in ("", *((method.fused_data,) if method else ())))
    if method is None or quantization is None:
        return is_fused, None
    if layout.stored is None:
        return False, None if is_skipped(single, quantization.skipped) else method
    names_of = (fused + method.fused_data, fused + method.fused_scales)
    if not is_fused:
        names_of = (single + method.data, single + method.scales)
    return is_fused, method if layout.has_quantized(*names_of) else None


def _single(layout: Layout, module: str, matrix: Matrix, p: int, slots: list[int], moe: Moe) -> None:
    """One matrix of one expert, which may be here several times or not at all."""
    method = matrix.method
    suffixes = (".weight",) if method is None else (method.data, method.scales, method.global_scales, *method.ignored)
    layout.ignore(*(module + suffix for suffix in suffixes if suffix))
    for slot in slots:
        layout.read_fitting(matrix.single(module, p, (slot,)))
    if moe.bias:
        biases = (Destination(param=matrix.param + "_bias", region=(slot, matrix.span(p))) for slot in slots)
        layout.read(module + ".bias", *biases)


def _fused(
    layout: Layout, whole: str, matrix: Matrix, p: int, e: int, slots: list[int], moe: Moe, names: Names
) -> None:
    """One matrix of one expert, out of the tensors of all of them."""
    by_columns = names.fused_layout == "columns"
    for slot in slots:
        given = matrix.fused(whole, p, e, slot, moe.num_experts, by_columns=by_columns, pairs=names.pairs)
        layout.read_fitting(given)
        if moe.bias:
            several = len(matrix.parts) > 1
            rows = (slice(p, None, 2) if names.pairs else matrix.span(p),) if several else ()
            layout.read(
                whole + "_bias",
                Destination(
                    param=matrix.param + "_bias",
                    region=(slot, matrix.span(p)),
                    source=(e, *rows),
                    stored=(moe.num_experts, matrix.rows),
                ),
            )
    if matrix.method is not None:
        layout.ignore(*(whole + suffix for suffix in matrix.method.ignored))
