"""Clients take turns, a round of the loop has little to do, and calls that arrive come first, but not for long."""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter

import grpc
from helpers import fake_frontend

from expertwire.deploy.grpc import turns
from expertwire.deploy.grpc.catalog import Catalog
from expertwire.deploy.grpc.requests import Requests
from expertwire.deploy.grpc.server import SERVICE, Server
from expertwire.deploy.grpc.turns import COSTLY, MESSAGE, OPENING, Turns
from expertwire.deploy.proto import expertwire_v1_pb2 as pb
from expertwire.engine.frontend.text_workers import TextWorkers

PER_ROUND = {MESSAGE: 24, OPENING: 4, COSTLY: 1}  # steps


async def take_all(shared, done, client, steps, cost=OPENING):
    """Let a client ask for its steps all at once."""

    async def step():
        await shared.take(client, cost)
        done.append(client)

    await asyncio.gather(*(step() for _ in range(steps)))


def test_clients_take_turns():
    async def run():
        shared, done = Turns(), []
        many = asyncio.ensure_future(take_all(shared, done, "many", 100))
        await asyncio.sleep(0)
        await take_all(shared, done, "few", 2)
        assert len(done) < 20, done
        await many
        assert Counter(done) == {"many": 100, "few": 2}

    asyncio.run(run())


def test_a_round_has_little_to_do():
    async def run(cost):
        shared, done = Turns(), []
        asking = asyncio.ensure_future(take_all(shared, done, "a", 100, cost))
        rounds = 0
        while not asking.done():
            before = len(done)
            await asyncio.sleep(0)
            rounds += 1
            assert len(done) - before <= PER_ROUND[cost] + 1
        assert rounds < 2 * 100 / PER_ROUND[cost] + 10

    for cost in PER_ROUND:
        asyncio.run(run(cost))


def test_arriving_calls_come_first_but_not_for_long():
    async def run():
        shared, done = Turns(), []
        await take_all(shared, done, "a", 8)
        asking = asyncio.ensure_future(take_all(shared, done, "a", 100))
        began, sizes = time.monotonic(), set()
        while not asking.done():
            shared.note_arrival()
            await asyncio.sleep(0)
            sizes.add(len(done))
        assert len(sizes) > 100 / (PER_ROUND[OPENING] + 1), "they are served while calls arrive"
        assert len(sizes) < 3 + (time.monotonic() - began) / turns._PATIENCE_S, "a few at a time"

    asyncio.run(run())


def test_a_call_may_be_handed_over_while_rounds_are_slow(monkeypatch):
    monkeypatch.setattr(turns, "_QUIET_S", 0.0)
    monkeypatch.setattr(turns, "_PATIENCE_S", 60.0)

    async def run():
        shared, done = Turns(), []
        await take_all(shared, done, "a", 8)
        shared.note_arrival()
        asking = asyncio.ensure_future(take_all(shared, done, "a", 1))
        rounds = 0
        while not asking.done():
            await asyncio.sleep(0)
            rounds += 1
        assert rounds >= turns._HANDOVER_ROUNDS

    asyncio.run(run())


class News(fake_frontend.FakeFrontend):
    """Has ever more news, and notes in which rounds of the loop they are received."""

    def __init__(self):
        super().__init__()
        self.has_more, self.round, self.received_in = True, 0, []
        self._push_byte()

    def _push_byte(self):
        os.write(self._wake, b"x")

    def receive(self, timeout=0.0, max_rows=None):
        self.received_in.append(self.round)
        return []


async def go_round(frontend, num_rounds, each=lambda: None):
    for _ in range(num_rounds):
        frontend.round += 1
        each()
        await asyncio.sleep(0)


def test_news_are_received_once_a_round():
    async def run():
        frontend = News()
        requests = Requests(frontend, TextWorkers(frontend, None), Catalog(), Turns())
        await go_round(frontend, 20)
        for _ in range(5):
            requests._pump()  # as an abort does
        frontend.received_in.clear()
        await go_round(frontend, 100)
        requests.stop()
        return frontend.received_in

    received_in = asyncio.run(run())
    assert len(received_in) > 50, "news are received all the time"
    assert max(Counter(received_in).values()) == 1


