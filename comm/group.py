"""A group of ranks that exchange rows: gloo between CPUs, NCCL between GPUs, nothing at all for a single rank."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

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
        """Send `counts[p]` rows of `rows` to each rank p and receive `out_counts[p]` rows from it into `out`, in rank order.

        No counts: equally many of each.
        """
        ...

    def barrier(self) -> None: ...

    def close(self) -> None: ...


class PeerGroup(Group, Protocol):
    """A group whose ranks also send to one another as each pair needs."""

    def swap(self, receive_P: Sequence[Tensor], send_P: Sequence[Tensor]) -> Pending:
        """Send `send_P[p]` to each rank p and receive `receive_P[p]` from it, all at once; nothing travels for empty ones."""
        ...

    def gather(self, out: Tensor, rows: Tensor) -> Pending:
        """Everybody's `rows`, equally many, into `out` in rank order."""
        ...

    def registered(self) -> AbstractContextManager[None]:
        """What is allocated within is registered with NCCL until the group ends; on CPUs, nothing happens.

        All ranks call it together, outside of any capture, and allocate the same.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class NcclOptions:
    """Of one communicator; see NCCL's ncclConfig_t.

    Args:
        min_ctas, max_ctas: thread blocks of a call; None: NCCL chooses.
        zero_ctas: copy engines instead of thread blocks, where NCCL can: equal counts, one NVLink domain, registered memory.

    Raises:
        ValueError: a number is not usable.
    """

    min_ctas: int | None = None
    max_ctas: int | None = None
    zero_ctas: bool = False

    def __post_init__(self) -> None:
        for name in ("min_ctas", "max_ctas"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= MAX_CTAS:
                raise ValueError(f"{name} must be in [1, {MAX_CTAS}], got {value}")
        if self.min_ctas is not None and self.max_ctas is not None and self.min_ctas > self.max_ctas:
            raise ValueError(f"min_ctas must be at most max_ctas = {self.max_ctas}, got {self.min_ctas}")


MAX_CTAS = 64  # NCCL's MAXCHANNELS
_TEXT_BYTES = 4096


class _Done:
    def wait(self) -> None:
        return None


class _All:
    """Several exchanges under way."""

    def __init__(self, pending: Sequence[Pending]) -> None:
        self._pending = pending

    def wait(self) -> None:
        for one in self._pending:
            one.wait()


class SoloGroup:
    """A single rank: what it sends, it receives."""

    rank = 0
    size = 1

    def exchange(self, out: Tensor, rows: Tensor, out_counts: Sequence[int], counts: Sequence[int]) -> Pending:
        assert list(out_counts) == list(counts), f"sends {list(counts)} rows to itself but receives {list(out_counts)}"
        out.copy_(rows)
        return _Done()

    def swap(self, receive_P: Sequence[Tensor], send_P: Sequence[Tensor]) -> Pending:
        receive_P[0].copy_(send_P[0])
        return _Done()

    def gather(self, out: Tensor, rows: Tensor) -> Pending:
        out.copy_(rows)
        return _Done()

    def registered(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

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
        nccl: only for "cuda".

    Raises:
        ValueError: this torch's NCCL has no such option.
    """

    def __init__(
        self,
        *,
        store: dist.Store,
        rank: int,
        size: int,
        device: str,
        local_ip: str,
        timeout_s: float,
        nccl: NcclOptions = NcclOptions(),
    ) -> None:
        self.rank, self.size, self.store = rank, size, store
        self._like: dict[str, Any] = {"device": device, "local_ip": local_ip, "timeout_s": timeout_s, "nccl": nccl}
        self._parts: list[TorchGroup] = []
        self._pools: list[Any] = []
        timeout = timedelta(seconds=timeout_s)
        if device == "cpu":
            options = dist.ProcessGroupGloo._Options()
            options._devices = [dist.ProcessGroupGloo.create_device(hostname=local_ip)]
            options._timeout = timeout
            self._group = dist.ProcessGroupGloo(store, rank, size, options)
        else:
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            configure(options.config, nccl, dist.ProcessGroupNCCL)
            self._group = dist.ProcessGroupNCCL(store, rank, size, options)

    def exchange(self, out: Tensor, rows: Tensor, out_counts: Sequence[int], counts: Sequence[int]) -> Pending:
        options = dist.AllToAllOptions()
        return self._group.alltoall_base(out, rows, list(out_counts), list(counts), options)

    def swap(self, receive_P: Sequence[Tensor], send_P: Sequence[Tensor]) -> Pending:
        grouped = send_P[0].is_cuda  # then one kernel sends and receives all; gloo has a call for each
        if grouped:
            self._group._start_coalescing()
        works = []
        for peer, (receive, send) in enumerate(zip(receive_P, send_P, strict=True)):
            if peer == self.rank:
                receive.copy_(send)
                continue
            if len(receive):
                works.append(self._group.recv([_bytes(receive)], peer, 0))
            if len(send):
                works.append(self._group.send([_bytes(send)], peer, 0))
        return _All([self._group._end_coalescing()] if grouped else works)

    def gather(self, out: Tensor, rows: Tensor) -> Pending:
        return self._group._allgather_base(_bytes(out), _bytes(rows))

    @contextlib.contextmanager
    def registered(self) -> Iterator[None]:
        if self._like["device"] == "cpu":
            yield
            return
        device = torch.device("cuda", torch.cuda.current_device())
        self._group.eager_connect_single_device(device)  # a communicator must be there to register with
        pool = torch.cuda.MemPool(self._group.mem_allocator)
        with torch.cuda.use_mem_pool(pool):
            yield
        self._group.register_mem_pool(pool, symm=True)
        self._pools.append(pool)

    def barrier(self) -> None:
        self._group.barrier(dist.BarrierOptions()).wait()

    def part(self, part_P: Sequence[int], nccl: NcclOptions | None = None) -> Group:
        """A group of the ranks whose part is this rank's, in their order, maybe with other options; it ends with this one.

        All ranks call it together.
        """
        members = [rank for rank in range(self.size) if part_P[rank] == part_P[self.rank]]
        if len(members) == 1:
            everyones_text(self, "", self._like["device"])
            return SoloGroup()
        store, address = serve_store(self._like["local_ip"]) if members[0] == self.rank else (None, "")
        host, port = everyones_text(self, address, self._like["device"])[members[0]].rsplit(":", 1)
        store = store or dist.TCPStore(host, int(port), is_master=False)
        like = self._like if nccl is None else {**self._like, "nccl": nccl}
        part = TorchGroup(store=store, rank=members.index(self.rank), size=len(members), **like)
        self._parts.append(part)
        return part

    def close(self) -> None:
        for part in self._parts:
            part.close()
        for pool in self._pools:
            self._group.deregister_mem_pool(pool)
        self._pools.clear()
        if hasattr(self._group, "abort"):
            self._group.abort()


