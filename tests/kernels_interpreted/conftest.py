"""These tests run Triton's interpreter, which is chosen when a kernel is decorated: they need a process of their own."""

import os

import pytest


def pytest_configure():
    if os.environ.get("TRITON_INTERPRET") == "1":
        from expertwire.bench.kernels import interpreter

        interpreter.prepare()


def pytest_ignore_collect(collection_path, config):
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if any("kernels_interpreted" in argument for argument in config.args):
        raise pytest.UsageError(
            f"{collection_path.name}: set TRITON_INTERPRET=1, or run tests/kernels/test_interpreted.py"
        )
    return True
