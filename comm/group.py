"""Groups of ranks that exchange rows: gloo between CPUs, NCCL between GPUs, copies for a single rank.

P ranks.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _register_process_group, _unregister_process_group

from expertwire.comm import listeners


class Pending(Protocol):
    """An exchange in progress; its buffers may be used only after `wait`."""

    def wait(self) -> object: ...


class Group(Protocol):
    """Collective operations of the ranks 0..size-1. Every rank takes part in every call, in the same order."""

    rank: int
    size: int

    def exchange(self, out: Tensor, rows: Tensor, out_counts: Sequence[int], counts: Sequence[int]) -> Pending:
        """Send `counts[p]` rows of `rows` to each rank p and receive `out_counts[p]` rows from it into `out`, in rank order.

        Without counts all are equal.
        """
        ...

    def all_gather(self, out: Tensor, rows: Tensor) -> Pending:
        """Gather every rank's `rows`, equally many, into `out` in rank order."""
        ...

    def connect(self) -> None:
        """Take what `exchange` needs now, and not at its first call. All ranks call it together."""
        ...

    def barrier(self) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class NcclOptions:
    """Options of one communicator; see NCCL's ncclConfig_t.

    Args:
        min_ctas, max_ctas: thread blocks of a call; None: NCCL chooses.

    Raises:
        ValueError: a number is not usable.
    """

    min_ctas: int | None = None
    max_ctas: int | None = None

    def __post_init__(self) -> None:
        for name in ("min_ctas", "max_ctas"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= MAX_CTAS:
                raise ValueError(f"{name} must be in [1, {MAX_CTAS}], got {value}")
        if self.min_ctas is not None and self.max_ctas is not None and self.min_ctas > self.max_ctas:
            raise ValueError(f"min_ctas must be at most max_ctas = {self.max_ctas}, got {self.min_ctas}")


MAX_CTAS = 64  # NCCL's MAXCHANNELS
# Of the communicator of all ranks, which gathers texts and moves experts. NCCL holds 9.6 MB for each channel and peer that rows
# are exchanged with (init.cc: `DEFAULT_BUFFSIZE`, `DEFAULT_LL_BUFFSIZE`, `DEFAULT_LL128_BUFFSIZE`; p2p.cc: `p2pRecvSetup`), and
# by default has 32 channels between two GPUs of an NVSwitch: by its sources 2 GB at 8 ranks, and 22 GB at 72.
FEW_CHANNELS = NcclOptions(max_ctas=2)
_TEXT_BYTES = 4096


class _Done:
    def wait(self) -> None:
        return None


class SoloGroup:
    """A group of one rank, which receives what it sends."""

    rank = 0
    size = 1

    def exchange(self, out: Tensor, rows: Tensor, out_counts: Sequence[int], counts: Sequence[int]) -> Pending:
        assert list(out_counts) == list(counts), f"sends {list(counts)} rows to itself but receives {list(out_counts)}"
        out.copy_(rows)
        return _Done()

    def all_gather(self, out: Tensor, rows: Tensor) -> Pending:
        out.copy_(rows)
        return _Done()

    def connect(self) -> None:
        return None

    def barrier(self) -> None:
        return None

    def close(self) -> None:
        return None


class TorchGroup:
    """A group over a process group of `torch.distributed`.

    Args:
        store: store at which the ranks meet.
        device: "cpu" (gloo) or "cuda" (NCCL on the current device; its communicator is made at once).
        local_ip: this host's address as the other ranks see it; gloo listens there.
        timeout_s: an exchange that takes longer is an error.
        nccl: only for "cuda".

    Attributes:
        device: of the tensors that it exchanges, "cpu" or "cuda:N".
        closing: resources that depend on the group; `close` releases them first, in reverse order.
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
        self.closing = contextlib.ExitStack()
        self._options: dict[str, Any] = {"device": device, "local_ip": local_ip, "timeout_s": timeout_s, "nccl": nccl}
        self._group: Any  # torch's backends, whose methods it does not annotate
        timeout = timedelta(seconds=timeout_s)
        if device == "cpu":
            self.device = device
            gloo: Any = dist.ProcessGroupGloo  # whose options torch does not annotate
            options = gloo._Options()
            with listeners.opened() as opened:
                options._devices = [gloo.create_device(hostname=local_ip, lazy_init=False)]
            options._timeout = timeout
            self._group = gloo(store, rank, size, options)
            listeners.refuse_connections(opened)  # all ranks are connected
        else:
            index = torch.cuda.current_device()
            self.device = f"cuda:{index}"
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            configure(options.config, nccl)
            self._group = dist.ProcessGroupNCCL(store, rank, size, options)
            self._group.eager_connect_single_device(torch.device("cuda", index))

    def exchange(self, out: Tensor, rows: Tensor, out_counts: Sequence[int], counts: Sequence[int]) -> Pending:
        """See `Group`. One call: a `send` and a `recv` for each rank would be two events, a record of the flight recorder and a
        reference to memory each (`pointToPoint` in ProcessGroupNCCL.cpp), where `alltoall_base` has a loop of ncclSend and
        ncclRecv (`all2all_single_unequal_split` in torch/csrc/cuda/nccl.cpp)."""
        options = dist.AllToAllOptions()
        return self._group.alltoall_base(out, rows, list(out_counts), list(counts), options)

    def all_gather(self, out: Tensor, rows: Tensor) -> Pending:
        return self._group._allgather_base(_bytes(out), _bytes(rows))

    def connect(self) -> None:
        """See `Group`. NCCL connects two ranks, with buffers for each channel, when the first send between them is enqueued
        (`p2pTaskAppend` in enqueue.cc, 2.28 to 2.30), and `alltoall_base` sends to all ranks, if nothing
        (`_nccl_should_send_recv`). Called ahead of the measurement of memory, nobody runs out of it while serving."""
        ones = torch.zeros(self.size, 1, dtype=torch.uint8, device=self.device)
        exchange_now(self, ones, [1] * self.size, [1] * self.size)

    def barrier(self) -> None:
        """Wait for all ranks; a CUDA group also waits for the work on this rank's current stream."""
        options = dist.BarrierOptions()
        if self.device != "cpu":  # ProcessGroupNCCL::barrier would guess the device from the rank
            options.device_ids = [torch.device(self.device).index]
        self._group.barrier(options).wait()

    def register(self) -> str:
        """Return a name under which torch's C++ finds these ranks and a store of their own, until `close`.

        All ranks call it together. torch's C++ resolves groups by name in `GroupRegistry.cpp`, which holds weak references to
        `ProcessGroup`s, not to their backends. `init_process_group` would register one, too, but as the process's default
        group, which all engines of a process share, and with other backends than ours.
        """
        rendezvous = all_gather_text(self, secrets.token_hex(8), self.device)[0]
        name: Any = f"expertwire-{rendezvous}-{self.rank}"  # one registry per process; names of ranks may differ
        group = dist.ProcessGroup(dist.PrefixStore(f"expertwire-{rendezvous}", self.store), self.rank, self.size)
        _register_process_group(name, group)

        def forget(registered: dist.ProcessGroup) -> None:
            _unregister_process_group(name)

        self.closing.callback(forget, group)
        return name

    def split(self, color_P: Sequence[int], nccl: NcclOptions | None = None) -> Group:
        """Return the group of the ranks with this rank's color, in their order, closed with this group.

        All ranks call it together.
        """
        members = [rank for rank in range(self.size) if color_P[rank] == color_P[self.rank]]
        if len(members) == 1:
            all_gather_text(self, "", self._options["device"])
            return SoloGroup()
        # A store of its own: over a prefix of this group's `FileStore` the groups of several colors waited for ever.
        store, address = serve_store(self._options["local_ip"]) if members[0] == self.rank else (None, "")
        address = all_gather_text(self, address, self._options["device"])[members[0]]
        store = store or _connect_store(address)
        options = self._options if nccl is None else {**self._options, "nccl": nccl}
        group = TorchGroup(store=store, rank=members.index(self.rank), size=len(members), **options)
        self.closing.callback(group.close)
        return group

    def close(self) -> None:
        self.closing.close()
        if hasattr(self._group, "abort"):
            self._group.abort()


def _bytes(rows: Tensor) -> Tensor:
    """Return rows as bytes, because gloo refuses some dtypes."""
    return rows.view(torch.uint8)


def configure(config: Any, wanted: NcclOptions) -> None:
    """Set options in torch's `NCCLConfig`."""
    for name in ("min_ctas", "max_ctas"):
        if (value := getattr(wanted, name)) is not None:
            setattr(config, name, value)


def make_group(
    *, store_address: str, rank: int, size: int, device: str, local_ip: str, timeout_s: float, master: dist.Store | None
) -> Group:
    """Return the group of `size` ranks that meet at a store; the rank that serves a TCP store passes it as `master`.

    Between GPUs it has `FEW_CHANNELS`: rows of tokens want a group of their own (`TorchGroup.split`).

    Args:
        store_address: "tcp:host:port", or "file:/path" for ranks of one machine.
    """
    if size == 1:
        return SoloGroup()
    kind, _, where = store_address.partition(":")
    if kind == "file":
        store: dist.Store = dist.FileStore(where, size)
        store.set_timeout(timedelta(seconds=timeout_s))
    else:
        store = master or _connect_store(store_address, timeout_s)
    return TorchGroup(
        store=store, rank=rank, size=size, device=device, local_ip=local_ip, timeout_s=timeout_s, nccl=FEW_CHANNELS
    )


def _connect_store(address: str, timeout_s: float = 300.0) -> dist.TCPStore:
    """Return the store at "tcp:host:port"; requests may take `timeout_s` seconds."""
    host, port = address.removeprefix("tcp:").rsplit(":", 1)
    return dist.TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=timeout_s))


