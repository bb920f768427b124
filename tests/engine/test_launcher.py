"""Workers start without a guard in the user's script, are watched, and never outlive who started them."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from helpers.control_ranks import TOKEN, plan

from expertwire.comm.control.channel import ControlHub
from expertwire.engine import process
from expertwire.engine.launcher import LocalLauncher, RankFailed, WorkerSpec

pytestmark = pytest.mark.new_interpreters  # which are what is tested
WORKER = "helpers.control_ranks:worker_main"


@pytest.fixture
def engine():
    """A hub and a launcher, to be started by the test."""
    hub, launcher = ControlHub(2, token=TOKEN), LocalLauncher(WORKER)
    yield hub, launcher
    hub.close()
    launcher.stop(5)


def start(hub, launcher, **config):
    launcher.start(WorkerSpec(config=config, num_ranks=2, address=hub.address, token=TOKEN))


def join(hub, launcher):
    hellos = hub.wait_joined(60, launcher.poll)
    assert not any(hello["shadows"][0] for hello in hellos)
    return [psutil.Process(int(hello["pid"][0])) for hello in hellos]


def supervise(launcher):
    while True:
        launcher.poll()
        time.sleep(0.01)


def test_workers_join_answer_and_leave(engine):
    hub, launcher = engine
    start(hub, launcher)
    workers = join(hub, launcher)
    hub.publish(plan(1))
    assert [result["sum"][0] for result in hub.collect(30)] == [10, 10]
    launcher.poll()
    launcher.stop(5)
    assert not any(worker.is_running() for worker in workers)
    launcher.stop(5)


def test_a_killed_worker_is_named(engine):
    hub, launcher = engine
    start(hub, launcher)
    workers = join(hub, launcher)
    workers[1].kill()
    with pytest.raises(RankFailed, match=f"rank 1: worker process {workers[1].pid} was killed by SIGKILL") as failed:
        supervise(launcher)
    assert failed.value.rank == 1


def test_a_worker_that_cannot_start_is_named_while_the_others_are_awaited(engine, capfd):
    hub, launcher = engine
    start(hub, launcher, fail_at_start=1)
    with pytest.raises(RankFailed, match=r"rank 1: worker process \d+ exited with code 1"):
        join(hub, launcher)
    assert "RuntimeError: cannot start" in capfd.readouterr().err


def test_a_worker_stuck_with_every_signal_ignored_is_killed():
    child = process.start_call("test_launcher:hang_without_watchdog", stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"stuck\n"
    process.stop_all([child], 0.4, grace_s=0.1)
    assert child.returncode == -signal.SIGKILL


def hang_without_watchdog():
    """As a child that holds the interpreter's lock in C code for ever: neither the watchdog nor a handler runs."""
    signal.signal(signal.SIGTERM, lambda *_: None)
    print("stuck", flush=True)
    sys.setswitchinterval(1e9)
    while True:
        pass


def test_children_survive_ctrl_c(engine):
    hub, launcher = engine
    start(hub, launcher)
    for worker in join(hub, launcher):
        worker.send_signal(signal.SIGINT)
    hub.publish(plan(1))
    hub.collect(30)
    launcher.poll()


SCRIPT = """
import os, sys, time
from expertwire.comm.control.channel import ControlHub
from expertwire.engine.launcher import LocalLauncher, WorkerSpec

print("imported", flush=True)
sys.path.append({tests!r})
hub = ControlHub(2, token="t")
launcher = LocalLauncher({worker!r})
launcher.start(WorkerSpec(config={{}}, num_ranks=2, address=hub.address, token="t"))
pids = [int(hello["pid"][0]) for hello in hub.wait_joined(60, launcher.poll)]
if {fork} and os.fork() == 0:
    time.sleep(60)  # holds the other end of the lifelines, as a forked data loader would
    os._exit(0)
print(*pids, flush=True)
time.sleep({stay})
"""


@pytest.mark.parametrize(
    ("stay", "fork"), [(3600, False), (3600, True), (0, False)], ids=["kill", "kill, with a fork", "exit"]
)
def test_an_unguarded_script_can_start_workers_and_they_end_with_it(tmp_path, stay, fork):
    script = tmp_path / "script.py"
    tests = str(Path(__file__).parents[1])
    script.write_text(SCRIPT.format(tests=tests, worker=WORKER, stay=stay, fork=fork))
    parent = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout.readline() == "imported\n"
    workers = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
    forks = [child for child in psutil.Process(parent.pid).children() if child not in workers] if fork else []
    assert len(workers) == 2
    if stay:
        parent.kill()
    parent.wait(30)
    parent.stdout.close()
    _, alive = psutil.wait_procs(workers, 15)
    for leftover in forks:
        leftover.kill()
    assert not alive


def test_the_payload_arrives_as_it_was_and_standard_input_is_empty():
    payload = {"large": b"x" * 1_000_000, "nested": [1, (2, None)]}
    child = process.start_call("test_launcher:echo_payload", payload, stdout=subprocess.PIPE)
    assert child.stdout.read() == repr((len(repr(payload)), "")).encode() + b"\n"
    assert child.wait(30) == 0


def echo_payload(payload):
    """In a child."""
    print((len(repr(payload)), sys.stdin.read()))


def test_a_child_whose_parent_lets_go_ends_at_once():
    child = process.start_call("time:sleep", 3600)
    time.sleep(0.5)
    child.stdin.close()
    assert child.wait(30) == process.LIFELINE_EXIT_CODE


def test_exits_are_described():
    assert process.describe_exit(3) == "exited with code 3"
    assert process.describe_exit(-signal.SIGSEGV) == "was killed by SIGSEGV"
