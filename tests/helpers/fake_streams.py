"""A strict fake of CUDA's streams and events, and of the allocators that know them: work is done as late as it may be, so that an
order which nobody has asked for is an error.

Every stream, and the host, has a vector clock: how much of each stream's work comes before what it does next. An event carries
that of its stream; who waits for it takes it over. Then these are errors, whatever a device would have made of them:

- Work that reads what another stream writes, or writes what another uses, and has not waited for it.
- An allocation on a stream that has freed memory which another stream may still use: "if a tensor is used on a stream different
  from the stream of origin, the allocator might reuse the memory unexpectedly" (`Tensor.record_stream`, torch/_tensor_docs.py of
  2.13). Blocks are split and merged, so any allocation may be given any of them.
- A host that reads or writes pinned memory (`Tensor.numpy`) of which a copy may still have to be made.

A kernel is taken to read all tensors that it is given, and to write none: the first of these errors is for torch's operations.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from helpers.fake_launches import FakeLaunches

Clock = dict[str, int]  # of each stream, how much of its work comes before


class StreamOrderError(AssertionError):
    pass


@dataclass
class _Block:
    """Memory. `written` and `used`: the last piece of work of each stream that did so."""

    what: str
    stream: str
    pinned: bool = False
    written: Clock = field(default_factory=dict)
    used: Clock = field(default_factory=dict)
    recorded: set[str] = field(default_factory=set)  # by `record_stream`


class FakeStream:
    """As `torch.cuda.Stream`."""

    def __init__(self, streams: FakeStreams, name: str) -> None:
        self._streams, self.name = streams, name
        self.clock: Clock = {name: 0}

    def record_event(self, event: FakeEvent | None = None) -> FakeEvent:
        event = event or FakeEvent(self._streams)
        event.record(self)
        return event

    def wait_event(self, event: FakeEvent) -> None:
        _join(self.clock, event.clock)

    def wait_stream(self, stream: FakeStream) -> None:
        _join(self.clock, stream.clock)

    def synchronize(self) -> None:
        _join(self._streams.host, self.clock)


class FakeEvent:
    """As `torch.cuda.Event`; one that was not recorded is waited for at once."""

    def __init__(self, streams: FakeStreams, enable_timing: bool = False) -> None:
        self._streams = streams
        self.clock: Clock = {}

    def record(self, stream: FakeStream | None = None) -> None:
        self.clock = dict((stream or self._streams.current).clock)

    def wait(self, stream: FakeStream | None = None) -> None:
        _join((stream or self._streams.current).clock, self.clock)

    def synchronize(self) -> None:
        _join(self._streams.host, self.clock)

    def query(self) -> bool:
        return not _behind(self.clock, self._streams.host)

    def elapsed_time(self, later: FakeEvent) -> float:
        return 0.0


class FakeStreams(TorchDispatchMode):
    """A device with a current stream. Install with `FakeStreams().install(monkeypatch)`, use as a context.

    Args:
        gpu: what stands for a device that kernels are launched on, if there are any; its context is entered before.
    """

    def __init__(self, gpu: FakeLaunches | None = None) -> None:
        super().__init__()
        self._gpu = gpu
        self.host: Clock = {}
        self.main = self.current = FakeStream(self, "main")
        self._streams: list[FakeStream] = []
        self._blocks: dict[int, _Block] = {}
        self._freed: dict[str, list[_Block]] = {}  # by stream, what others may still use
        self._calls = _Calls(self)

    def install(self, monkeypatch: Any) -> FakeStreams:
        monkeypatch.setattr(torch.cuda, "Stream", lambda *args, **kwargs: self.stream())
        monkeypatch.setattr(torch.cuda, "Event", lambda *args, **kwargs: FakeEvent(self))
        monkeypatch.setattr(torch.cuda, "stream", self.on)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: self.current)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: self.synchronize())
        monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: self.record_stream(tensor, stream))
        return self

    def stream(self) -> FakeStream:
        self._streams.append(FakeStream(self, f"stream {len(self._streams) + 1}"))
        return self._streams[-1]

    @contextlib.contextmanager
    def on(self, stream: FakeStream | None) -> Iterator[None]:
        before, self.current = self.current, stream or self.current
        try:
            yield
        finally:
            self.current = before

    def unjoined(self) -> list[str]:
        """Return the streams whose work the current one has not waited for: at the end of a capture, an error."""
        return _behind({stream.name: stream.clock[stream.name] for stream in self._streams}, self.current.clock)

    def synchronize(self) -> None:
        for stream in (self.main, *self._streams):
            _join(self.host, stream.clock)

    def __enter__(self) -> FakeStreams:
        self._calls.__enter__()
        if self._gpu is not None:
            from triton.runtime.jit import JITFunction  # which not everybody has

            self._kernels = mock.patch.object(JITFunction, "run", self._kernel(JITFunction.run))
            self._kernels.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if self._gpu is not None:
            self._kernels.__exit__(*error)
        self._calls.__exit__(*error)

    def _kernel(self, run: Any) -> Any:
        def launch(kernel: Any, *args: Any, **kwargs: Any) -> None:
            run(kernel, *args, **kwargs)
            given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
            self.launch(kernel.__name__, given, [])

        return launch

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, schema, name = kwargs or {}, operation._schema, operation.overloadpacket.__name__
        out = operation(*args, **kwargs)
        if any(returned.alias_info is not None and not returned.alias_info.is_write for returned in schema.returns):
            return out  # a view
        written = []
        for place, argument in enumerate(schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                written += tree_leaves(kwargs.get(argument.name, args[place] if place < len(args) else None))
        read = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        new = [value for value in tree_leaves(out) if isinstance(value, Tensor)]
        if not name.startswith(("empty", "new_empty")) or written:
            self.launch(name, read, [value for value in (*written, *new) if isinstance(value, Tensor)])
        else:
            self.launch(None, [], new)
        return out

    def launch(self, name: str | None, read: list[Tensor], written: list[Tensor]) -> None:
        """Work of the current stream; None: only memory is asked for."""
        stream = self.current
        _join(stream.clock, self.host)
        blocks = {id(block): block for block in (self._block(tensor, name or "empty") for tensor in (*read, *written))}
        if name is None:
            return
        stream.clock[stream.name] += 1
        now = stream.clock[stream.name]
        for tensor in read:
            block = self._block(tensor, name)
            self._check(f"{name} on {stream.name} reads", block, block.written, stream.clock)
        for tensor in written:
            block = self._block(tensor, name)
            self._check(f"{name} on {stream.name} writes", block, block.used, stream.clock)
            block.written[stream.name] = now
        for block in blocks.values():
            block.used[stream.name] = now

    def pin(self, tensor: Tensor) -> None:
        self._block(tensor, "pinned").pinned = True

    def touch(self, tensor: Tensor) -> None:
        """The host reads or writes; it may, if that is not memory of the device."""
        block = self._block(tensor, "host")
        if block.pinned:
            self._check("the host reads or writes", block, block.used, self.host)

    def record_stream(self, tensor: Tensor, stream: FakeStream) -> None:
        self._block(tensor, "").recorded.add(stream.name)

    def _check(self, who: str, block: _Block, others: Clock, clock: Clock) -> None:
        for stream in _behind(others, clock):
            kind = "pinned memory" if block.pinned else f"memory of {block.what}"
            raise StreamOrderError(f"{who} {kind} that {stream} may still use")

    def _block(self, tensor: Tensor, what: str) -> _Block:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._blocks:
            _join(self.current.clock, self.host)
            self._allocate(what)
            self._blocks[key] = _Block(what, self.current.name)
            weakref.finalize(storage, self._free, key)
        return self._blocks[key]

    def _allocate(self, what: str) -> None:
        freed, stream = self._freed.get(self.current.name, []), self.current
        for block in freed:
            others = {name: place for name, place in block.used.items() if name not in block.recorded}
            for other in _behind(others, stream.clock):
                raise StreamOrderError(
                    f"{what} on {stream.name} may be given memory of {block.what} that was freed and {other} may still use"
                )
        freed.clear()

    def _free(self, key: int) -> None:
        block = self._blocks.pop(key)
        if not block.pinned:
            self._freed.setdefault(block.stream, []).append(block)


class _Calls(TorchFunctionMode):
    """Passes on calls that are no operation of the device."""

    def __init__(self, streams: FakeStreams) -> None:
        super().__init__()
        self._streams = streams

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(function, "__name__", ""), kwargs or {}
        pinned = kwargs.pop("pin_memory", False)
        if name == "numpy":
            self._streams.touch(args[0])
        out = function(*args, **kwargs)
        if pinned:
            self._streams.pin(out)
        return out


def _join(clock: Clock, other: Clock) -> None:
    for name, place in other.items():
        clock[name] = max(clock.get(name, 0), place)


def _behind(others: Clock, clock: Clock) -> list[str]:
    """The streams of whose work `clock` has not waited for all."""
    return [name for name, place in others.items() if clock.get(name, 0) < place]
