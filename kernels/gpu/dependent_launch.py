"""Programmatic dependent launch (sm_90 on): a kernel's blocks are scheduled while the kernel before it ends.

A dozen kernels of a few µs each form a layer in decode; this hides the gap of about 1 µs between
two of them. It cannot change a result: a kernel launched with `PDL` first waits until the kernel
before it has ended and its writes are visible (`griddepcontrol.wait` of the PTX ISA), which in turn
has waited for the one before, and so on. Other kernels, torch's among them, are launched normally.
The compile check (`bench/kernels/compile_check.py`) looks for this order in the machine code.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

PDL = {"launch_pdl": True}
_COMPILED = tl.constexpr(not triton.knobs.runtime.interpret)  # the interpreter runs one kernel after another


@triton.jit
def wait_for_previous_kernel():
    """Wait for the previous kernel and let the next one be scheduled; the first statement of a kernel."""
    if _COMPILED:
        gdc_wait()
        gdc_launch_dependents()
