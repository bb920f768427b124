"""Which implementation of each op runs: chosen once, at start, from the device; never changed, never a silent fallback."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

from torch import Tensor

from expertwire.kernels import attention, combine, experts, rms_norm, routing


@dataclass(frozen=True, kw_only=True)
class Ops:
    """One implementation of each op; the signatures are those of the references."""

    rms_norm: Callable[..., Tensor]
    add_rms_norm: Callable[..., tuple[Tensor, Tensor]]
    rotate_and_store: Callable[..., Tensor]
    attend: Callable[..., Tensor]
    route: Callable[..., tuple[Tensor, Tensor]]
    silu_mul: Callable[[Tensor], Tensor]
    combine: Callable[[Tensor, Tensor], Tensor]

    def explain(self) -> str:
        """One line an op: where its implementation lives."""
        chosen = ((field.name, getattr(self, field.name)) for field in fields(self))
        return "\n".join(f"{name}: {op.__module__}.{op.__name__}" for name, op in chosen)


def choose(device: str) -> Ops:
    """The ops for "cpu" (numba) or a CUDA device (torch)."""
    if device == "cpu":
        # numba is slow to import and of no use elsewhere.
        from expertwire.kernels.cpu import attention as cpu_attention
        from expertwire.kernels.cpu import elementwise

        return Ops(
            rms_norm=elementwise.rms_norm,
            add_rms_norm=elementwise.add_rms_norm,
            rotate_and_store=cpu_attention.rotate_and_store,
            attend=cpu_attention.attend,
            route=elementwise.route,
            silu_mul=elementwise.silu_mul,
            combine=elementwise.combine,
        )
    return Ops(
        rms_norm=rms_norm.reference,
        add_rms_norm=rms_norm.add_reference,
        rotate_and_store=attention.rotate_and_store,
        attend=attention.attend,
        route=routing.reference,
        silu_mul=experts.silu_mul_reference,
        combine=combine.combine,
    )
