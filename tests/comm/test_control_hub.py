"""Plans sent directly and forwarded by a rank of their node obey the same rules.

Messages of any size arrive in order, every lost rank is reported, and no process is left behind.
"""

import random
import select
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pytest
from helpers.control_ranks import TOKEN, joined, plan, start_rank

from expertwire.comm.control.channel import (
    ControlHub,
    ControlLink,
    RankError,
    RankLost,
    RankTimeout,
    this_node,
)
from expertwire.engine import process

# The hub's node is A. Local; remote; remote with a rank that forwards; both.
TOPOLOGIES = ["A", "AAA", "BC", "BBB", "ABBA"]
BIG = 1 << 18  # items of 8 bytes
BIG_ANSWER = 1 << 16


def check(results, step, size=10, answer=0):
    for rank, result in enumerate(results):
        assert result["step"][0] == step
        assert result["sum"][0] == step * size
        assert result["answer"].tolist() == [rank] * answer


def run(hub, steps):
    for step in range(steps):
        hub.publish(plan(step))
        check(hub.collect(60), step)


def idle(hub):
    while select.select(hub.filenos(), [], [], 20)[0]:
        hub.poll_lost()


@pytest.mark.parametrize("nodes", TOPOLOGIES)
def test_steps_of_any_size_arrive_in_order(nodes):
    sizes = [0, 10, BIG // 2, BIG, 10, BIG * 2, 10, BIG - 100, 0]
    answers = [0, BIG_ANSWER, 3, BIG_ANSWER * 8, 10, BIG_ANSWER - 50, BIG_ANSWER // 2]
    with joined(nodes) as (hub, _):
        for step in range(40):
            size, answer = sizes[step % len(sizes)], answers[step % len(answers)]
            hub.publish(plan(step, size, answer=answer))
            check(hub.collect(60), step, size, answer)


@pytest.mark.parametrize("nodes", TOPOLOGIES)
def test_plans_may_run_ahead_of_their_results(nodes):
    """Also by more than socket buffers hold, without deadlock."""
    size, ahead = BIG // 4, 12
    with joined(nodes) as (hub, _):
        for step in range(ahead):
            hub.publish(plan(step, size, answer=BIG_ANSWER // 3))
        for step in range(ahead, 40):
            check(hub.collect(60), step - ahead, size, BIG_ANSWER // 3)
            hub.publish(plan(step, size, answer=BIG_ANSWER // 3))
        for step in range(40 - ahead, 40):
            check(hub.collect(60), step, size, BIG_ANSWER // 3)


@pytest.mark.parametrize("nodes", ["AAA", "ABB"])
def test_thousands_of_steps_with_naps_on_both_sides(nodes):
    dice = random.Random(0)
    with joined(nodes) as (hub, _):
        for step in range(2000):
            hub.publish(plan(step, nap_us=150))
            if dice.random() < 0.5:
                time.sleep(dice.random() * 150e-6)
            check(hub.collect(60), step)


@pytest.mark.parametrize("node", ["A", "B"])
def test_a_look_without_waiting_sees_what_has_arrived(node):
    hub = ControlHub(1, token=TOKEN, node="A")
    joining = threading.Thread(target=hub.wait_joined, args=(20, lambda: None))
    joining.start()
    link = ControlLink(hub.address, TOKEN, rank=0, node=node, hello={})
    assert link.recv(0.2) is None
    joining.join()
    deadline = time.monotonic() + 20
    for step, size in enumerate([10, BIG, 10]):
        hub.publish(plan(step, size))
        while (got := link.recv(0.0)) is None:
            hub.poll_lost()  # sends what is left of a large one
            assert time.monotonic() < deadline, f"step {step} does not arrive"
        assert got["step"][0] == step
    assert link.recv(0.0) is None
    link.close()
    hub.close()


@pytest.mark.parametrize(("nodes", "victim"), [("AA", 1), ("BB", 0), ("BB", 1), ("ABC", 2), ("ABC", 0)])
def test_a_killed_rank_is_named_while_others_are_waited_for(nodes, victim):
    with joined(nodes) as (hub, workers):
        run(hub, 1)
        hub.publish(plan(1, die=victim))
        with pytest.raises(RankLost, match=f"rank {victim} ") as lost:
            hub.collect(60)
        assert lost.value.rank == victim
        assert workers[victim].wait(10) == -signal.SIGKILL


@pytest.mark.parametrize(("nodes", "victim"), [("AA", 1), ("BB", 1), ("B", 0)])
def test_an_idle_controller_notices_a_dead_rank_in_its_select(nodes, victim):
    with joined(nodes) as (hub, workers):
        run(hub, 1)
        hub.poll_lost()
        workers[victim].kill()
        with pytest.raises(RankLost) as lost:
            idle(hub)
        assert lost.value.rank == victim


def test_publishing_to_a_dead_rank_ends_in_rank_lost():
    with joined("AB") as (hub, workers):
        workers[1].kill()
        workers[1].wait()
        with pytest.raises(RankLost, match="rank 1 "):
            run(hub, 1000)


@pytest.mark.parametrize("nodes", ["AA", "BB"])
def test_a_rank_that_does_not_answer_is_named(nodes):
    with joined(nodes) as (hub, _):
        hub.publish(plan(0, hang=1))
        with pytest.raises(RankTimeout, match="rank 1 did not answer within") as missing:
            hub.collect(0.5)
        assert missing.value.ranks == (1,)


@pytest.mark.parametrize("nodes", ["AAA", "BBB"])
def test_a_rank_that_fails_is_quoted_while_others_are_waited_for(nodes):
    with joined(nodes) as (hub, _):
        hub.publish(plan(0, fail=1, hang=2))
        with pytest.raises(RankError, match="out of luck") as failed:
            hub.collect(60)
        assert failed.value.rank == 1


@pytest.mark.parametrize("nodes", ["AA", "BB"])
def test_a_rank_that_leaves_is_lost(nodes):
    with joined(nodes) as (hub, _):
        hub.publish(plan(0, quit=1))
        with pytest.raises(RankLost, match="rank 1 "):
            hub.collect(20)


@pytest.mark.parametrize("nodes", ["AAA", "BBB", "ABB"])
def test_ranks_exit_when_the_hub_closes(nodes):
    with joined(nodes) as (hub, workers):
        hub.publish(plan(0))
        hub.collect(60)
        hub.close()
        hub.close()
        assert [worker.wait(20) for worker in workers] == [0] * len(nodes)


def test_hellos_come_back_by_rank():
    hub = ControlHub(3, token=TOKEN)
    workers = [start_rank({}, rank, 3, hub.address) for rank in (2, 0, 1)]
    try:
        hellos = hub.wait_joined(60, lambda: None)
        assert [hello["pid"].tolist() for hello in hellos] == [[workers[index].pid] for index in (1, 2, 0)]
        assert all(set(hello) == {"pid", "node", "shadows", "gpu", "visible"} for hello in hellos)
    finally:
        hub.close()
        process.stop_all(workers, 5)


def test_missing_ranks_are_named_at_the_deadline():
    hub = ControlHub(3, token=TOKEN, node="A")
    with ThreadPoolExecutor(1) as thread:
        linking = thread.submit(ControlLink, hub.address, TOKEN, rank=1, node="A", hello={})
        with pytest.raises(RankTimeout, match="ranks 0, 2 did not connect"):
            hub.wait_joined(1.0, lambda: None)
    linking.result().close()
    hub.close()


def test_a_rank_that_dies_while_others_are_awaited_is_lost():
    hub = ControlHub(2, token=TOKEN, node="A")
    with ThreadPoolExecutor(1) as thread:
        thread.submit(lambda: ControlLink(hub.address, TOKEN, rank=1, node="A", hello={}).close())
        with pytest.raises(RankLost, match="rank 1 "):
            hub.wait_joined(10, lambda: None)
    hub.close()


def test_joining_calls_poll_which_may_raise():
    def supervise():
        raise RuntimeError("worker process 5 died")

    hub = ControlHub(1, token=TOKEN)
    with pytest.raises(RuntimeError, match="worker process 5 died"):
        hub.wait_joined(10, supervise)
    hub.close()


def test_a_rank_with_a_wrong_token_is_refused_with_an_error():
    hub = ControlHub(1, token=TOKEN)
    with ThreadPoolExecutor(1) as thread:
        linking = thread.submit(ControlLink, hub.address, "guessed", rank=0, node="A", hello={})
        with pytest.raises(RankTimeout):
            hub.wait_joined(0.3, lambda: None)
        with pytest.raises(OSError, match="another token"):
            linking.result()
    hub.close()


def test_link_recv_returns_none_after_its_timeout_before_and_after_joining():
    hub = ControlHub(1, token=TOKEN, node="A")
    hellos = []
    joiner = threading.Thread(target=lambda: hellos.extend(hub.wait_joined(10, lambda: None)))
    joiner.start()
    link = ControlLink(hub.address, TOKEN, rank=0, node="B", hello={"n": np.array([1])})
    assert link.local_ip == "127.0.0.1"
    while joiner.is_alive():
        assert link.recv(0.05) is None
    assert hellos[0]["n"][0] == 1
    hub.publish(plan(3))
    assert link.recv(5)["step"][0] == 3
    link.close()
    hub.close()


@pytest.mark.parametrize("config", [{}, {"nodes": "BB"}], ids=["local", "relayed"])
def test_killing_the_controller_leaves_no_process(config):
    controller = process.start_call("helpers.control_ranks:controller_main", 2, config, stdout=subprocess.PIPE)
    ranks = [psutil.Process(int(pid)) for pid in controller.stdout.readline().split()]
    assert len(ranks) == 2
    controller.kill()
    controller.wait()
    controller.stdout.close()
    _, alive = psutil.wait_procs(ranks, 10)
    assert not alive


def test_this_node_is_one_per_host():
    assert process.start_call("test_control_hub:assert_same_node", this_node()).wait(30) == 0
    assert process.start_call("test_control_hub:assert_same_node", "another").wait(30) == 1


def assert_same_node(node):
    assert this_node() == node