def test_news_wait_while_calls_arrive_but_not_for_long(monkeypatch):
    monkeypatch.setattr(turns, "_PATIENCE_S", 0.2)

    async def run():
        frontend, shared = News(), Turns()
        requests = Requests(frontend, TextWorkers(frontend, None), Catalog(), shared)
        await go_round(frontend, 20)
        frontend.received_in.clear()
        began = time.monotonic()
        while time.monotonic() < began + 1:
            await go_round(frontend, 1, shared.note_arrival)
        taken_s = time.monotonic() - began
        num_received, at_end = len(frontend.received_in), frontend.round
        requests.stop()
        return num_received, at_end, taken_s

    num_received, num_rounds, taken_s = asyncio.run(run())
    assert 0 < num_received <= 2 + taken_s / 0.2
    assert num_rounds > 10 * num_received


def test_clients_are_served_when_what_begins_the_round_fails():
    async def run():
        shared, reported, served = Turns(), [], []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: reported.append(context["exception"]))

        def fail():
            raise RuntimeError("news")

        shared.begin_round_with(fail)
        for _ in range(3):  # more than one round serves
            shared.ask("a", COSTLY, lambda: served.append(len(served)) is None)
        for _ in range(20):
            await asyncio.sleep(0)
        return served, [str(error) for error in reported]

    assert asyncio.run(run()) == ([0, 1, 2], ["news"])


def test_who_has_gone_has_no_turn():
    async def run():
        shared, done = Turns(), []
        gone = asyncio.ensure_future(take_all(shared, done, "gone", 1000))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.sleep(0)
        begun = len(done)
        await take_all(shared, done, "here", 3)
        assert done[begun:].count("here") == 3
        assert len(done) < 20

    asyncio.run(run())


def test_what_asks_for_a_turn_is_called_once_and_costs_nothing_if_it_has_gone():
    async def run():
        shared, begun = Turns(), []

        def begin(name, *, is_here):
            begun.append(name)
            return is_here

        for number in range(1000):
            shared.ask("gone", COSTLY, lambda number=number: begin(("gone", number), is_here=False))
        shared.ask("here", MESSAGE, lambda: begin("here", is_here=True))
        await asyncio.sleep(0)
        assert begun.count("here") == 1, "those who have gone take no round"
        assert len(set(begun)) == len(begun)

    asyncio.run(run())


def test_a_clients_call_is_not_served_behind_all_those_of_another(monkeypatch):
    # As if the machine did nothing else, however busy it is.
    monkeypatch.setattr(turns, "_QUIET_S", 0.05)
    monkeypatch.setattr(turns, "_PATIENCE_S", 5.0)

    async def run():
        server, frontend, stop = Server("127.0.0.1", 0), fake_frontend.FakeFrontend(), asyncio.Event()
        serving = asyncio.ensure_future(server.serve(frontend, stop=stop, drain_timeout_s=0))
        options, done, calls = [("grpc.use_local_subchannel_pool", 1)], [], []
        channels = [grpc.insecure_channel(f"127.0.0.1:{server.port}", options) for _ in range(2)]
        for channel in channels:
            await asyncio.to_thread(grpc.channel_ready_future(channel).result, 10)
        for name, channel, count in (("crowd", channels[0], 200), ("one", channels[1], 1)):
            method = channel.unary_unary(f"/{SERVICE}/GetModelInfo")
            for _ in range(count):
                calls.append(method.future(pb.GetModelInfoRequest().SerializeToString()))
                calls[-1].add_done_callback(lambda _, name=name: done.append(name))
            time.sleep(0.2)  # the loop stands still, so all calls wait in gRPC, and the one is the last
        for call in calls:
            assert await asyncio.to_thread(call.result, 10)
        for channel in channels:
            channel.close()
        stop.set()
        await serving
        return done.index("one")

    assert asyncio.run(run()) < 50
