"""The ops in Triton: each module has kernels and their wrappers.

`kernels/ops` defines the ops, `kernels.registry` chooses between implementations, and `bench/kernels/compile_cases` lists the
launches that are compiled and checked without a GPU.
"""

if not __name__.startswith("expertwire."):
    raise ImportError("import this package as `expertwire.kernels.gpu`")
