"""Compiled functions are cached, and processes that need the same one at the same time compile it once."""

import os
import signal
import subprocess
import sys
from collections import Counter

import pytest

MODULE = """
import sys
import numpy as np
from numba.core import event
from expertwire.compiled import compiler

jit = compiler(__file__, _nrt=False)

@jit(inner=True)
def add(x, y):
    return x + y

@jit
def total(values):
    found = 0.0
    for value in values:
        found = add(found, value)
    return found

class Listener(event.Listener):
    def on_start(self, found):
        print(found.data["dispatcher"].py_func.__name__, flush=True)

    def on_end(self, found):
        pass

if __name__ == "__main__":
    event.register("numba:compile", Listener())
    print("ready", flush=True)
    sys.stdin.readline()
    print(total(np.arange(4.0)), flush=True)
"""


class Process:
    """An interpreter that calls `total` when told to."""

    def __init__(self, module, home):
        options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen([sys.executable, module], env=os.environ | {"HOME": str(home)}, **options)
        assert self._process.stdout.readline() == "ready\n"

    def go(self):
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def kill_while_it_compiles(self):
        assert self._process.stdout.readline() == "total\n"
        self._process.send_signal(signal.SIGKILL)
        self._process.communicate()

    def compiled(self):
        """Return the names of the functions that the process has compiled."""
        *names, result = self._process.communicate(timeout=120)[0].split()
        assert result == "6.0"
        return names


@pytest.fixture
def start(tmp_path):
    (module := tmp_path / "loops.py").write_text(MODULE)
    return lambda: Process(module, tmp_path)


def test_processes_at_once_compile_each_function_once_and_later_ones_nothing(start):
    together = [start() for _ in range(3)]
    for process in together:
        process.go()
    assert Counter(name for process in together for name in process.compiled()) == {"total": 1, "add": 1}
    later = start()
    later.go()
    assert later.compiled() == []


def test_a_killed_process_keeps_nobody_waiting(start):
    killed, waiting = start(), start()
    killed.go()
    killed.kill_while_it_compiles()
    waiting.go()
    assert "total" in waiting.compiled()


def test_what_has_changed_is_compiled_again(start, tmp_path):
    for change in ("", "1 * "):
        (tmp_path / "loops.py").write_text(MODULE.replace("x + y", f"x + {change}y"))
        process = start()
        process.go()
        assert sorted(process.compiled()) == ["add", "total"]


def test_a_function_for_compiled_code_alone_is_refused_from_python(start, tmp_path):
    code = "import loops; loops.add(1.0, 2.0)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, "loops.add can be called by compiled code only" in done.stderr) == (1, True), done.stderr
