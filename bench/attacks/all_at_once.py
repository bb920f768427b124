"""All attacks that can share a server, together, each in a process of its own so that none waits for another's loop.

A process is `python -m expertwire.bench.attacks.all_at_once NAME ADDRESS PID SECONDS NICENESS`. It says that it is ready, waits
for a line, repeats its attack until the time is over, whatever the server answers, gives up what it is doing then, and writes
what it has seen as one line of JSON.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from asyncio.subprocess import Process
from collections.abc import Sequence
from typing import Any

import grpc

from expertwire.bench.attacks import models
from expertwire.bench.attacks.attack import Attack
from expertwire.bench.attacks.target import Target
from expertwire.deploy.grpc.event_loop import GrpcEventLoop

NAME = "all_at_once"
_QUEUE = ("--max-queued-requests-per-tenant", "2048")  # half of the queue, which the attackers would fill
_AFTER_FAILURE_S = 0.2
_STOP_S = 20.0  # for an attacker to end after its time


def all_at_once(attacks: Sequence[Attack], niceness: int = 0) -> Attack:
    """Return an attack of all of them together, on the model that all can use.

    Args:
        attacks: the attacks.
        niceness: of the attackers' processes; with 19 they get the processor time that the server leaves, which is nearer to
            clients on other machines.
    """

    async def together(server: Target, seconds: float) -> dict[str, Any]:
        attackers = await asyncio.gather(*(_start(attack.name, server, seconds, niceness) for attack in attacks))
        try:
            await asyncio.gather(*(attacker.stdout.readline() for attacker in attackers if attacker.stdout))
            reports = await asyncio.gather(*(_report(attacker, seconds) for attacker in attackers))
        finally:
            for attacker in attackers:
                if attacker.returncode is None:
                    attacker.kill()
                    await attacker.wait()
        seen = {attack.name: report for attack, report in zip(attacks, reports, strict=True)}
        return {
            "rounds": {name: f"{report['rounds']}+{report['failed']}" for name, report in seen.items()},
            "niceness": niceness,
            "attackers_processor_s": round(sum(report["processor_s"] for report in reports), 1),
            "attackers": seen,
        }

    return Attack(
        name=NAME,
        about="all that can share a server; rounds are those that ended and those that failed",
        run=together,
        model="long",
        serve_args=(*models.LONG_ARGS, "--scheduling-policy", "fair", *_QUEUE),
    )


async def _start(name: str, server: Target, seconds: float, niceness: int) -> Process:
    options = [name, server.address, str(server.process.pid), str(seconds), str(niceness)]
    command = [sys.executable, "-m", __name__, *options]
    return await asyncio.create_subprocess_exec(*command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


async def _report(attacker: Process, seconds: float) -> dict[str, Any]:
    """Let an attacker begin; return its report when it has ended."""
    try:
        output, _ = await asyncio.wait_for(attacker.communicate(b"\n"), seconds + _STOP_S)
        report: dict[str, Any] = json.loads(output)
    except (TimeoutError, ValueError) as error:
        report = {"rounds": 0, "failed": 1, "processor_s": 0.0, "last": {"ended": f"without a report: {error!r}"}}
    return report


async def repeat(attack: Attack, server: Target, seconds: float) -> dict[str, Any]:
    """Attack again and again; return the number of rounds that ended and of those that failed, and what the last one saw."""
    rounds, failed, last = 0, 0, dict[str, Any]()
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        try:
            async with asyncio.timeout(left):
                last = dict(await attack.run(server, min(left, attack.seconds)))
            rounds += 1
        except TimeoutError:
            if time.monotonic() >= end:
                break
            failed += 1
        except (OSError, grpc.RpcError) as error:
            last, failed = {"failed": repr(error)[:200]}, failed + 1
            await asyncio.sleep(_AFTER_FAILURE_S)
    return {"rounds": rounds, "failed": failed, "processor_s": round(time.process_time(), 1), "last": last}


def _main(name: str, address: str, pid: str, seconds: str, niceness: str) -> None:
    from expertwire.bench.attacks.registry import ATTACKS

    os.setpriority(os.PRIO_PROCESS, 0, int(niceness))  # threads that gRPC starts later inherit it
    attack, server = ATTACKS[name], Target(address, int(pid))
    print("ready", flush=True)
    sys.stdin.readline()
    with asyncio.Runner(loop_factory=GrpcEventLoop) as runner:
        report = runner.run(repeat(attack, server, float(seconds)))
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    _main(*sys.argv[1:])
