"""`expertwire.kernels.gpu`: the ops in Triton; `registry` chooses them, `kernels/*.py` specify them.

Each module holds kernels, their wrappers and `cases()`: everything that the wrappers can launch, for `compile` to check.
"""

if not __name__.startswith("expertwire."):
    raise ImportError("import this package as `expertwire.kernels.gpu`")
