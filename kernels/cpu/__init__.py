"""`expertwire.kernels.cpu`: the ops on a CPU, compiled by numba; `registry` chooses them, `kernels/*.py` specify them."""

if not __name__.startswith("expertwire."):
    raise ImportError("import this package as `expertwire.kernels.cpu`")
