"""Memory of every rank that every rank can write to, from one of three sources.

A source gives P tensors of bytes, all zero, by rank: the one at this rank's place is its own, the others are its peers'. Which
source it was, nobody asks afterwards: the layout (`comm.arena`) and the protocol are the same over all of them.
"""

from __future__ import annotations

import mmap
import os
import secrets
import threading
from pathlib import Path

import torch
from torch import Tensor

from expertwire.comm.control_hub import this_node
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


def symmetric(group: Group, nbytes: int, device: torch.device) -> list[Tensor]:
    """Memory of GPUs that reach each other's, from torch. All ranks call it together, outside of any capture, once.

    Written from the interface of torch 2.11 to 2.13; never run on a GPU yet.
    """
    from torch._C._distributed_c10d import _SymmetricMemory
    from torch.distributed import PrefixStore, _symmetric_memory

    assert isinstance(group, TorchGroup), f"{group} has no store to meet at"
    # Torch knows a group by its name, and a process may have several.
    name = everyones_text(group, f"expertwire-{secrets.token_hex(8)}", device)[0]
    _SymmetricMemory.set_group_info(name, group.rank, group.size, PrefixStore(name, group.store))
    mine = _symmetric_memory.empty(nbytes, dtype=torch.uint8, device=device)
    mine.zero_()
    handle = _SymmetricMemory.rendezvous(mine, name)
    arenas = [handle.get_buffer(rank, (nbytes,), torch.uint8) for rank in range(group.size)]
    torch.cuda.synchronize(device)
    group.barrier()  # nobody writes before all is zero
    return arenas


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
