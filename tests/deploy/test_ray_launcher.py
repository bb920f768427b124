"""Workers under Ray join, are watched, and are gone after `stop`; Ray too, if it was started here."""

import os
import socket
import subprocess
import time
from dataclasses import dataclass

import psutil
import pytest
import ray
from helpers.control_ranks import TOKEN, plan

from expertwire.comm.control.channel import ControlHub
from expertwire.deploy.ray.launcher import RayLauncher
from expertwire.engine import process
from expertwire.engine.launcher import RankFailed, WorkerSpec

WORKER = "helpers.control_ranks:worker_main"


@dataclass(frozen=True)
class Cuda:
    """A config that asks for GPUs."""

    device: str = "cuda"


@pytest.fixture(scope="module")
def owner():
    """The launcher that has started Ray: once for all tests here, because it takes seconds."""
    launcher = RayLauncher(worker=WORKER)
    launcher.connect()
    yield launcher
    launcher.stop(10)


@pytest.fixture
def engine(owner):
    """A hub and a launcher on the running Ray, to be started by the test."""
    launcher = RayLauncher(worker=WORKER)
    hub = ControlHub(3, address=launcher.hub_address(), token=TOKEN)
    yield hub, launcher
    hub.close()
    launcher.stop(10)


def start(hub, launcher, config=None):
    launcher.start(WorkerSpec(config=config or {}, num_ranks=3, address=hub.address, token=TOKEN))


def join(hub, launcher):
    hellos = hub.wait_joined(60, launcher.poll)
    assert not any(hello["shadows"][0] for hello in hellos)
    return [psutil.Process(int(hello["pid"][0])) for hello in hellos]


def supervise(launcher):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        launcher.poll()
        time.sleep(0.02)


def test_more_ranks_than_cores_join_answer_and_leave(engine):
    hub, launcher = engine
    start(hub, launcher)
    workers = join(hub, launcher)
    for step in range(10):
        hub.publish(plan(step))
        assert [result["sum"][0] for result in hub.collect(30)] == [10 * step] * 3
    launcher.poll()
    assert ray.available_resources().get("CPU", 0) < ray.cluster_resources()["CPU"]
    launcher.stop(10)
    assert not any(worker.is_running() for worker in workers)
    launcher.stop(10)


def test_a_killed_worker_is_named_with_its_process_and_host(engine):
    hub, launcher = engine
    start(hub, launcher)
    workers = join(hub, launcher)
    workers[1].kill()
    with pytest.raises(RankFailed, match=rf"rank 1: worker process {workers[1].pid} on [\d.]+ has died") as failed:
        supervise(launcher)
    assert failed.value.rank == 1


def test_a_worker_that_cannot_start_is_named_with_the_cause(engine):
    hub, launcher = engine
    start(hub, launcher, {"fail_at_start": 2})
    with pytest.raises(RankFailed, match=r"rank 2: worker process \d+ on [\d.]+ failed: cannot start"):
        join(hub, launcher)


def test_more_gpus_than_there_are_is_a_clear_error(engine):
    hub, launcher = engine
    with pytest.raises(ValueError, match="ep_size is 3, but the Ray cluster has 0 GPUs"):
        start(hub, launcher, Cuda())


@pytest.mark.slow
def test_stopping_the_launcher_that_started_ray_ends_it(owner):
    owner.connect()
    children = psutil.Process().children(recursive=True)
    ours = [
        child for child in children if child.status() != psutil.STATUS_ZOMBIE and "ray" in " ".join(child.cmdline())
    ]
    assert any("raylet" in child.name() for child in ours)
    owner.stop(10)
    owner.stop(10)
    assert not ray.is_initialized()
    _, alive = psutil.wait_procs(ours, 15)
    assert not alive


@pytest.mark.slow
def test_killing_the_process_that_started_ray_leaves_nothing():
    driver = process.start_call("test_ray_launcher:drive", stdout=subprocess.PIPE)
    assert driver.stdout.readline() == b"running\n"
    ours = psutil.Process(driver.pid).children(recursive=True)
    assert any("raylet" in child.name() for child in ours)
    driver.kill()
    driver.wait()
    driver.stdout.close()
    _, alive = psutil.wait_procs(ours, 30)
    assert not alive


def drive():
    """In a child: an engine that runs under a Ray of its own until it is killed."""
    launcher = RayLauncher(worker=WORKER)
    hub = ControlHub(3, address=launcher.hub_address(), token=TOKEN)
    start(hub, launcher)
    join(hub, launcher)
    print("running", flush=True)
    time.sleep(3600)


@pytest.mark.parametrize("address", ["host", "ray://host:10001", "host:port", ""])
def test_a_malformed_address_is_named(address):
    with pytest.raises(ValueError, match="ray_address"):
        RayLauncher(address)


def test_an_address_without_ray_is_a_clear_error_within_the_deadline():
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        # In a process of its own: Ray goes on trying in there.
        target = "test_ray_launcher:connect_in_vain"
        assert b"nothing answers there" in run_child(target, address)
        silent.listen()
        assert b"no Ray cluster answered within 2 s" in run_child(target, address)


def run_child(target, address):
    child = process.start_call(target, address, stdout=subprocess.PIPE)
    with child.stdout:
        said = child.stdout.read()
    process.stop_all([child], 1, grace_s=5)
    return said


def connect_in_vain(address):
    """In a child."""
    try:
        RayLauncher(address, connect_timeout_s=2).hub_address()
    except ValueError as error:
        print(error, flush=True)
    os._exit(0)
