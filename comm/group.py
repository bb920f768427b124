"""A group of ranks that exchange rows: gloo between CPUs, NCCL between GPUs, nothing at all for a single rank."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class Pending(Protocol):
    """An exchange under way; its buffers may be touched only after `wait`."""

    def wait(self) -> object: ...


class Group(Protocol):
    """Ranks 0..size-1 and what they can do together. Every rank takes part in every call, in the same order."""

    rank: int
    size: int

    def exchange(self, out: Tensor, rows: Tensor, out_counts: Sequence[int], counts: Sequence[int]) -> Pending:
        """Send `counts[p]` rows of `rows` to each rank p and receive `out_counts[p]` rows from it into `out`, in rank order."""
        ...

    def barrier(self) -> None: ...

    def close(self) -> None: ...


class _Done:
    def wait(self) -> None:
        return None


class SoloGroup:
    """A single rank: what it sends, it receives."""

    rank = 0
    size = 1

    def exchange(self, out: Tensor, rows: Tensor, out_counts: Sequence[int], counts: Sequence[int]) -> Pending:
        assert list(out_counts) == list(counts), f"sends {list(counts)} rows to itself but receives {list(out_counts)}"
        out.copy_(rows)
        return _Done()

    def barrier(self) -> None:
        return None

    def close(self) -> None:
        return None


class TorchGroup:
    """Ranks of `torch.distributed`.

    Args:
        store: where the ranks find each other.
        device: "cpu" (gloo) or "cuda" (NCCL).
        local_ip: this host's address towards the others; gloo listens there.
        timeout_s: an exchange that takes longer is an error.
    """

    def __init__(
        self, *, store: dist.Store, rank: int, size: int, device: str, local_ip: str, timeout_s: float
    ) -> None:
        self.rank, self.size = rank, size
        timeout = timedelta(seconds=timeout_s)
        if device == "cpu":
            options = dist.ProcessGroupGloo._Options()
            options._devices = [dist.ProcessGroupGloo.create_device(hostname=local_ip)]
            options._timeout = timeout
            self._group = dist.ProcessGroupGloo(store, rank, size, options)
        else:
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            self._group = dist.ProcessGroupNCCL(store, rank, size, options)

    def exchange(self, out: Tensor, rows: Tensor, out_counts: Sequence[int], counts: Sequence[int]) -> Pending:
        options = dist.AllToAllOptions()
        return self._group.alltoall_base(out, rows, list(out_counts), list(counts), options)

    def barrier(self) -> None:
        self._group.barrier(dist.BarrierOptions()).wait()

    def close(self) -> None:
        if hasattr(self._group, "abort"):
            self._group.abort()


def make_group(
    *, store_address: str, rank: int, size: int, device: str, local_ip: str, timeout_s: float, master: dist.Store | None
) -> Group:
    """The group of `size` ranks that meet at the TCP store `host:port`; rank 0 passes the store it serves as `master`."""
    if size == 1:
        return SoloGroup()
    host, port = store_address.rsplit(":", 1)
    store = master or dist.TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=timeout_s))
    return TorchGroup(store=store, rank=rank, size=size, device=device, local_ip=local_ip, timeout_s=timeout_s)


def serve_store(local_ip: str) -> tuple[dist.TCPStore, str]:
    """A TCP store on a free port of this host, and its address for the other ranks."""
    store = dist.TCPStore(local_ip, 0, is_master=True, wait_for_workers=False)
    return store, f"{local_ip}:{store.port}"


def exchange_now(group: Group, rows: Tensor, out_counts: Sequence[int], counts: Sequence[int]) -> Tensor:
    """`Group.exchange` into a new tensor, waited for."""
    out = torch.empty((sum(out_counts), *rows.shape[1:]), dtype=rows.dtype, device=rows.device)
    group.exchange(out, rows, out_counts, counts).wait()
    return out
