"""Memory of every rank that every rank can write to, from one of three sources.

A source gives P tensors of bytes, all zero, by rank: the one at this rank's place is its own, the others are its peers'. Which
source it was, nobody asks afterwards: the layout (`comm.all_to_all.symmetric_buffer`) and the protocol are the same
over all of them.
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
from expertwire.comm.group import Group, TorchGroup, everyones_text

_SHARED_FOLDER = Path("/dev/shm")


def slices(num_ranks: int, nbytes: int, device: str = "cpu") -> list[Tensor]:
    """Of one tensor: several ranks in one process."""
    return list(torch.zeros(num_ranks, nbytes, dtype=torch.uint8, device=device))


def shared(group: Group, nbytes: int) -> list[Tensor]:
    """Shared memory between the processes of one machine. All ranks call it together.

    The files have a name only until everybody has mapped them, so that nothing stays behind when a rank dies.

    Raises:
        ValueError: the ranks are on several machines, or there is not enough shared memory.
    """
    path = _SHARED_FOLDER / f"expertwire-arena-{secrets.token_hex(8)}"
    problem = _create(path, nbytes)
    try:
        cards = [card.split("\n") for card in everyones_text(group, f"{this_node()}\n{path}\n{problem}")]
        if problems := [f"rank {rank}: {problem}" for rank, (_, _, problem) in enumerate(cards) if problem]:
            raise ValueError(f"all_to_all 'nvlink' needs {nbytes} bytes of shared memory a rank; {problems[0]}")
        if any(node != cards[0][0] for node, _, _ in cards):
            raise ValueError(
                "all_to_all 'nvlink' needs all CPU ranks on one machine, but they are on "
                f"{len({node for node, _, _ in cards})}; use 'reference'"
            )
        arenas = [_map(Path(peer), nbytes) for _, peer, _ in cards]
        group.barrier()
    finally:
        path.unlink(missing_ok=True)
    return arenas


def symmetric(group: TorchGroup, nbytes: int, device: torch.device) -> list[Tensor]:
    """Memory of GPUs that reach each other's, from torch; it is there until the group is closed.

    All ranks call it together, outside of any capture, once for all that they need: torch counts meetings by process and not by
    group, so one that leaves some ranks out hangs the next (https://github.com/pytorch/pytorch/issues/196082). The group may be
    one of CPUs: it only serves to meet. Several ranks on one GPU are refused by torch, unless the process was started with
    TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES=1 in its environment.
    """
    memory = SymmetricMemory(group, nbytes, device)
    group.closing.callback(memory.close)
    return memory.arenas


class SymmetricMemory:
    """The owner of symmetric memory: what keeps the mappings of all ranks' memory alive.

    Written from the sources of torch 2.11 to 2.13 (c10d/symm_mem); never run on a GPU. `CUDASymmetricMemory.cu`: ranks and store
    are those of the `ProcessGroup` that is registered under the name (make_peer_alloc_info, since pull request 172163), and what
    maps the peers' memory belongs to the handle and to the local allocation, whose deleter gives it up. `SymmetricMemory.cpp`:
    `get_buffer` wraps an address and owns nothing, so a buffer outlives neither of the two.

    Attributes:
        arenas: u8 [nbytes], by rank, all zero.
    """

    def __init__(self, group: TorchGroup, nbytes: int, device: torch.device) -> None:
        name = group.register()
        self._device = device
        # Not `_symmetric_memory.empty`, which takes it from a pool: a handle's buffers begin where the pool's block does.
        self._local = _SymmetricMemory.empty_strided_p2p((nbytes,), (1,), torch.uint8, device, name)
        self._local.zero_()
        self._handle = _SymmetricMemory.rendezvous(self._local, name)
        self.arenas = [self._handle.get_buffer(rank, (nbytes,), torch.uint8) for rank in range(group.size)]
        torch.cuda.synchronize(device)
        group.barrier()  # nobody writes before all is zero

    def close(self) -> None:
        """Give everything back, when the device has done what it was given. No arena may be used from now on."""
        torch.cuda.synchronize(self._device)
        self.arenas = []
        del self._handle
        del self._local


def _create(path: Path, nbytes: int) -> str:
    """A file of zeros, or why there is none."""
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            # Allocated now: a full file system is an error here and not a SIGBUS at the first write.
            os.posix_fallocate(file, 0, nbytes)
        finally:
            os.close(file)
    except OSError as error:
        return f"{path.parent}: {error.strerror}"
    return ""


def _map(path: Path, nbytes: int) -> Tensor:
    file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        return torch.frombuffer(mmap.mmap(file, nbytes), dtype=torch.uint8)
    finally:
        os.close(file)


class Fence:
    """A full memory barrier of the CPU, so that a peer sees what was written before ahead of what is written after.

    The compiler reorders nothing here, as each access is a call; x86 shows stores in their order, and the copies of large blocks
    end with their own fence. On processors that order less, this does it: taking and releasing a lock are atomic operations, and
    two rounds order everything before against everything after.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __call__(self) -> None:
        for _ in range(2):
            self._lock.acquire()
            self._lock.release()
