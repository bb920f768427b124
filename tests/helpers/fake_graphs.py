"""A strict fake of CUDA graph capture: operations and kernels are recorded and not executed; a replay executes them on the same
memory, without the code that asked for them. What CUDA refuses while a stream is captured is an error that names the call.

- No synchronisation, and no copy to the host, which is one: "It is invalid to synchronize or query the execution status of a
  stream which is being captured" (CUDA C++ Programming Guide, Prohibited and Unhandled Operations).
- No pinned memory: torch's host allocator asks events whether its blocks are free, and a query is refused as well
  (pytorch#146924); a buffer would be read at the replay, when its owner may have written something else (pytorch#161583).
- No tensors of the host's numbers: those are copies from pageable memory.
- No kernel that was not launched before: loading it, `cuModuleLoadData`, is refused ("Triton Error [CUDA]: operation not
  permitted when stream is capturing", vllm#36587).
- A replay reads addresses: memory of before the capture must be alive (torch.cuda.graph has an option for that,
  `check_input_liveness`), and memory of the capture is the pool's, in which any other replay may have left something else
  (`cuda_graphs.cuda`: graphs share it).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from expertwire.engine.runner.cuda_graphs import Captured
from helpers.fake_launches import ALLOCATIONS, FakeLaunches

# Methods and functions that wait for the device, or copy from pageable memory.
_REFUSED_CALLS = {
    "item", "tolist", "cpu", "numpy", "pin_memory", "is_nonzero", "__bool__", "__int__", "__float__", "__index__", "__array__",
    "tensor", "as_tensor", "asarray",
}  # fmt: skip
# Operations whose outputs' shapes depend on numbers.
_REFUSED_OPERATIONS = {
    "_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "unique_consecutive", "_unique", "_unique2", "bincount",
    "equal",
}  # fmt: skip
_POISON = 0xA5


class FakeCapture:
    """As `cuda_graphs.cuda()` gives one: the work is done once, then captured.

    Args:
        gpu: what stands for the device, if kernels are not interpreted: it knows which of them have been launched.

    `replays` counts all.
    """

    def __init__(self, gpu: FakeLaunches | None = None) -> None:
        self.replays = 0
        self._gpu = gpu
        self._poison = (
            _POISON if gpu is None else 0
        )  # kernels that do not run leave what is there, which may be an index
        self._pool: list[Tensor] = []  # memory of the graphs that share it, as bytes

    def __call__(self, work: Callable[[], Tensor]) -> Captured:
        work()  # what allocates or compiles on first use does so now
        return self._capture(work, self._pool)

    def alone(self, work: Callable[[], Any]) -> Captured:
        """As `torch.cuda.graph` by itself: nothing is done before, and the memory is this graph's."""
        return self._capture(work, [])

    def _capture(self, work: Callable[[], Any], pool: list[Tensor]) -> Captured:
        tape = _Tape(self._poison)
        with _refusing(), tape.launches(self._gpu), tape:
            out = work()
        pool += tape.memory
        return Captured(partial(self._replay, tape.steps, pool), out)

    def _replay(self, steps: list[_Step], pool: list[Tensor]) -> None:
        self.replays += 1
        with torch.inference_mode():
            for memory in pool:
                memory.fill_(self._poison)
            for step in steps:
                step.run(*tree_map(partial(_resolve, step.name), (step.args, step.kwargs)))


class _Step(NamedTuple):
    """An operation or a kernel's launch; tensors of before the capture are `_External`."""

    name: str
    run: Callable[[Any, Any], None]
    args: Any
    kwargs: Any


class _External(NamedTuple):
    """A tensor of before the capture, which the graph does not keep alive."""

    storage: weakref.ref[torch.UntypedStorage]
    dtype: torch.dtype
    offset: int
    size: torch.Size
    stride: tuple[int, ...]


def _resolve(name: str, value: Any) -> Any:
    if not isinstance(value, _Boxed):
        return value
    tensor = value.external
    storage = tensor.storage()
    assert storage is not None, f"a replay of {name} uses memory that was freed: {tensor.dtype} {tuple(tensor.size)}"
    return torch.empty(0, dtype=tensor.dtype).set_(storage, tensor.offset, tensor.size, tensor.stride)


class _Boxed:
    """Keeps `tree_map` out of what is in it."""

    def __init__(self, external: _External) -> None:
        self.external = external


