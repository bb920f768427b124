"""The loop takes all of gRPC's wake-ups at once, however many events have come meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time

import grpc

from expertwire.deploy.grpc.event_loop import GrpcEventLoop

CALLS = 60


def num_wake_ups(events):
    with contextlib.suppress(BlockingIOError):
        return len(events.recv(4096, socket.MSG_PEEK | socket.MSG_DONTWAIT))
    return 0


def test_events_that_came_together_leave_no_wake_ups(monkeypatch):
    seen = []  # wake-ups before and after the callback of gRPC's events
    sockets = []  # that it reads them from
    add_reader = asyncio.SelectorEventLoop.add_reader

    def spy(loop, fd, callback, *args):
        def counted(*args):
            before = num_wake_ups(fd)
            callback(*args)
            seen.append((before, num_wake_ups(fd)))

        if isinstance(fd, socket.socket):
            sockets.append(fd)
        add_reader(loop, fd, counted if isinstance(fd, socket.socket) else callback, *args)

    monkeypatch.setattr(asyncio.SelectorEventLoop, "add_reader", spy)
    begun, may_send = [], threading.Event()

    async def handle(_, context):
        begun.append(context)
        await context.read()

    def messages():
        may_send.wait(30)
        yield b"all at once"

    async def run():
        server = grpc.aio.server()
        handlers = {"Take": grpc.stream_stream_rpc_method_handler(handle)}
        server.add_registered_method_handlers("test.Messages", handlers)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            method = channel.stream_stream("/test.Messages/Take")
            calls = [method(messages(), timeout=30) for _ in range(CALLS)]
            while len(begun) < CALLS:
                await asyncio.sleep(0.01)
            may_send.set()
            end = time.monotonic() + 30
            while num_wake_ups(sockets[-1]) < CALLS and time.monotonic() < end:
                time.sleep(0.01)  # the loop stands still, so gRPC has all messages when it goes on
            for call in calls:
                await asyncio.to_thread(list, call)
        await server.stop(None)

    with asyncio.Runner(loop_factory=GrpcEventLoop) as runner:
        runner.run(run())
    before, after = max(seen)
    assert before >= CALLS, "the messages have not come together"
    assert after < 10, f"{after} of {before} wake-ups are left, for each of which the loop goes round in vain"
