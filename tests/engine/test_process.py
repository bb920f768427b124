"""Child processes: their place among others, and threads that do not interrupt others."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

from expertwire.engine import process


def policy_of_a_thread():
    found = []

    def note_theirs():
        grandchild = threading.Thread(target=lambda: found.append(os.sched_getscheduler(0)))
        grandchild.start()
        grandchild.join()

    thread = threading.Thread(target=note_theirs)
    thread.start()
    thread.join()
    return found[0]


def test_threads_that_do_not_interrupt_others():
    before = os.sched_getscheduler(0)
    with process.batch_threads():
        assert policy_of_a_thread() == os.SCHED_BATCH, "and those that they start"
    assert os.sched_getscheduler(0) == before
    assert policy_of_a_thread() == before


def test_where_priorities_may_not_be_changed(monkeypatch):
    def refuse(*_):
        raise PermissionError

    before = os.sched_getscheduler(0)
    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    with process.batch_threads():
        assert policy_of_a_thread() == before


def print_place():
    print(os.getsid(0), os.getpgid(0) == os.getpid(), flush=True)


def test_a_child_shares_the_session_but_not_the_terminals_signals():
    child = process.start_call("test_process:print_place", stdout=subprocess.PIPE)
    try:
        assert child.stdout.read().split() == [str(os.getsid(0)).encode(), b"True"]
    finally:
        process.stop_all([child], 10)
        child.stdout.close()


def test_a_process_that_only_computes_leaves_processors_to_others():
    code = """if True:
        import os, threading
        from expertwire.engine import process
        threading.Thread(target=threading.Event().wait, daemon=True).start()
        before = os.getpriority(os.PRIO_PROCESS, 0)
        process.lower_priority()
        print(before, *(os.getpriority(os.PRIO_PROCESS, int(thread)) for thread in os.listdir("/proc/self/task")))
    """
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout
    before, *after = map(int, found.split())
    assert len(after) >= 2
    assert set(after) == {max(before, 5)}
