"""Messages round-trip as they are; a channel keeps order, notices the end, and never blocks its sender."""

import contextlib
import os
import select
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from expertwire.comm.control.channel import ChannelClosed, Listener, SocketChannel, connect, pack, unpack
from expertwire.engine import process

DTYPES = hnp.boolean_dtypes() | hnp.integer_dtypes() | hnp.floating_dtypes() | hnp.complex_number_dtypes()
ARRAYS = hnp.arrays(DTYPES, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))


@given(st.dictionaries(st.text(max_size=20), ARRAYS, max_size=30))
def test_arrays_come_back_as_they_were(arrays):
    buffer = bytearray(pack(arrays))
    got = unpack(buffer)
    assert list(got) == list(arrays)
    for name, array in arrays.items():
        assert got[name].dtype == array.dtype
        assert got[name].shape == array.shape
        assert got[name].tobytes() == array.tobytes()
        assert got[name].flags.aligned


def test_unpacked_arrays_are_views_of_the_buffer():
    buffer = bytearray(pack({"a": np.arange(3), "b": np.arange(4.0).reshape(2, 2)}))
    got = unpack(buffer)
    got["b"][1, 1] = 7
    assert unpack(buffer)["b"][1, 1] == 7
    assert all(array.ctypes.data % 8 == 0 for array in got.values())


def test_strided_arrays_are_packed_in_order():
    square = np.arange(12).reshape(3, 4)
    got = unpack(pack({"every second": square[:, ::2], "turned": square.T}))
    assert (got["every second"] == square[:, ::2]).all()
    assert (got["turned"] == square.T).all()


@pytest.mark.parametrize("dtype", [np.dtype([("x", np.int32)]), np.dtype(object), np.dtype("U3"), np.dtype("M8[s]")])
def test_other_dtypes_are_refused_by_name(dtype):
    with pytest.raises(ValueError, match="'odd one'"):
        pack({"fine": np.zeros(1), "odd one": np.zeros(1, dtype)})


@given(st.integers(0, 200), st.binary(min_size=1, max_size=8))
def test_damaged_messages_are_a_value_error_or_arrays_within_the_buffer(at, noise):
    buffer = bytearray(pack({"name": np.arange(8), "other": np.zeros((2, 3), np.float32)}))
    buffer[at : at + len(noise)] = noise
    with contextlib.suppress(ValueError):
        assert sum(array.nbytes for array in unpack(buffer).values()) <= len(buffer)
    with pytest.raises(ValueError, match="malformed"):
        unpack(buffer[:9])


@pytest.fixture(params=["unix path", "unix name", "tcp"])
def address(request, tmp_path):
    return {"unix path": f"unix:{tmp_path}/socket", "unix name": f"unix:@xw-{os.getpid()}", "tcp": "tcp:127.0.0.1:0"}[
        request.param
    ]


def connected(listener, token="token"):
    """Both ends of a new connection."""
    with ThreadPoolExecutor(1) as thread:
        connecting = thread.submit(connect, listener.address, token)
        accepted = listener.accept(5)
        return connecting.result(), accepted


@pytest.fixture
def pair(address):
    listener = Listener(address, "token")
    ours, theirs = connected(listener)
    yield ours, theirs
    for part in (ours, theirs, listener):
        part.close()


def test_messages_keep_their_order_both_ways(pair):
    ours, theirs = pair
    for number in range(100):
        ours.send({"n": np.array([number])})
        theirs.send({"n": np.array([-number])})
    assert [int(theirs.recv(1)["n"][0]) for _ in range(100)] == list(range(100))
    assert [int(ours.recv(1)["n"][0]) for _ in range(100)] == [-number for number in range(100)]


