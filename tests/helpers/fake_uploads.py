"""A strict fake of work on a CUDA stream: it is done as late as the contract allows, when somebody waits for an event behind it.

So whoever fills a pinned buffer again before its copy's event is done, or reads a parameter before the end, finds wrong bytes.
Work comes from one thread, which has said so: a thread's current device is the first one otherwise.
"""

import threading

import torch


class FakeUploads:
    """`reading.Uploads` whose GPU is the host's memory."""

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

    def mark(self):
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

    def __init__(self, uploads, place):
        self._uploads, self.place = uploads, place

    def synchronize(self):
        self._uploads.work_until(self.place)