def serve_store(local_ip: str) -> tuple[dist.TCPStore, str]:
    """Return a TCP store on a free port, and its address for the other ranks. Anybody who can connect to it may write.

    Left to itself, torch listens on every interface; this store listens at `local_ip` only.
    """
    family = socket.AF_INET6 if ":" in local_ip else socket.AF_INET
    listening = socket.create_server((local_ip, 0), family=family, backlog=1024)
    port = listening.getsockname()[1]
    store = dist.TCPStore(local_ip, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach())
    return store, f"tcp:{local_ip}:{port}"


def exchange_now(group: Group, rows: Tensor, out_counts: Sequence[int], counts: Sequence[int]) -> Tensor:
    """Return the result of `Group.exchange` in a new tensor."""
    out = torch.empty((sum(out_counts), *rows.shape[1:]), dtype=rows.dtype, device=rows.device)
    group.exchange(out, rows, out_counts, counts).wait()
    return out


def all_gather_rows(group: Group, row: Tensor) -> Tensor:
    """Return the row [n] of every rank, [P, n], on the row's device. All ranks call it together."""
    out = row.new_empty(group.size, *row.shape)
    group.all_gather(out, row.contiguous()[None]).wait()
    return out


def all_gather_text(group: Group, text: str, device: torch.device | str = "cpu") -> list[str]:
    """Return every rank's text, by rank. All ranks call it together; `device` is one that the group sends from."""
    data = text.encode()
    assert len(data) <= _TEXT_BYTES, f"{len(data)} bytes of text, at most {_TEXT_BYTES}"
    row = torch.frombuffer(bytearray(data.ljust(_TEXT_BYTES, b"\0")), dtype=torch.uint8).to(device)
    return [bytes(row).rstrip(b"\0").decode() for row in all_gather_rows(group, row).cpu().numpy()]
