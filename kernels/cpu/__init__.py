"""`expertwire.kernels.cpu`: the ops on a CPU, compiled by numba; `_llvm` holds all that is written in LLVM IR."""

if not __name__.startswith("expertwire."):
    raise ImportError("import this package as `expertwire.kernels.cpu`")
