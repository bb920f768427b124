"""Stages of `bench first_contact` that end in every way that a stage can end. None needs a GPU or Triton."""

import ctypes
import os
import subprocess
import sys
import time


def good(run):
    with run.record.item("first"):
        run.record.check("sum", True, "1 + 1 is 2")
        run.record.figure("speed", 90.0, "m/s", bar=100.0, source="a page")
    run.record.fact("colour", "green")


def wrong(run):
    run.record.check("sum", False, "1 + 1 is 3")


def fails(run):
    with run.record.item("one"):
        raise ZeroDivisionError("in the middle")
    with run.record.item("two"):
        run.record.check("two", True, "the stage goes on")


def segfault(run):
    """At one item of three."""
    for name in ("before", "at it", "after"):
        if run.record.wants(name):
            with run.record.item(name):
                if name == "at it":
                    ctypes.string_at(0)
                run.record.check(name, True, "")


def dies_at_once(run):
    print("last words")
    sys.stdout.flush()
    os._exit(7)


def hangs(run):
    """With a child, which must end too; its id is written down."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    with run.record.item("waiting"):
        run.record.fact("child", child.pid)
        time.sleep(1000)


def rubbish(run):
    """Into its output, and between its rows."""
    os.write(1, b"\xff\x00\x1b[31m" * 100_000)
    with run.record._file.open("ab") as file:
        file.write(b'not a row\n{"unknown": 1}\n\xff\xfe\n')


def slow(run):
    """Three items of a second; what has been done is not done again."""
    for name in ("one", "two", "three"):
        if run.record.wants(name):
            with run.record.item(name):
                time.sleep(1.0)
                run.record.check(name, True, str(os.getpid()))


def broken_device(run):
    """Every process after an error is of no use."""
    for name in ("one", "two"):
        if run.record.wants(name):
            with run.record.item(name, fatal=True):
                raise ValueError(name)
