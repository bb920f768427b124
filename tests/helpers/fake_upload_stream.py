"""A strict fake of a CUDA stream: its work is done as late as the contract allows, when somebody waits for an event behind it.

So code that fills a pinned buffer again before its copy's event is done, or reads a parameter too early, finds wrong bytes. Work
must come from the one thread that has called `start`: in another one the current device would be GPU 0.
"""

import threading

import torch


class FakeUploadStream:
    """`reader.UploadStream` whose GPU memory is host memory."""

    def __init__(self):
        self.pinned_bytes = []
        self._enqueued = []
        self._done = 0
        self._thread = None

    def start(self):
        assert self._thread is None, "started twice"
        self._thread = threading.get_ident()

    def pinned(self, nbytes):
        self.pinned_bytes.append(nbytes)
        return torch.full((nbytes,), 0xAA, dtype=torch.uint8)

    def scratch(self, nbytes):
        self._check_thread()
        return torch.full((nbytes,), 0xBB, dtype=torch.uint8)

    def run(self, work):
        self._check_thread()
        self._enqueued.append(work)

    def record(self):
        self._check_thread()
        return FakeEvent(self, len(self._enqueued))

    def _check_thread(self):
        assert self._thread == threading.get_ident(), "the thread's current device is not this one"

    def work_to_the_end(self):
        self.work_until(len(self._enqueued))

    def work_until(self, place):
        while self._done < place:
            self._enqueued[self._done]()
            self._done += 1


class FakeEvent:
    """A point in the work."""

    def __init__(self, stream, place):
        self._stream, self.place = stream, place

    def synchronize(self):
        self._stream.work_until(self.place)
