"""Which implementations run: chosen once, at start, from the device; never changed, never a silent fallback.

`cpu`: numba. `triton`: a GPU. `plain`: torch, anywhere; slow, and beside which the others are tested.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from expertwire.kernels import attention, combine, experts, index, linear, mla, permute, rms_norm, routing
from expertwire.kernels.experts import GroupedMlp
from expertwire.kernels.linear import Linear
from expertwire.kernels.permute import Permuted

if TYPE_CHECKING:
    from expertwire.kernels.gpu.device import Device


@dataclass(frozen=True, kw_only=True)
class Ops:
    """One implementation of each op; the signatures are those of the references. `linear` and `experts` prepare weights.

    `on_device`: sequences and counts are described by tensors on the device (`attention.DeviceSequences`), and nothing is read
    back while a model computes. `fast`: the bits of a token may depend on what is computed along with it.
    """

    why: str
    on_device: bool
    fast: bool
    linear: Callable[..., Linear]
    experts: Callable[..., GroupedMlp]
    rms_norm: Callable[..., Tensor]
    add_rms_norm: Callable[..., tuple[Tensor, Tensor]]
    rotate_and_store: Callable[..., Tensor]
    attend: Callable[..., Tensor]
    rotate_and_store_latent: Callable[..., Tensor]
    attend_latent: Callable[..., Tensor]
    rotate_and_store_index: Callable[..., Tensor]
    choose_positions: Callable[..., Tensor]
    route: Callable[..., tuple[Tensor, Tensor]]
    silu_mul: Callable[[Tensor], Tensor]
    permute: Callable[..., Permuted]
    combine: Callable[[Tensor, Tensor], Tensor]

    def explain(self) -> str:
        """Why these, and for each op where its implementation lives."""
        ops = [(field.name, getattr(self, field.name)) for field in fields(self)]
        return "\n".join([self.why, *(f"{name}: {_place(op)}" for name, op in ops if callable(op))])


def _mode(fast: bool) -> str:
    return "fast: bits may depend on the batch" if fast else "invariant: bits do not depend on the batch"


def _place(op: Any) -> str:
    op = op.func if isinstance(op, partial) else op
    return f"{op.__module__}.{op.__name__}"


def choose(device: str, *, fast: bool = False) -> Ops:
    """The ops for "cpu" or "cuda".

    Raises:
        ValueError: the GPU is too old.
    """
    if device == "cpu":
        return cpu(fast=fast)
    from expertwire.kernels.gpu.device import describe

    gpu = describe(device)
    if gpu.arch < 90:
        name = torch.cuda.get_device_name(device)
        raise ValueError(
            f"device {device} is a {name} of compute capability {gpu.arch / 10}; allowed are 9.0 and above"
        )
    return triton(gpu, fast=fast)


def cpu(*, fast: bool = False) -> Ops:
    """For a CPU."""
    # numba is slow to import and of no use elsewhere.
    from expertwire.kernels.cpu import attention as cpu_attention
    from expertwire.kernels.cpu import elementwise, rotary
    from expertwire.kernels.cpu import index as cpu_index
    from expertwire.kernels.cpu import mla as cpu_mla
    from expertwire.kernels.cpu import routing as cpu_routing
    from expertwire.kernels.cpu.multiply import BF16_PRODUCTS

    return Ops(
        why=f"the device is a CPU: numba, its products of bf16 by {BF16_PRODUCTS}; {_mode(fast)}",
        on_device=False,
        fast=fast,
        linear=linear.prepare,
        experts=partial(experts.prepare, silu_mul=elementwise.silu_mul),
        rms_norm=elementwise.rms_norm,
        add_rms_norm=elementwise.add_rms_norm,
        rotate_and_store=rotary.rotate_and_store,
        attend=cpu_attention.attend,
        rotate_and_store_latent=rotary.rotate_and_store_latent,
        attend_latent=cpu_mla.attend,
        rotate_and_store_index=rotary.rotate_and_store_index,
        choose_positions=cpu_index.choose_positions,
        route=cpu_routing.route,
        silu_mul=elementwise.silu_mul,
        permute=permute.reference,
        combine=elementwise.combine,
    )


def plain() -> Ops:
    """In torch alone."""
    return Ops(
        why="asked for: torch alone",
        on_device=False,
        fast=False,
        linear=linear.prepare,
        experts=partial(experts.prepare, silu_mul=experts.silu_mul_reference),
        rms_norm=rms_norm.reference,
        add_rms_norm=rms_norm.add_reference,
        rotate_and_store=attention.rotate_and_store,
        attend=attention.attend,
        rotate_and_store_latent=mla.rotate_and_store,
        attend_latent=mla.attend,
        rotate_and_store_index=index.rotate_and_store,
        choose_positions=index.choose_positions,
        route=routing.reference,
        silu_mul=experts.silu_mul_reference,
        permute=permute.reference,
        combine=combine.combine,
    )


def triton(gpu: Device, *, fast: bool = False) -> Ops:
    """For a GPU (or, in Triton's interpreter, for tensors on a CPU)."""
    from expertwire.kernels.gpu import attention as gpu_attention
    from expertwire.kernels.gpu import combine as gpu_combine
    from expertwire.kernels.gpu import experts as gpu_experts
    from expertwire.kernels.gpu import linear as gpu_linear
    from expertwire.kernels.gpu import mla as gpu_mla
    from expertwire.kernels.gpu import permute as gpu_permute
    from expertwire.kernels.gpu import quantize, rotate_and_store
    from expertwire.kernels.gpu import rms_norm as gpu_rms_norm
    from expertwire.kernels.gpu import routing as gpu_routing

    return Ops(
        why=(
            f"the device is a GPU of compute capability {gpu.arch / 10} with {gpu.num_sms} multiprocessors: Triton; "
            f"{_mode(fast)}"
        ),
        on_device=True,
        fast=fast,
        linear=partial(gpu_linear.prepare, device=gpu),
        experts=partial(gpu_experts.prepare, device=gpu),
        rms_norm=gpu_rms_norm.rms_norm,
        add_rms_norm=gpu_rms_norm.add_rms_norm,
        rotate_and_store=rotate_and_store.rotate_and_store,
        attend=partial(gpu_attention.attend, device=gpu, invariant=not fast),
        rotate_and_store_latent=gpu_mla.rotate_and_store,
        attend_latent=partial(gpu_mla.attend, device=gpu),
        rotate_and_store_index=index.rotate_and_store,
        choose_positions=index.choose_positions_on_device,
        route=gpu_routing.route,
        silu_mul=quantize.silu_mul,
        permute=partial(gpu_permute.permute, format="dense"),
        combine=gpu_combine.combine,
    )
