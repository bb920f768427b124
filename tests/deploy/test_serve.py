"""`expertwire serve` as a process: signals, vanishing clients, a killed rank, nothing left behind. Serves the demo model."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter

import psutil
import pytest

from expertwire.deploy.demo_task import check, make_problem
from expertwire.deploy.grpc.client import Client, ServerError
from expertwire.deploy.grpc.grpc_verifier import VerifierServer
from expertwire.deploy.tenants import make_token

ENDLESS = {"ignore_eos": True, "max_tokens": 1900}


class Served:
    """A running server, its process and its children at the start."""

    def __init__(self, process, address):
        self.process = process
        self.address = address
        self.children = psutil.Process(process.pid).children(recursive=True)

    def end(self, number=signal.SIGTERM):
        """Signal it; its exit code, when it and all its children are gone."""
        self.process.send_signal(number)
        code = self.process.wait(60)
        _, left = psutil.wait_procs(self.children, timeout=10)
        assert not left
        return code


@contextlib.contextmanager
def serve(*options):
    command = [
        sys.executable,
        "-m",
        "expertwire.deploy.cli",
        "serve",
        "--port",
        "0",
        "--threads-per-rank",
        "1",
        *options,
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        assert line.startswith("serving demo_model on "), process.stderr.read()
        assert re.match(
            r"the caches of a rank, in \w+, hold [\d,]+ tokens: full [\d,.]+ MB\n", process.stdout.readline()
        )
        yield Served(process, line.split()[-1])
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


def gone(process):
    """Return whether it has ended, even if its parent has not looked yet."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def server():
    """One for the tests that leave it as it was; drains and exits with 0."""
    with serve("--max-queued-requests", "2", "--max-num-seqs", "4") as served:
        yield served
        assert served.end() == 0


@pytest.fixture
def client(server):
    with Client(server.address) as client:
        yield client


def test_answers_over_grpc_are_right(client):
    assert client.is_serving()
    for seed in range(3):
        problem = make_problem("SUM", 2, seed)
        generation = client.generate(problem.prompt, temperature=0, max_tokens=64)
        assert check(problem, "".join(chunk.text for chunk in generation))
        assert generation.usage.prompt_tokens == 4
    stats = client.stats()
    assert stats["num_running"] == 0
    assert [len(tokens) for tokens in stats["expert_load"]] == [8] * 3
    assert all(sum(tokens) > 0 for tokens in stats["expert_load"])


OWN = """
from dataclasses import dataclass
from expertwire.strategies import BestOfN, Needs, Selection
from expertwire.strategies.base import Start
from expertwire.deploy.demo_verifiers import outcome

@dataclass(frozen=True)
class Only:
    count: int
    needs = Needs()
    def decide(self, group): return [] if group.branches else [Start(self.count)]
    def select(self, group): return Selection(branches=(self.count - 1,), reason="the last")

STRATEGIES = {"only": Only}
VERIFIERS = {"exact": outcome}
"""


