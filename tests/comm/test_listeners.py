"""Strangers cannot connect to ranks that have met, which go on exchanging."""

from __future__ import annotations

import os
import socket
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from expertwire.comm import listeners
from expertwire.comm.group import TorchGroup, exchange_now

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="listeners are found in /proc")


def connect(address):
    """True if a connection to the address is taken within half a second."""
    try:
        socket.create_connection(address, timeout=0.5).close()
    except TimeoutError:
        return False
    return True


def test_a_listener_takes_no_new_connections_and_keeps_the_old():
    with listeners.opened() as found, socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        with socket.create_connection(address) as client, server.accept()[0] as accepted:
            listeners.refuse_connections([server.fileno()])
            assert not connect(address)
            client.sendall(b"still here")
            assert accepted.recv(100) == b"still here"
    assert found == set(), "it is closed again"


def test_ranks_that_have_met_are_not_to_be_connected_to():
    store, groups, opened = dist.HashStore(), {}, []

    def rank(number):
        with_it = TorchGroup(store=store, rank=number, size=2, device="cpu", local_ip="127.0.0.1", timeout_s=30)
        groups[number] = with_it
        rows = torch.full((2, 3), float(number))
        opened.append((number, exchange_now(with_it, rows, [1, 1], [1, 1]).tolist()))

    before = {each for each, _ in listening_ports()}
    threads = [threading.Thread(target=rank, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    new = [port for each, port in listening_ports() if each not in before]
    assert len(new) == 2, "gloo has one listener a rank"
    assert not any(connect(("127.0.0.1", port)) for port in new)
    assert dict(opened) == {number: [[0.0] * 3, [1.0] * 3] for number in range(2)}
    assert exchange_both(groups) == [[[0.0], [1.0]]] * 2
    for group in groups.values():
        group.close()


def test_looking_for_listeners_leaves_no_descriptors():
    before = sorted(os.listdir("/proc/self/fd"))
    with listeners.opened() as found, Path(os.devnull).open():
        pass
    assert found == set()
    assert sorted(os.listdir("/proc/self/fd")) == before


def exchange_both(groups):
    """Every rank sends its number to both."""
    results = [None, None]

    def run(number):
        rows = torch.full((2, 1), float(number))
        results[number] = exchange_now(groups[number], rows, [1, 1], [1, 1]).tolist()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def listening_ports():
    """The descriptors of this process that listen, and their ports."""
    ports = []
    for descriptor in listeners._listening():
        with socket.socket(fileno=os.dup(descriptor)) as each:
            ports.append((descriptor, each.getsockname()[1]))
    return ports
