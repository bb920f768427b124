"""Symmetric memory: as many bytes on every rank, into which every rank can write, from one of three sources.

A source returns P zeroed tensors of bytes, by rank: this rank's own memory and its peers' as mapped here. The layout
(`comm.all_to_all.symmetric_buffer`) and the protocol above it are the same for all sources.
"""

from __future__ import annotations

import mmap
import os
import secrets
import threading
from pathlib import Path

import torch
from torch import Tensor
from torch._C._distributed_c10d import _SymmetricMemory

from expertwire.comm.control.hub import this_node
from expertwire.comm.group import Group, TorchGroup, all_gather_text

_SHARED_FOLDER = Path("/dev/shm")
_BACKEND = "CUDA"  # TORCH_SYMMMEM may name another; NVSHMEM and NCCL want a process group with a backend of their own


def slices(num_ranks: int, nbytes: int, device: str = "cpu") -> list[Tensor]:
    """Return slices of one tensor, for several ranks in one process."""
    return list(torch.zeros(num_ranks, nbytes, dtype=torch.uint8, device=device))


def shared(group: Group, nbytes: int) -> list[Tensor]:
    """Return shared memory between the processes of one machine. All ranks call it together.

    The files are unlinked once all ranks have mapped them, so that nothing is left behind when a rank dies.

    Raises:
        ValueError: the ranks are on several machines, or there is not enough shared memory.
    """
    path = _SHARED_FOLDER / f"expertwire-symmetric-{secrets.token_hex(8)}"
    problem = _create(path, nbytes)
    try:
        files = [text.split("\n") for text in all_gather_text(group, f"{this_node()}\n{path}\n{problem}")]
        if problems := [f"rank {rank}: {problem}" for rank, (_, _, problem) in enumerate(files) if problem]:
            raise ValueError(f"all2all_backend 'nvlink' needs {nbytes} bytes of shared memory a rank; {problems[0]}")
        if any(node != files[0][0] for node, _, _ in files):
            raise ValueError(
                "all2all_backend 'nvlink' needs all CPU ranks on one machine, but they are on "
                f"{len({node for node, _, _ in files})}; use 'reference'"
            )
        buffers = [_map(Path(peer), nbytes) for _, peer, _ in files]
        group.barrier()
    finally:
        if not problem:
            path.unlink()
    return buffers


def symmetric(group: TorchGroup, nbytes: int, device: torch.device) -> list[Tensor]:
    """Return torch's symmetric memory between GPUs, valid until the group is closed.

    All ranks call it together, outside of any graph capture, once for all that they need: torch counts rendezvous by
    process and not by group, so that one without some of the ranks hangs the next
    (https://github.com/pytorch/pytorch/issues/196082). The group is used for the rendezvous only and may be one of
    CPUs. torch refuses several ranks on one GPU, unless the process was started with
    TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES=1 in its environment.
    """
    memory = SymmetricMemory(group, nbytes, device)
    group.closing.callback(memory.close)
    return memory.buffers


class SymmetricMemory:
    """Owner of symmetric memory, which keeps the mappings of all ranks' memory alive.

    Written from the sources of torch 2.11 to 2.13 (c10d/symm_mem); never run on a GPU. `CUDASymmetricMemory.cu`: ranks
    and store are those of the `ProcessGroup` that is registered under the name (make_peer_alloc_info, since pull request
    172163), and the mappings of the peers' memory belong to the handle and to the local allocation, whose deleter unmaps
    them. `SymmetricMemory.cpp`: `get_buffer` wraps an address and owns nothing, so that a buffer must not outlive either.

    Attributes:
        buffers: u8 [nbytes], by rank, zeroed.

    Raises:
        ValueError: torch was told to use another kind of symmetric memory.
    """

    def __init__(self, group: TorchGroup, nbytes: int, device: torch.device) -> None:
        if (backend := _SymmetricMemory.get_backend(device)) != _BACKEND:
            raise ValueError(
                f"all2all_backend 'nvlink' needs torch's symmetric memory of kind {_BACKEND!r}, this process has {backend!r}; "
                f"unset TORCH_SYMMMEM"
            )
        name = group.register()
        self._device = device
        # Not `_symmetric_memory.empty`, which allocates from a pool: a handle's buffers begin where the pool's block does.
        self._local = _SymmetricMemory.empty_strided_p2p((nbytes,), (1,), torch.uint8, device, name)
        self._local.zero_()
        self._handle = _SymmetricMemory.rendezvous(self._local, name)
        self.buffers = [self._handle.get_buffer(rank, (nbytes,), torch.uint8) for rank in range(group.size)]
        torch.cuda.synchronize(device)
        group.barrier()  # no rank may write before all memory is zeroed

    def close(self) -> None:
        """Free the memory once the device's work is done. No buffer may be used from now on."""
        torch.cuda.synchronize(self._device)
        self.buffers = []
        del self._handle
        del self._local


def _create(path: Path, nbytes: int) -> str:
    """Create a file of zeros; return an error message, or "" on success."""
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            # Allocated now: a full file system is an error here and not a SIGBUS at the first write.
            os.posix_fallocate(file, 0, nbytes)
        except OSError:
            path.unlink()
            raise
        finally:
            os.close(file)
    except OSError as error:
        return f"{path.parent}: {error.strerror}{_space(path.parent)}"
    return ""


def _space(folder: Path) -> str:
    """Return what is free in a folder, for an error message; "" if there is no such folder."""
    try:
        found = os.statvfs(folder)
    except OSError:
        return ""
    return f" ({found.f_bavail * found.f_frsize} bytes and {found.f_favail} files are free)"


def _map(path: Path, nbytes: int) -> Tensor:
    file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        return torch.frombuffer(mmap.mmap(file, nbytes), dtype=torch.uint8)
    finally:
        os.close(file)


class Fence:
    """A full memory barrier of the CPU: peers see stores before it ahead of stores after it.

    The compiler reorders nothing here, as each access is a call; x86 keeps stores in order, and copies of large blocks
    end with their own fence. On processors with weaker ordering, acquiring and releasing a lock are atomic operations,
    and two rounds order everything before against everything after.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __call__(self) -> None:
        for _ in range(2):
            self._lock.acquire()
            self._lock.release()