def _bytes(rows: Tensor) -> Tensor:
    """Gloo refuses some types."""
    return rows.view(torch.uint8)


def configure(config: Any, wanted: NcclOptions, library: Any) -> None:
    """Write what is wanted into torch's `NCCLConfig`; `library` is `ProcessGroupNCCL`.

    Raises:
        ValueError: this torch's NCCL has no such option.
    """
    for name in ("min_ctas", "max_ctas"):
        if (value := getattr(wanted, name)) is not None:
            setattr(config, name, value)
    if wanted.zero_ctas:
        if not hasattr(library, "NCCL_CTA_POLICY_ZERO"):
            raise ValueError("zero_ctas needs a torch that is built with NCCL 2.28 or later; allowed here is False")
        config.cta_policy = library.NCCL_CTA_POLICY_ZERO


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


def everyones(group: Group, row: Tensor) -> Tensor:
    """[P, n]: the row [n] of every rank, on the row's device. All ranks call it together."""
    ones = [1] * group.size
    return exchange_now(group, row.repeat(group.size, 1), ones, ones)


def everyones_text(group: Group, text: str, device: torch.device | str = "cpu") -> list[str]:
    """What every rank says, by rank. All ranks call it together; `device` is one that the group sends from."""
    said = text.encode()
    assert len(said) <= _TEXT_BYTES, f"{len(said)} bytes of text, room for {_TEXT_BYTES}"
    row = torch.frombuffer(bytearray(said.ljust(_TEXT_BYTES, b"\0")), dtype=torch.uint8).to(device)
    return [bytes(row).rstrip(b"\0").decode() for row in everyones(group, row).cpu().numpy()]
