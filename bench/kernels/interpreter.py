"""Set-up of Triton's interpreter, so that its results can be compared bit by bit on any CPU and with any numpy.

Call `prepare` in a process with TRITON_INTERPRET=1 before a kernel runs. Both changes are to
`triton.runtime.interpreter` of Triton 3.6.0 and 3.7.1.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def prepare() -> None:
    """Change the interpreter; a second call changes nothing."""
    if interpreter.InterpreterBuilder.create_dot is _create_dot:
        return
    interpreter.InterpreterBuilder.create_dot = _create_dot
    if _arrays_are_integers():
        return
    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    # Triton 3.6.0 takes `int()` of an array of one element: runtime/interpreter.py, line 888; triton-lang/triton#9171.
    interpreter._patch_lang_tensor = patch


def _arrays_are_integers() -> bool:
    """Return whether numpy makes an int of an array of one element, as it did before 2.4."""
    try:
        int(np.ones(1, np.int64))
    except TypeError:
        return False
    return True


def _create_dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
    """Compute a product whose bits do not depend on the number of its rows and columns.

    numpy leaves fp32 products to a BLAS, which on some CPUs orders the sum of an element by the
    width of the matrix. In fp64 the order of a sum does not show after rounding to fp32: products
    of fp16 are summed exactly, and those of fp32 are off by 2**-29 of a last bit.
    """
    operands = [
        interpreter._convert_float(x.data, x.dtype, tl.float16, None).view(np.float16) if _is_fp8(x) else x.data
        for x in (a, b)
    ]
    wide = np.float64 if d.data.dtype == np.float32 else d.data.dtype
    return interpreter.TensorHandle(np.matmul(*operands, dtype=wide).astype(d.data.dtype) + d.data, d.dtype.scalar)


def _is_fp8(x: Any) -> bool:
    return x.dtype.primitive_bitwidth == 8 and x.dtype.is_floating()
