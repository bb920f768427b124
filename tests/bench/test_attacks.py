"""The attacks' own parts, against gRPC servers without an engine."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
from types import SimpleNamespace

import grpc
import psutil
import pytest
from grpc_reflection.v1alpha import reflection

from expertwire.bench.attacks import all_at_once, frozen, local_strangers, malformed, models
from expertwire.bench.attacks import run as attacks
from expertwire.bench.attacks.attack import Attack, gather_statuses, request, stubs
from expertwire.bench.attacks.raw_http2 import RawConnection, grpc_message
from expertwire.bench.attacks.registry import ATTACKS
from expertwire.bench.attacks.target import Sample, Target
from expertwire.deploy.proto import expertwire_v1_pb2 as pb
from expertwire.deploy.proto import expertwire_v1_pb2_grpc as pb_grpc

SERVICE = pb.DESCRIPTOR.services_by_name["Inference"]
PATH = f"/{SERVICE.full_name}/"


class Servicer(pb_grpc.InferenceServicer):
    """Answers at once; `Abort` fails with a bug of its own."""

    def __init__(self):
        self.prompt_bytes = []

    async def Generate(self, request, context):
        self.prompt_bytes.append(len(request.text))
        yield pb.GenerateResponse(request_id="a")

    async def Abort(self, request, context):
        raise RuntimeError("a bug")

    async def GetModelInfo(self, request, context):
        return pb.ModelInfo(name="x" * 100)

    async def GetStats(self, request, context):
        return pb.Stats()


def against_server(function):
    """Make an async test with a servicer and a port into a pytest function."""

    async def run():
        server, servicer = grpc.aio.server(), Servicer()
        pb_grpc.add_InferenceServicer_to_server(servicer, server)
        reflection.enable_server_reflection((SERVICE.full_name, reflection.SERVICE_NAME), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            await asyncio.wait_for(function(servicer, port), 60)
        finally:
            await server.stop(0)

    def test():
        asyncio.run(run())

    test.__name__ = function.__name__
    return test


@contextlib.asynccontextmanager
async def connected(port, **options):
    connection = await RawConnection(**options).connect("127.0.0.1", port)
    try:
        yield connection
    finally:
        await connection.close()


async def until(condition):
    while not condition():
        await asyncio.sleep(0.01)


@against_server
async def test_a_raw_call_is_answered(servicer, port):
    async with connected(port) as connection:
        await connection.call(PATH + "GetModelInfo", pb.GetModelInfoRequest())
        await until(lambda: connection.received["HEADERS"] == 2)  # the second are the trailers
        assert connection.received["DATA"] == 1
        assert not connection.received["RST_STREAM"]


@against_server
async def test_nothing_is_sent_through_a_closed_window(servicer, port):
    async with connected(port, window=0) as connection:
        await connection.call(PATH + "GetModelInfo", pb.GetModelInfoRequest())
        await until(lambda: connection.received["HEADERS"] == 1)
        await asyncio.sleep(0.2)
        assert connection.received["HEADERS"] == 1
        assert not connection.received["DATA"]


@against_server
async def test_a_raw_message_larger_than_the_window_arrives_whole(servicer, port):
    size = 3_000_000
    async with connected(port) as connection:
        await connection.call(PATH + "Generate", pb.GenerateRequest(text="x" * size))
        await until(lambda: servicer.prompt_bytes)
    assert servicer.prompt_bytes == [size]


@against_server
async def test_malformed_calls_reach_every_method_and_find_statuses_that_lie(servicer, port):
    seen = await malformed.run(SimpleNamespace(address=f"127.0.0.1:{port}"), 50, calls=100)
    methods = {PATH + method.name for method in SERVICE.methods}
    assert methods < seen["methods"].keys()
    assert seen["calls"] == 100
    assert seen["methods"][PATH + "Abort"]["UNKNOWN"] > 0
    assert type(seen["methods"][PATH + "Abort"]) is dict  # `dataclasses.asdict` spoils a Counter
    assert any("a bug" in details for details in seen["examples"].values())


@pytest.mark.slow
@against_server
async def test_attackers_together_have_a_process_each(servicer, port):
    names = ("large_text_1mb", "half_sent", "internal_ports")
    server = Target(f"127.0.0.1:{port}", os.getpid())
    attack = all_at_once.all_at_once([ATTACKS[name] for name in names], niceness=7)
    before = psutil.Process().children()
    running = asyncio.create_task(attack.run(server, 3))
    found = set()
    while not running.done():
        children = [child for child in psutil.Process().children() if child.status() != "zombie" and child.nice() == 7]
        lines = [" ".join(child.cmdline()) for child in children]
        found |= {name for name in names for line in lines if f"all_at_once {name} 127.0.0.1:{port}" in line}
        await asyncio.sleep(0.05)
    seen = await running
    assert found == set(names)
    assert psutil.Process().children() == before
    assert seen["rounds"].keys() == set(names)
    assert seen["rounds"]["half_sent"] in ("1+0", "0+0"), seen["attackers"]  # it is given up when the time is over
    assert all(report["processor_s"] > 0 for report in seen["attackers"].values())
    assert servicer.prompt_bytes


@against_server
async def test_an_attacker_that_fails_begins_again(servicer, port):
    tries = []

    async def run(server, seconds):
        tries.append(seconds)
        if len(tries) < 3:
            raise OSError("refused")
        await asyncio.sleep(60)

    attack = Attack(name="x", about="", run=run, seconds=0.5)
    report = await all_at_once.repeat(attack, Target(f"127.0.0.1:{port}", os.getpid()), 1.5)
    assert (report["rounds"], report["failed"], report["last"]) == (0, 2, {"failed": "OSError('refused')"})
    assert max(tries) == 0.5


def test_every_freeze_is_counted(monkeypatch):
    times = iter([*(i / 10 for i in range(19)), None])

    async def victim(server, role):
        return role

    async def freeze(server, victim):
        took_s = next(times)
        return (None, "not noticed within 30 s") if took_s is None else (took_s, "NOT_SERVING")

    monkeypatch.setattr(frozen, "_victim", victim)
    monkeypatch.setattr(frozen, "_freeze", freeze)
    monkeypatch.setattr(frozen, "_PHASES_S", 0)
    seen = asyncio.run(frozen.run(None, 60, role="rank"))
    assert seen.pop("each_s") == [i / 10 for i in range(19)]
    assert seen == {
        "noticed": 19, "max_s": 1.8, "median_s": 0.9, "how": {"NOT_SERVING": 19}, "ended": "not noticed within 30 s"
    }  # fmt: skip


def test_malformed_calls_are_the_same_in_every_run():
    kind = pb.GenerateRequest.DESCRIPTOR
    for seed in range(50):
        first, second = (malformed.spoiled(kind, random.Random(seed)) for _ in range(2))
        assert first == second


def test_random_messages_set_every_field():
    kind = pb.GenerateRequest.DESCRIPTOR
    messages = [malformed.random_message(kind, random.Random(seed)) for seed in range(200)]
    assert {field.name for message in messages for field, _ in message.ListFields()} == set(kind.fields_by_name)


@pytest.mark.parametrize(
    ("where", "loopback"),
    [("\0name", True), (("127.0.0.1", 1), True), (("::ffff:127.0.0.1", 1), True), (("::1", 1), True), (("::", 1), False),
     (("0.0.0.0", 1), False)],
)  # fmt: skip
def test_what_only_this_machine_reaches(where, loopback):
    assert local_strangers.is_loopback(where) == loopback


def test_addresses_are_described_without_what_changes():
    assert local_strangers.describe("controller", socket.AF_UNIX, "\0x-123") == "controller abstract unix socket"
    assert local_strangers.describe("rank", socket.AF_INET, ("127.0.0.1", 4711)) == "rank tcp 127.0.0.1"


def test_the_long_model_takes_long_prompts(tmp_path):
    from expertwire.engine.models.registry import read_model_config

    folder = models.folder_of("long", tmp_path)
    assert read_model_config(str(folder), "auto", "auto").max_position_embeddings >= 120_000
    assert models.folder_of("long", tmp_path) == folder


def test_a_result_is_one_line():
    sample = Sample(front_mib=50, ranks_mib=100, descriptors=60, processes=4)
    waits = {"counts": {"OK": 7, "UNAVAILABLE": 2}, "longest_ms": 1234.0, "message": "gone"}
    figures = {
        "requests": waits,
        "health": waits | {"counts": {"SERVING": 3}},
        "connections": waits | {"counts": {"SERVING": 7, "UNAVAILABLE": 2}},
    }
    result = attacks.Result(
        name="x", seconds=1, quiet=figures, good=figures, seen={"statuses": {"OK": 1}, "methods": {}}, before=sample,
        peak=Sample(front_mib=75, ranks_mib=101, descriptors=90, processes=4), after=sample, recovered_s=None, errors="",
    )  # fmt: skip
    assert result.failed == 2
    assert result.line() == (
        "x: good client's longest pause 1,234 -> 1,234 ms, 2 of 9 failed; health SERVING 3, longest 1,234 ms; 2 of 9 new "
        "connections failed; memory +25 MiB (ranks +1); descriptors 60 -> 90 -> 60; processes 4 -> 4; recovered no; "
        '{"statuses": {"OK": 1}}'
    )


def test_an_unknown_attack_is_refused(capsys):
    assert attacks.run(["nonsense"]) == 2
    assert "no attack 'nonsense'" in capsys.readouterr().err


def test_some_attacks_together(monkeypatch, capsys):
    measured = []

    async def measure(attack, seconds, folder, extra, *, bare):
        measured.append((attack.name, seconds))
        raise RuntimeError("not here")

    together = []
    monkeypatch.setattr(attacks, "measure", measure)
    make = all_at_once.all_at_once
    monkeypatch.setattr(all_at_once, "all_at_once", lambda *args: together.append(args) or make(*args))
    assert attacks.run(["fair", "bursts", "--all-at-once", "7", "--niceness", "19"]) == 0
    assert measured == [(all_at_once.NAME, 7.0)]
    assert [([attack.name for attack in chosen], niceness) for chosen, niceness in together] == [
        (["fair", "bursts"], 19)
    ]
    assert attacks.run(["fair", "--niceness", "19"]) == 2
    assert "--niceness needs --all-at-once" in capsys.readouterr().err
    assert attacks.run(["fair", "strangers", "--all-at-once", "7"]) == 2
    assert "cannot run 'strangers'" in capsys.readouterr().err
    assert attacks.run(["fair", "--all-at-once", "7", "--seconds", "5"]) == 2
    assert "--all-at-once says how long" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        attacks.run(["--all-at-once", "0"])
    assert "must be a number of seconds above 0, got 0" in capsys.readouterr().err
    assert len(measured) == 1


def test_the_message_has_a_prefix():
    assert grpc_message(b"ab") == b"\0\0\0\0\x02ab"


def test_a_server_that_does_nothing_serves_the_good_client(tmp_path, monkeypatch):
    for name in ("_WARM_UP_S", "_QUIET_S", "_RECOVERY_STEP_S"):
        monkeypatch.setattr(attacks, name, 0.5)

    async def attack(target, seconds):
        async with stubs(target.address) as (stub,):
            return {"statuses": await gather_statuses([stub.Generate(request(max_tokens=2)) for _ in range(20)], 30)}

    small = Attack(name="small", about="", run=attack)
    result = asyncio.run(attacks.measure(small, 0.5, tmp_path, (), bare=True))
    assert (result.name, result.seen) == ("small (bare)", {"statuses": {"OK": 20}})
    assert set(result.quiet["requests"]["counts"]) == {"OK"} and set(result.quiet["health"]["counts"]) == {"SERVING"}
    assert result.failed == 0 and result.recovered_s is not None
