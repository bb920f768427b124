"""Fronts as processes, over controllers of the test: a front that loses one of its links gives way to another."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.fake_controller import INFO, ThreadController

import expertwire
from expertwire.deploy.fronts import SILENT_S, Fronts, waited_s
from expertwire.deploy.grpc.client import Client, ServerError
from expertwire.deploy.grpc.config import ServerConfig
from expertwire.engine.config.engine_config import EngineConfig

DEMO = str(Path(expertwire.__file__).with_name("demo_model"))
pytestmark = pytest.mark.new_interpreters


class FakeEngine:
    """An engine whose links each have a controller of their own."""

    def __init__(self, name):
        self.info = dataclasses.replace(INFO, name=name, max_model_len=100_000)
        self.failure = None
        self.controllers = []

    def connect_socket(self):
        controller = ThreadController(self.info)
        self.controllers.append(controller)
        return socket.socket(fileno=os.dup(controller.frontend_channel.fileno()))


@contextlib.contextmanager
def serving(*engines):
    configs = [(engine, EngineConfig(model=DEMO, served_model_name=engine.info.name)) for engine in engines]
    fronts, stopping = Fronts(configs, ServerConfig(port=0, fronts=1, drain_timeout_s=20)), threading.Event()

    def watch():
        while not stopping.is_set():
            fronts.watch()

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield SimpleNamespace(address=f"127.0.0.1:{fronts.port}", fronts=fronts)
    finally:
        stopping.set()
        watching.join()
        fronts.close()
        for engine in engines:
            for controller in engine.controllers:
                controller.close()
                controller.frontend_channel.close()


def until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def answers(client, model):
    with contextlib.suppress(ServerError):
        return list(client.generate([5, 6], max_tokens=4, model=model))
    return []


def test_a_front_that_has_lost_one_link_gives_way_and_finishes_what_runs():
    small, large = FakeEngine("small"), FakeEngine("large")
    with serving(small, large) as server, Client(server.address) as client:
        assert answers(client, "small") and answers(client, "large")
        running = iter(client.generate([5], max_tokens=50_000, model="large"))
        next(running)
        small.controllers[0].close()
        until(lambda: client.models()["small"])
        # The same client, whose other stream still runs in the old front.
        until(lambda: answers(client, "small"))
        assert answers(client, "large")
        assert client.models() == {"small": "", "large": ""}
        assert len(small.controllers) == len(large.controllers) == 2
        assert next(running)
        large.controllers[0].paused.set()
        running.close()
        until(lambda: len(server.fronts._all_fronts()) == 1)


def test_a_front_stays_when_an_engine_has_failed():
    small, large = FakeEngine("small"), FakeEngine("large")
    with serving(small, large) as server, Client(server.address) as client:
        small.failure = "the controller has died"
        small.controllers[0].close()
        until(lambda: client.models()["small"])
        time.sleep(2.0)
        assert answers(client, "large")
        assert len(large.controllers) == 1


def test_a_silent_front_is_killed_unless_it_waits_for_a_processor(monkeypatch):
    engine = FakeEngine("small")
    with serving(engine) as server:
        fronts = server.fronts
        [front] = fronts._fronts
        # What it waits beyond this is all the time since it was last heard.
        monkeypatch.setattr("expertwire.deploy.fronts.waited_s", lambda _: time.monotonic())
        front.process.send_signal(signal.SIGSTOP)
        time.sleep(SILENT_S + 1.0)
        assert fronts._fronts == [front]
        monkeypatch.setattr("expertwire.deploy.fronts.waited_s", lambda _: front._waited_s)
        until(lambda: fronts._fronts[0] is not front and fronts._fronts[0].is_serving)


def test_waiting_for_a_processor_is_known():
    assert waited_s(os.getpid()) >= 0.0
    assert waited_s(2**22 + 1) == 0.0  # beyond the largest process id