def test_a_module_s_strategies_and_the_verifier_of_a_service(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(OWN)
    problem = make_problem("SUM", 4, 1)
    with VerifierServer(lambda candidates: [len(each.token_ids) for each in candidates]) as service:
        length = f"length=127.0.0.1:{service.port}"
        with serve("--strategies", str(path), "--verifier", length) as served, Client(served.address) as client:
            assert list(client.model_info()["verifiers"]) == ["exact", "length"]
            generation = client.generate(problem.prompt, strategy={"strategy": "only", "count": 3}, max_tokens=8)
            assert {chunk.branch for chunk in generation} == {2}
            for verifier, score in (("exact", lambda text, _: check(problem, text)), ("length", lambda _, num: num)):
                strategy = {"strategy": "best_of_n", "n": 4, "verifier": verifier}
                generation = client.generate(
                    problem.prompt, strategy=strategy, all_branches=True, max_tokens=64, seed=1
                )
                texts, nums = Counter(), Counter()
                for chunk in generation:
                    texts[chunk.branch] = (texts[chunk.branch] or "") + chunk.text
                    nums[chunk.branch] += len(chunk.token_ids)
                branches = generation.group.branches
                assert [branch.score for branch in branches] == [score(texts[i], nums[i]) for i in range(4)]
            assert served.end() == 0


def test_clients_that_leave_free_their_blocks(client):
    for leave in ("close", "abort"):
        generation = client.generate("SUM 1 2 ?", request_id=leave, **ENDLESS)
        chunks = iter(generation)
        next(chunks)
        assert sum(client.stats()["running"]) == 1
        if leave == "close":
            generation.close()
        else:
            client.abort(leave)
            assert list(chunks)[-1].finish_reason == "abort"
        until(lambda: client.stats()["num_running"] == 0)
    assert sum(sum(used) for used in client.stats()["blocks_used"].values()) == 0


def test_a_full_queue_is_an_answer(client):
    streams = []
    for _ in range(4):
        streams.append(iter(client.generate("SUM 1 2 ?", **ENDLESS)))
        next(streams[-1])
    last = threading.Thread(target=lambda: list(client.generate("SUM 1 2 ?", max_tokens=1)))
    last.start()
    until(lambda: client.stats()["num_waiting"] == 1)
    with pytest.raises(ServerError, match="try later") as caught:
        list(client.generate("SUM 1 2 ?", n=2))
    assert caught.value.code == "RESOURCE_EXHAUSTED"
    for stream in streams:
        stream.close()
    last.join()
    until(lambda: client.stats()["num_running"] == 0)


def test_a_signal_drains():
    with serve("--log-level", "debug") as served, Client(served.address) as client:
        chunks = iter(client.generate("SUM 1 2 ?", request_id="mine", ignore_eos=True, max_tokens=100))
        next(chunks)
        served.process.send_signal(signal.SIGTERM)
        until(lambda: not client.is_serving())
        with pytest.raises(ServerError, match=r"UNAVAILABLE.*draining"):
            list(client.generate("SUM 1 2 ?"))
        assert list(chunks)[-1].finish_reason == "length"
        assert served.process.wait(60) == 0
        said = served.process.stderr.read()
        assert re.match(r"starting demo_model on 1 rank: loading [\d.]+ GB of weights, and compiling", said)
        assert "request 'mine' of tenant '' begins\n" in said
        assert "request 'mine' of tenant '' ends: 4 prompt tokens (0 cached), 100 output\n" in said


@pytest.mark.slow
def test_a_second_signal_ends_at_once():
    with serve("--drain-timeout", "600") as served, Client(served.address) as client:
        chunks = iter(client.generate("SUM 1 2 ?", ignore_eos=True, max_tokens=1900))
        next(chunks)
        served.process.send_signal(signal.SIGINT)
        until(lambda: not client.is_serving())
        assert served.end(signal.SIGINT) == 128 + signal.SIGINT
        with pytest.raises(ServerError):
            list(chunks)


def test_a_killed_rank_ends_its_streams_and_is_named():
    with serve("--ep-size", "2", "--launcher", "local") as served, Client(served.address) as client:
        chunks = iter(client.generate("SUM 1 2 ?", **ENDLESS))
        next(chunks)
        controller, *ranks, front = sorted(served.children, key=lambda child: (child.create_time(), child.pid))
        ranks[1].kill()
        with pytest.raises(ServerError, match="rank 1") as caught:
            list(chunks)
        assert caught.value.code == "UNAVAILABLE"
        until(lambda: not client.is_serving())
        with pytest.raises(ServerError, match="rank 1"):
            list(client.generate("SUM 1 2 ?"))
        # The server answers for a while, so that whoever watches its health can tell, and then ends by itself.
        assert served.process.wait(60) == 1
        assert all(gone(child) for child in (controller, *ranks, front))
        assert "rank 1" in served.process.stderr.read()


def children_in_order(served):
    """Controller, ranks and fronts; a front has children of its own."""
    mine = [child for child in served.children if child.ppid() == served.process.pid]
    return sorted(mine, key=lambda child: (child.create_time(), child.pid))


def test_a_front_that_ends_or_freezes_is_replaced_and_the_others_go_on():
    with serve("--launcher", "local", "--fronts", "2") as served:
        *_, first, second = children = children_in_order(served)
        first.kill()
        second.suspend()  # the kernel goes on giving it connections, until it is killed
        until(lambda: gone(second))
        until(lambda: len(psutil.Process(served.process.pid).children()) == len(children))

        def answers():
            with contextlib.suppress(ServerError), Client(served.address) as client:
                return "".join(chunk.text for chunk in client.generate("SUM 1 2 ?", temperature=0, max_tokens=4))

        until(answers)
        assert served.end() == 0


@pytest.mark.parametrize("place", [pytest.param(0, marks=pytest.mark.slow), 1], ids=["controller", "rank"])
def test_a_frozen_process_is_noticed_by_health_checks(place):
    with serve("--launcher", "local") as served, Client(served.address) as client:
        frozen = children_in_order(served)[place]
        frozen.suspend()
        until(lambda: not client.is_serving())
        frozen.resume()
        until(client.is_serving)
        assert list(client.generate("SUM 1 2 ?", max_tokens=2))


@pytest.mark.slow
def test_other_machines_reach_no_port_of_a_local_engine():
    with serve("--launcher", "local", "--ep-size", "2") as served:
        family = [psutil.Process(served.process.pid), *psutil.Process(served.process.pid).children(recursive=True)]
        ports = [each for process in family for each in process.net_connections("tcp") if each.status == "LISTEN"]
        assert {each.laddr.ip for each in ports} <= {"127.0.0.1", "::ffff:127.0.0.1"}
        assert int(served.address.rpartition(":")[2]) in {each.laddr.port for each in ports}


@pytest.mark.slow
def test_tenants_and_quotas_of_the_file(tmp_path):
    tokens = {name: make_token() for name in ("alice", "bob")}
    file = tmp_path / "tenants.toml"
    file.write_text(
        "[default]\nmax_requests = 1\n"
        + "".join(f'[tenants.{name}]\ntokens = ["{digest}"]\n' for name, (_, digest) in tokens.items())
    )
    with (
        serve("--tenants", str(file)) as served,
        Client(served.address, token=tokens["alice"][0]) as alice,
        Client(served.address, token=tokens["bob"][0]) as bob,
    ):
        chunks = iter(alice.generate("SUM 1 2 ?", **ENDLESS))
        next(chunks)
        with pytest.raises(ServerError, match=r"RESOURCE_EXHAUSTED.*max_requests"):
            list(alice.generate("SUM 1 2 ?", max_tokens=2))
        assert list(bob.generate("SUM 1 2 ?", max_tokens=2))
        file.write_text(file.read_text().replace(tokens["bob"][1], make_token()[1]))
        until(lambda: _code(bob) == "UNAUTHENTICATED")
        assert next(chunks)


def _code(client):
    """Return the status of a call."""
    try:
        client.model_info()
    except ServerError as error:
        return error.code
    return "OK"


@pytest.mark.slow
def test_a_signal_while_it_starts_leaves_nothing():
    command = [sys.executable, "-m", "expertwire.deploy.cli", "serve", "--port", "0", "--ep-size", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        parent = psutil.Process(process.pid)
        until(lambda: len(parent.children()) >= 2)
        children = parent.children(recursive=True)
        process.terminate()
        assert process.wait(60) == 128 + signal.SIGTERM
        assert process.stdout.read() == b""
        _, left = psutil.wait_procs(children, timeout=10)
        assert not left
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