class _Tape(TorchDispatchMode):
    """Records. `memory`: what was allocated meanwhile, as bytes, filled with `poison`."""

    def __init__(self, poison: int) -> None:
        super().__init__()
        self.steps: list[_Step] = []
        self.memory: list[Tensor] = []
        self._poison = poison
        self._private: set[int] = set()

    @contextmanager
    def launches(self, gpu: FakeLaunches | None) -> Iterator[None]:
        """Record launches of kernels, interpreted ones or those of `gpu`."""
        owner = InterpretedFunction if gpu is None else JITFunction
        run = owner.run

        def launch(kernel: Any, *args: Any, **kwargs: Any) -> None:
            if gpu is not None:
                variant = gpu.variant(kernel, *args, **{k: v for k, v in kwargs.items() if k not in ("grid", "warmup")})
                assert (kernel, variant) in gpu.compiled, f"{kernel.__name__} is compiled during a capture: {variant}"
            name = kernel.fn.__name__ if gpu is None else kernel.__name__
            self._record(name, lambda args, kwargs: run(kernel, *args, **kwargs), args, kwargs)

        with mock.patch.object(owner, "run", launch):
            yield

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, schema, kwargs = operation.overloadpacket.__name__, operation._schema, kwargs or {}
        assert name not in _REFUSED_OPERATIONS, f"{name} waits for the device during a capture"
        if name in ("index", "index_put", "index_put_"):
            masks = [index for index in args[1] if index is not None and index.dtype in (torch.bool, torch.uint8)]
            assert not masks, f"{name} by a mask waits for the device during a capture"
        if any(returned.alias_info is not None and not returned.alias_info.is_write for returned in schema.returns):
            found = operation(*args, **kwargs)
            if {_storage(x) for x in _tensors(found)} <= {_storage(x) for x in _tensors((args, kwargs))}:
                return found  # a view; `contiguous` and `reshape` are copies too
        if schema.is_mutable:
            self._record(name, lambda args, kwargs: operation(*args, **kwargs), args, kwargs)
            written = [
                kwargs.get(argument.name, args[place] if place < len(args) else None)
                for place, argument in enumerate(schema.arguments)
                if argument.alias_info is not None and argument.alias_info.is_write
            ]
            return None if not schema.returns else written[0] if len(schema.returns) == 1 else tuple(written)
        out = tree_map(self._allocated, operation(*tree_map(_meta, args), **_on_meta(kwargs)))
        if name not in ALLOCATIONS:
            self._record(name, partial(_again, operation, out), args, kwargs)
        return out

    def _record(self, name: str, run: Callable[[Any, Any], None], args: Any, kwargs: Any) -> None:
        self.steps.append(_Step(name, run, *tree_map(self._boxed, (args, kwargs))))

    def _boxed(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.untyped_storage()._cdata in self._private:
            return value
        geometry = value.dtype, value.storage_offset(), value.size(), value.stride()
        return _Boxed(_External(weakref.ref(value.untyped_storage()), *geometry))

    def _allocated(self, like: Any) -> Any:
        """Return the stand-in of a tensor on "meta"."""
        if not isinstance(like, Tensor):
            return like
        out = torch.empty_strided(like.size(), like.stride(), dtype=like.dtype)
        memory = torch.empty(0, dtype=torch.uint8).set_(out.untyped_storage())
        self.memory.append(memory.fill_(self._poison))
        self._private.add(out.untyped_storage()._cdata)
        return out


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _again(operation: Any, out: Any, args: Any, kwargs: Any) -> None:
    for kept, found in zip(tree_leaves(out), tree_leaves(operation(*args, **kwargs)), strict=True):
        if isinstance(kept, Tensor):
            kept.copy_(found)


def _meta(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device="meta")


def _on_meta(kwargs: dict[str, Any]) -> dict[str, Any]:
    meta = {"device": torch.device("meta")} if kwargs.get("device") is not None else {}
    return {**tree_map(_meta, kwargs), **meta}


class _Refusing(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(function, "__name__", str(function)), kwargs or {}
        assert name not in _REFUSED_CALLS, f"{name} waits for the device or the host's memory during a capture"
        assert not kwargs.get("pin_memory"), f"{name} allocates pinned memory during a capture"
        return function(*args, **kwargs)


@contextmanager
def _refusing() -> Iterator[None]:
    def refuse(name: str) -> Callable[..., None]:
        def refused(*args: Any, **kwargs: Any) -> None:
            raise AssertionError(f"{name} during a capture")

        return refused

    with ExitStack() as stack:
        for owner, name in (
            (torch, "from_numpy"), (torch.cuda, "synchronize"), (torch.cuda.Event, "synchronize"), (torch.cuda.Event, "query"),
            (torch.cuda.Stream, "synchronize"), (torch.cuda.Stream, "query"),
        ):  # fmt: skip
            stack.enter_context(mock.patch.object(owner, name, refuse(f"{owner.__name__}.{name}")))
        stack.enter_context(_Refusing())
        yield
