"""Shared memory that cannot be had: what the error says, and that nothing is left."""

import os
from types import SimpleNamespace

import pytest

from expertwire.comm import symmetric_memory
from expertwire.comm.control import hub
from expertwire.comm.group import SoloGroup


def refuse(monkeypatch, name, error):
    real = getattr(os, name)

    def call(path, *args, **kwargs):
        if name == "open" and not str(path).startswith(str(symmetric_memory._SHARED_FOLDER)):
            return real(path, *args, **kwargs)
        raise error

    monkeypatch.setattr(symmetric_memory.os, name, call)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        ("posix_fallocate", OSError(28, "No space left on device"), "No space left on device"),
        ("open", OSError(30, "Read-only file system"), "Read-only file system"),
    ],
)
def test_memory_that_cannot_be_had_is_an_error_with_sizes(tmp_path, monkeypatch, call, error, says):
    monkeypatch.setattr(symmetric_memory, "_SHARED_FOLDER", tmp_path)
    space = SimpleNamespace(f_bavail=3, f_frsize=4096, f_favail=7)
    monkeypatch.setattr(symmetric_memory.os, "statvfs", lambda folder: space)
    refuse(monkeypatch, call, error)
    message = (
        rf"needs 65536 bytes of shared memory a rank; rank 0: {tmp_path}: {says} \(12288 bytes and 7 files are free\)"
    )
    with pytest.raises(ValueError, match=message):
        symmetric_memory.shared(SoloGroup(), 65536)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_an_error_without_sizes_if_it_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(symmetric_memory, "_SHARED_FOLDER", tmp_path / "none")
    with pytest.raises(ValueError, match=r"rank 0: .*/none: No such file or directory$"):
        symmetric_memory.shared(SoloGroup(), 65536)


def test_a_host_without_shared_memory_has_an_id(monkeypatch):
    with_it = hub.this_node()
    real = os.stat
    monkeypatch.setattr(hub.Path, "exists", lambda path: False)

    def stat(path, **kwargs):
        if str(path) == "/dev/shm":
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return real(path, **kwargs)

    monkeypatch.setattr(os, "stat", stat)
    assert hub.this_node() == with_it.rpartition(":")[0] + ":none"
