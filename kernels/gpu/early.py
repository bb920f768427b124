"""Early launch: a kernel's blocks take their places while the kernel before it ends ("programmatic dependent launch", sm_90 on).

A dozen kernels of a few µs each make a layer in decode; what lies between two of them, a µs or so, is then hidden. It cannot
change a result: a kernel that is launched `EARLY` first of all waits until the kernel before it has ended and its writes are
visible (`griddepcontrol.wait` of the PTX ISA), which in turn has waited for the one before, and so on. Others, torch's among
them, are not launched early and wait as ever. `compile.problems` looks for this order in the machine code.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

EARLY = {"launch_pdl": True}
_COMPILED = tl.constexpr(not triton.knobs.runtime.interpret)  # the interpreter runs one kernel after another


@triton.jit
def wait_for_previous():
    """The first statement of a kernel: wait for the kernel before, and let the one behind take its places."""
    if _COMPILED:
        gdc_wait()
        gdc_launch_dependents()
