"""Compilation of functions by numba. Any package may import this module, which imports none of them."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import config, njit


def compiler(file: str, sources: str = "*.py", **options: Any) -> Callable[..., Any]:
    """Return a decorator that compiles functions of a module, at once for a signature and otherwise on their first call.

    Machine code is cached beside the module, or in the user's cache folder if that is not writable, separately for every state of
    the sources, because numba does not notice that a function from another file has changed.

    Args:
        file: `__file__` of the module.
        sources: pattern of the files beside it whose functions call each other.
        options: options of `numba.njit`.
    """
    folder = _cache_folder(sorted(Path(file).parent.glob(sources)))

    def jit(function: Any = None, *, signature: Any = None, **more: Any) -> Any:
        if function is None:
            return lambda function: jit(function, signature=signature, **more)
        before, config.CACHE_DIR = config.CACHE_DIR, folder
        try:
            return njit(signature, cache=bool(folder), **options, **more)(function)
        finally:
            config.CACHE_DIR = before

    return jit


def _cache_folder(sources: list[Path]) -> str:
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]
    for folder in (sources[0].parent / "__pycache__", Path.home() / ".cache" / "expertwire"):
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK):
                return str(folder / f"numba-{digest}")
    return ""
