"""Compilation of functions by numba. Any package may import this module, which imports none of them."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from numba import config, njit
from numba.core import sigutils
from numba.core.compiler_lock import global_compiler_lock


def compiler(file: str, sources: str = "*.py", **options: Any) -> Callable[..., Any]:
    """Return a decorator that compiles functions of a module, at once for a signature and otherwise on their first call.

    Machine code is cached beside the module, or in the user's cache folder if that is not writable, separately for every state of
    the sources, because numba does not notice that a function from another file has changed. Processes that need the same code at
    the same time compile it once.

    The decorator's option `inner` is for functions that only compiled code calls: they have no entry from Python, which takes as
    long to compile as a small function.

    Args:
        file: `__file__` of the module.
        sources: pattern of the files beside it whose functions call each other.
        options: options of `numba.njit`.
    """
    folder = _cache_folder(sorted(Path(file).parent.glob(sources)))

    def jit(function: Any = None, *, signature: Any = None, inner: bool = False, **more: Any) -> Any:
        if function is None:
            return lambda function: jit(function, signature=signature, inner=inner, **more)
        before, config.CACHE_DIR = config.CACHE_DIR, folder
        try:
            more |= {"no_cpython_wrapper": inner, "no_cfunc_wrapper": True}
            dispatcher = njit(cache=bool(folder), **options, **more)(function)
        finally:
            config.CACHE_DIR = before
        if inner:
            dispatcher.add_overload = functools.partial(_add_inner, dispatcher)
            dispatcher._compile_for_args = functools.partial(_refuse, function)
        if folder:
            dispatcher.compile = functools.partial(_compile_once, dispatcher, dispatcher.compile, Path(folder))
        if signature is not None:
            dispatcher.compile(signature)
            dispatcher.disable_compile()
        return dispatcher

    return jit


def _add_inner(dispatcher: Any, result: Any) -> None:
    """Add compiled code without an entry from Python: numba itself would crash on a call from there."""
    dispatcher.overloads[tuple(result.signature.args)] = result


def _refuse(function: Any, *args: Any, **kwargs: Any) -> NoReturn:
    raise TypeError(f"{function.__module__}.{function.__name__} can be called by compiled code only")


def _compile_once(dispatcher: Any, compile_: Callable[[Any], Any], folder: Path, signature: Any) -> Any:
    """Call `dispatcher.compile`, unless another process is doing the same: then wait, and find the code in the cache."""
    args, _ = sigutils.normalize_signature(signature)
    if tuple(args) in dispatcher.overloads:
        return compile_(signature)
    function, target = dispatcher.py_func, dispatcher.targetctx.codegen().magic_tuple()
    changed_ns = os.stat(function.__code__.co_filename).st_mtime_ns  # numba's cache depends on it too
    key = hashlib.sha256(repr((function.__module__, args, target, changed_ns)).encode()).hexdigest()[:16]
    # numba's lock first: one thread that waits for a file while another, which waits for numba's, holds that file, is a deadlock.
    with global_compiler_lock, _locked(folder / "compiled" / f"{function.__name__}-{key}"):
        return compile_(signature)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock on a file, which marks what is done: later calls go on at once.

    The lock ends with its process, and saves no more than time: without it, the block is run twice.
    """
    with contextlib.ExitStack() as stack:
        file = None
        with contextlib.suppress(OSError):  # a full disk, or a file system without locks
            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(path.open("ab"))
            if not path.stat().st_size:
                fcntl.flock(file, fcntl.LOCK_EX)
        yield
        if file is not None and not path.stat().st_size:
            file.write(b"done")


def _cache_folder(sources: list[Path]) -> str:
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]
    for folder in (sources[0].parent / "__pycache__", Path.home() / ".cache" / "expertwire"):
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK):
                return str(folder / f"numba-{digest}")
    return ""
