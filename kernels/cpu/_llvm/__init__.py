"""The compiled primitives of the CPU's kernels, the only door to hand-written LLVM IR and AMX instructions.

A numba kernel uses these like any compiled function and never sees IR:

- `scalars`: decorators, aligned arrays, loads and stores of bf16 and fp8, exp
- `rows`: operations on one row of numbers, softmax and online softmax
- `panels`, `kv_panels`, `codes`: weights, cached keys and values, and quantised codes packed for products
- `products`: rows times a panel, by AMX, AVX512-BF16 or fp32 vectors
- `matrices`: rows times a matrix that is not packed

`vectors` (helpers that emit IR) and `amx` are used by these modules alone.
"""

if not __name__.startswith("expertwire."):
    raise ImportError("import this package as `expertwire.kernels.cpu._llvm`")

from expertwire.kernels.cpu._llvm.codes import expand_codes
from expertwire.kernels.cpu._llvm.kv_panels import empty_panels, pack_keys, pack_values
from expertwire.kernels.cpu._llvm.matrices import add_product
from expertwire.kernels.cpu._llvm.panels import K_STEP, PANEL, pack_rows, store_gated_rows, store_rows, transpose
from expertwire.kernels.cpu._llvm.products import (
    BF16_PRODUCTS,
    HEAD,
    LEAST_ROWS,
    accumulators,
    begin_products,
    end_products,
    multiply,
    multiply_and_gate,
    operand,
    rows_at_once,
)
from expertwire.kernels.cpu._llvm.rows import (
    add_row,
    add_scaled_row,
    copy_row,
    divide_row,
    online_softmax_update,
    rms_scale,
    rotate_row,
    scale_row,
    softmax,
)
from expertwire.kernels.cpu._llvm.scalars import (
    allocating_jit,
    as_array,
    as_rows,
    decay_factor,
    empty,
    exp,
    jit,
    load,
    longest_part,
    round_like,
)
from expertwire.kernels.cpu._llvm.vectors import LANES

__all__ = [
    "BF16_PRODUCTS",
    "HEAD",
    "K_STEP",
    "LANES",
    "LEAST_ROWS",
    "PANEL",
    "accumulators",
    "add_product",
    "add_row",
    "add_scaled_row",
    "allocating_jit",
    "as_array",
    "as_rows",
    "begin_products",
    "copy_row",
    "decay_factor",
    "divide_row",
    "empty",
    "empty_panels",
    "end_products",
    "exp",
    "expand_codes",
    "jit",
    "load",
    "longest_part",
    "multiply",
    "multiply_and_gate",
    "online_softmax_update",
    "operand",
    "pack_keys",
    "pack_rows",
    "pack_values",
    "rms_scale",
    "rotate_row",
    "round_like",
    "rows_at_once",
    "scale_row",
    "softmax",
    "store_gated_rows",
    "store_rows",
    "transpose",
]