def test_a_select_loop_that_drains_until_none_misses_nothing(pair):
    ours, theirs = pair
    for number in range(100):
        ours.send({"n": np.array([number])})
    got = []
    while len(got) < 100:
        assert select.select([theirs], [], [], 5)[0], f"nothing more to read after {len(got)} messages"
        while message := theirs.recv(0):
            got.append(int(message["n"][0]))
    assert got == list(range(100))
    assert theirs.recv(0) is None


def test_large_messages_arrive_between_small_ones(pair):
    ours, theirs = pair
    data = np.random.default_rng(0).integers(0, 1 << 60, 4 << 20)  # 32 MiB
    reader_got = []
    reader = threading.Thread(target=lambda: reader_got.extend(theirs.recv(30) for _ in range(3)))
    reader.start()
    ours.send({"n": np.array([0])})
    ours.send({"data": data})
    ours.send({"n": np.array([2])})
    ours.drain(30)
    reader.join()
    assert reader_got[0]["n"][0] == 0
    assert (reader_got[1]["data"] == data).all()
    assert reader_got[2]["n"][0] == 2


def test_recv_without_a_message_returns_none_after_its_timeout(pair):
    before = time.monotonic()
    assert pair[0].recv(0.05) is None
    assert time.monotonic() - before >= 0.05


def test_messages_before_the_end_are_still_received(pair):
    ours, theirs = pair
    ours.send({"last": np.array([1])})
    ours.close()
    with contextlib.suppress(ChannelClosed):
        theirs.send({"too late": np.zeros(1 << 20)})
    assert "last" in theirs.recv(1)
    for _ in range(2):
        with pytest.raises(ChannelClosed):
            theirs.recv(1)


def send_for_ever(channel, message):
    while True:
        channel.send(message)


def test_sending_to_a_closed_peer_raises(pair):
    ours, theirs = pair
    theirs.close()
    with pytest.raises(ChannelClosed):  # the first may still find room
        send_for_ever(ours, {"n": np.zeros(1000)})


def test_a_peer_that_stops_reading_is_dropped_and_never_blocks_the_sender():
    left, right = socket.socketpair()
    channel = SocketChannel(left, max_pending=1 << 20)
    with pytest.raises(ChannelClosed, match="stopped reading"):
        send_for_ever(channel, {"n": np.zeros(1 << 14)})  # 128 KiB
    assert channel.pending < (1 << 20) + (1 << 18)
    right.close()
    left.close()


def test_a_message_larger_than_the_limit_passes_when_nothing_waits():
    left, right = socket.socketpair()
    sender, receiver = SocketChannel(left, max_pending=1 << 10), SocketChannel(right)
    sender.send({"n": np.arange(1 << 20)})
    while not (got := receiver.recv(0)):
        sender.flush()
    assert (got["n"] == np.arange(1 << 20)).all()
    sender.close()
    receiver.close()


def test_an_invalid_message_ends_the_channel():
    left, right = socket.socketpair()
    channel = SocketChannel(left)
    right.sendall((16).to_bytes(8, "little") + b"sixteen bytes...")
    with pytest.raises(ChannelClosed, match="malformed"):
        channel.recv(1)
    assert channel.fileno() == -1
    right.close()


def test_a_killed_peer_is_noticed(address):
    listener = Listener(address, "token")
    child = process.start_call("test_control_channel:talk", listener.address)
    channel = listener.accept(30)
    assert channel.recv(30)["n"][0] == 5
    child.send_signal(signal.SIGKILL)
    with pytest.raises(ChannelClosed):
        channel.recv(30)
    process.stop_all([child], 1, grace_s=0)
    listener.close()
    channel.close()


def talk(address):
    """Connect as a child process, send one message and stay."""
    connect(address, "token").send({"n": np.array([5])})
    time.sleep(3600)


@pytest.mark.parametrize("token", ["", "Token", "token and more"])
def test_a_wrong_token_is_dropped(address, token):
    listener = Listener(address, "token")
    with ThreadPoolExecutor(1) as thread:
        connecting = thread.submit(connect, listener.address, token)
        assert listener.accept(0.2) is None
        with pytest.raises(OSError, match="another token"):
            connecting.result()
    friend, accepted = connected(listener)
    for part in (listener, accepted, friend):
        part.close()


