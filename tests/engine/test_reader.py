"""The reader: threads, pinned buffers that are reused, and reading in place."""

import threading

import pytest
import torch
from helpers.fake_upload_stream import FakeEvent, FakeUploadStream
from safetensors.torch import save_file

from expertwire.engine.loader import reader
from expertwire.engine.loader.checkpoint import Checkpoint
from expertwire.engine.loader.parameters import Destination

CHUNK = 48  # bytes


def tensors():
    generator = torch.Generator().manual_seed(0)
    made = {f"{i}": torch.randn(7, 6, generator=generator) for i in range(4)}
    return made | {
        "converted": torch.randn(9, 6, generator=generator),
        "experts": torch.randn(3, 6, 8, generator=generator).bfloat16(),
        "exponents": torch.arange(100, dtype=torch.uint8).view(torch.float8_e8m0fnu),
        "scale": torch.tensor(0.5),
    }


MAP = {
    **{f"{i}": (Destination(param="stacked", region=(i,)),) for i in (0, 1, 3)},
    # A replica: the same bytes in two places.
    "2": (Destination(param="stacked", region=(2,)), Destination(param="stacked", region=(4,))),
    "converted": (Destination(param="half"),),
    "experts": (Destination(param="w", region=(0,), source=(2,), stored=(3, 6, 8), transposed=True),),
    "exponents": (Destination(param="exponents"),),
    "scale": (Destination(param="scales", stored=(), repeated=True),),
}


def empty():
    return {
        "stacked": torch.full((5, 7, 6), torch.nan),
        "half": torch.full((9, 6), torch.nan, dtype=torch.bfloat16),
        "w": torch.full((1, 8, 6), torch.nan, dtype=torch.bfloat16),
        "exponents": torch.zeros(100, dtype=torch.uint8),
        "scales": torch.full((5,), torch.nan),
    }


@pytest.fixture
def read(tmp_path, monkeypatch):
    """Read the tensors above into fresh parameters, by given transfers."""
    monkeypatch.setattr(reader, "CHUNK_BYTES", CHUNK)
    save_file(tensors(), tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)

    def run(transfers, names=tuple(MAP)):
        params = empty()
        every = [piece for name in names for piece in reader.pieces(checkpoint.tensors[name], MAP[name], params)]
        seen = []
        reader.read(every, transfers, seen.append)
        assert sorted(piece.offset for piece in seen) == sorted(piece.offset for piece in every)
        return params

    return run


def is_right(params):
    values = tensors()
    expected = {
        "stacked": torch.stack([values[name] for name in ("0", "1", "2", "3", "2")]),
        "half": values["converted"].bfloat16(),
        "w": values["experts"][2:].transpose(1, 2),
        "exponents": values["exponents"].view(torch.uint8),
        "scales": torch.full((5,), 0.5),
    }
    return all(torch.equal(params[name], want) for name, want in expected.items())


@pytest.mark.parametrize("number", [1, 3])
def test_to_the_hosts_memory(read, number):
    assert is_right(read(reader.transfers(torch.device("cpu"), number)))


@pytest.mark.parametrize("number", [1, 3])
def test_to_a_gpu_that_copies_as_late_as_it_may(read, number):
    streams = [FakeUploadStream() for _ in range(number)]
    assert is_right(read([reader.PinnedTransfer(each, CHUNK) for each in streams]))
    assert [each.pinned_bytes for each in streams] == [[CHUNK, CHUNK]] * number  # once, not for each tensor


def test_the_fake_gpu_notices_a_buffer_that_is_filled_too_early(read, monkeypatch):
    stream = FakeUploadStream()
    monkeypatch.setattr(FakeEvent, "synchronize", lambda self: None)
    params = read([reader.PinnedTransfer(stream, CHUNK)])
    stream.work_to_the_end()
    assert not is_right(params)


def test_several_threads_read_into_once(read):
    """Each of two waits for the other within its first read."""
    together = threading.Barrier(2)

    class Meeting(reader.HostTransfer):
        met = False

        def fetch(self, target, read_into):
            if not self.met:
                together.wait(timeout=60)
                self.met = True
            super().fetch(target, read_into)

    assert is_right(read([Meeting(), Meeting()]))


def test_what_lies_as_it_is_stored_is_read_in_place(read):
    class InPlace(reader.HostTransfer):
        def scratch(self, nbytes):
            pytest.fail(f"a detour of {nbytes} bytes")

    params = read([InPlace()], names=("0", "1", "2", "3", "exponents"))
    assert not params["stacked"].isnan().any()


def test_an_error_in_one_thread_stops_the_others(read):
    class Failing(reader.HostTransfer):
        def fetch(self, target, read_into):
            raise RuntimeError("no such disk")

    class Slow(reader.HostTransfer):
        fetched = 0

        def fetch(self, target, read_into):
            self.fetched += 1
            stopped.wait(timeout=60)

        def finish(self):
            stopped.set()

    stopped = threading.Event()
    failing, slow = Failing(), Slow()
    failing.finish = stopped.set
    with pytest.raises(RuntimeError, match="no such disk"):
        read([slow, failing])
    assert slow.fetched <= 1