def test_a_listener_without_the_token_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as impostor, ThreadPoolExecutor(1) as thread:
        connecting = thread.submit(connect, f"tcp:127.0.0.1:{impostor.getsockname()[1]}", "token")
        theirs, _ = impostor.accept()
        with theirs:
            theirs.sendall(b"xpwire02" + bytes(32))
            theirs.recv(64, socket.MSG_WAITALL)
            theirs.sendall(bytes(32))
            with pytest.raises(OSError, match="does not know the token"):
                connecting.result()


def test_a_recorded_handshake_is_worthless():
    listener = Listener("tcp:127.0.0.1:0", "token")
    where = ("127.0.0.1", int(listener.address.rpartition(":")[2]))
    with socket.create_server(("127.0.0.1", 0)) as recorder, ThreadPoolExecutor(2) as threads:
        # A man in the middle passes everything on, and keeps what the client sent.
        connecting = threads.submit(connect, f"tcp:127.0.0.1:{recorder.getsockname()[1]}", "token")
        accepting = threads.submit(listener.accept, 5)
        client, _ = recorder.accept()
        with client, socket.create_connection(where) as server:
            client.sendall(server.recv(40, socket.MSG_WAITALL))
            said = client.recv(64, socket.MSG_WAITALL)
            server.sendall(said)
            client.sendall(server.recv(32, socket.MSG_WAITALL))
            ends = connecting.result(), accepting.result()
    assert ends[1] is not None
    with socket.create_connection(where) as replayed, ThreadPoolExecutor(1) as thread:
        accepting = thread.submit(listener.accept, 0.5)
        replayed.recv(40, socket.MSG_WAITALL)
        replayed.sendall(said)
        assert accepting.result() is None
        assert replayed.recv(1) == b""
    for part in (listener, *ends):
        part.close()


def test_connections_without_a_token_do_not_block_others():
    listener = Listener("tcp:127.0.0.1:0", "token")
    port = int(listener.address.rpartition(":")[2])
    strangers = [socket.create_connection(("127.0.0.1", port)) for _ in range(300)]
    strangers[0].sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nUser-Agent: someone\r\n\r\n" * 2)
    friend, accepted = connected(listener)
    friend.send({"n": np.array([1])})
    assert accepted.recv(5)["n"][0] == 1
    for part in (listener, friend, accepted, *strangers):
        part.close()


def test_accept_works_from_a_select_loop():
    listener = Listener("tcp:127.0.0.1:0", "token")
    with ThreadPoolExecutor(1) as thread:
        connecting = thread.submit(connect, listener.address, "token")
        accepted = None
        while accepted is None:
            assert select.select([listener], [], [], 5)[0]
            accepted = listener.accept(0)
        channel = connecting.result()
    assert listener.accept(0) is None
    for part in (listener, channel, accepted):
        part.close()


def test_a_unix_socket_leaves_no_file(tmp_path):
    Listener(f"unix:{tmp_path}/socket", "token").close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "bad",
    ["", "host:80", "tcp:host", "tcp::80", "tcp:host:port", "tcp:host:99999", "unix:", "unix:@", "unix:/" + "x" * 200],
)
def test_bad_addresses_are_named(bad):
    with pytest.raises(ValueError, match="address"):
        Listener(bad, "token")
    with pytest.raises(ValueError, match="address"):
        connect(bad, "token")


def test_an_address_in_use_or_without_a_listener_is_named():
    listener = Listener("tcp:127.0.0.1:0", "token")
    with pytest.raises(OSError, match=listener.address):
        Listener(listener.address, "token")
    listener.close()
    with pytest.raises(OSError, match=listener.address):
        connect(listener.address, "token")
