"""`python -m expertwire.bench attacks`: what hostile clients and other users of the machine do to a server and its good clients.

Each attack has a server of its own, on the demo model with two ranks unless it needs another, and a good client beside
it. First the good client is alone for some seconds, then it is attacked, then the server has some time to recover.
Arguments after `--` go to `expertwire serve`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import grpc

from expertwire.bench.attacks import all_at_once, models
from expertwire.bench.attacks.attack import Attack
from expertwire.bench.attacks.good_client import GoodClient
from expertwire.bench.attacks.registry import ATTACKS
from expertwire.bench.attacks.server import Server
from expertwire.bench.attacks.target import Sample, Target, Watch
from expertwire.bench.machine import processor
from expertwire.deploy.grpc.event_loop import GrpcEventLoop

_WARM_UP_S = 2.0
_QUIET_S = 5.0
_GRACE_S = 75.0  # beyond its seconds, after which an attack is ended
_RECOVERY_S = 20.0
_RECOVERY_STEP_S = 2.0
_LONG = ("methods", "examples", "attackers", "each_s")  # what was seen that is not in the line of a result
_ERRORS = 2_000  # characters of standard error that are kept


@dataclass(frozen=True, kw_only=True)
class Result:
    """The observations of an attack.

    Attributes:
        name: of the attack.
        seconds: how long it took.
        quiet: figures of the good client before the attack.
        good: figures of the good client during the attack; see `good_client`.
        seen: what the attacker saw.
        before, peak, after: what the server's processes held; the last after it has had time to recover.
        recovered_s: seconds after which the good client was served again and nothing more was held than before, but memory; None:
            not within 20 s.
        errors: end of what the server wrote to standard error.
    """

    name: str
    seconds: float
    quiet: dict[str, Any]
    good: dict[str, Any]
    seen: Mapping[str, Any]
    before: Sample
    peak: Sample
    after: Sample
    recovered_s: float | None
    errors: str

    @property
    def failed(self) -> int:
        """Requests of the good client that failed."""
        return self._others("requests", "OK")

    def _others(self, what: str, expected: str) -> int:
        return sum(count for how, count in self.good[what]["counts"].items() if how != expected)

    def line(self) -> str:
        """Return the result in one line."""
        good, total = self.good, sum(self.good["requests"]["counts"].values())
        connections = sum(good["connections"]["counts"].values())
        health = ", ".join(f"{how} {n}" for how, n in good["health"]["counts"].items())
        recovered = "no" if self.recovered_s is None else f"after {self.recovered_s:.0f} s"
        seen = {name: value for name, value in self.seen.items() if name not in _LONG}
        return (
            f"{self.name}: good client's longest pause {self.quiet['requests']['longest_ms']:,.0f} -> "
            f"{good['requests']['longest_ms']:,.0f} ms, {self.failed} of {total} failed; health {health or 'silent'}, longest "
            f"{good['health']['longest_ms']:,.0f} ms; {self._others('connections', 'SERVING')} of {connections} new connections "
            f"failed; memory +{self.peak.front_mib - self.before.front_mib:,.0f} MiB "
            f"(ranks +{self.peak.ranks_mib - self.before.ranks_mib:,.0f}); descriptors {self.before.descriptors} -> "
            f"{self.peak.descriptors} -> {self.after.descriptors}; processes {self.before.processes} -> "
            f"{self.after.processes}; recovered {recovered}; {json.dumps(seen)}"
        )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"error: {message} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(2)


def _seconds(text: str) -> float:
    if not (text.replace(".", "", 1).isdecimal() and float(text) > 0):
        raise argparse.ArgumentTypeError(f"must be a number of seconds above 0, got {text}")
    return float(text)


def make_parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    names = "\n".join(f"  {attack.name:<18}{attack.about}" for attack in ATTACKS.values())
    parser = _Parser(
        prog="python -m expertwire.bench attacks",
        description=f"{__doc__}\nattacks:\n{names}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="attacks to run (default: all)")
    parser.add_argument("--seconds", type=_seconds, metavar="S", help="length of each attack (default: its own)")
    parser.add_argument("--repeat", type=int, default=1, metavar="N", help="how often (default: %(default)s)")
    parser.add_argument(
        "--all-at-once", type=_seconds, metavar="S", help="run those that can share a server together, for S seconds"
    )
    parser.add_argument(
        "--niceness",
        type=int,
        choices=range(20),
        default=0,
        metavar="N",
        help="of attackers with --all-at-once, 0 to 19",
    )
    parser.add_argument(
        "--bare", action="store_true", help="attack a gRPC server that does nothing; for attacks that only generate"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was seen there, after each attack")
    return parser


def run(argv: Sequence[str]) -> int:
    """Run the command; return 0, or 2 for a wrong option."""
    own, _, serve_args = "\0".join(argv).partition("\0--\0") if "--" in argv else ("\0".join(argv), "", "")
    args = make_parser().parse_args([word for word in own.split("\0") if word])
    if unknown := [name for name in args.names if name not in ATTACKS]:
        print(f"error: there is no attack {unknown[0]!r}; there are {', '.join(ATTACKS)}", file=sys.stderr)
        return 2
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limits[1], limits[1]))
    extra = tuple(serve_args.split("\0")) if serve_args else ()
    if args.all_at_once and args.seconds:
        print("error: --all-at-once says how long; --seconds is for attacks one after another", file=sys.stderr)
        return 2
    if args.niceness and not args.all_at_once:
        print("error: --niceness needs --all-at-once, whose attackers are processes of their own", file=sys.stderr)
        return 2
    chosen = [ATTACKS[name] for name in args.names or ATTACKS]
    if args.all_at_once:
        if alone := [attack.name for attack in chosen if args.names and not attack.joins]:
            print(f"error: --all-at-once cannot run {alone[0]!r}, which needs a server of its own", file=sys.stderr)
            return 2
        chosen = [all_at_once.all_at_once([attack for attack in chosen if attack.joins], args.niceness)]
    wanted = chosen * args.repeat
    seconds = [args.all_at_once or args.seconds or attack.seconds for attack in wanted]
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for attack, length in zip(wanted, seconds, strict=True):
            load = os.getloadavg()
            try:
                with asyncio.Runner(loop_factory=GrpcEventLoop) as runner:
                    result = runner.run(measure(attack, length, Path(folder), extra, bare=args.bare))
            except RuntimeError as error:
                print(f"{attack.name}: not measured: {error}", flush=True)
                results.append({"name": attack.name, "not_measured": str(error)})
            else:
                print(result.line(), flush=True)
                results.append({**asdict(result), "load_average": [round(value, 1) for value in load]})
            if args.json:
                args.json.write_text(json.dumps({**_machine(extra), "results": results}, indent=1) + "\n")
    return 0


async def measure(attack: Attack, seconds: float, folder: Path, extra: Sequence[str], *, bare: bool = False) -> Result:
    """Attack a server.

    Args:
        attack: the attack.
        seconds: how long.
        folder: for checkpoints.
        extra: further options of `expertwire serve`.
        bare: attack a server that does nothing.

    Raises:
        RuntimeError: the server did not start.
    """
    model = None if bare else models.folder_of(attack.model, folder)
    arguments = (*attack.serve_args, *extra)
    with (
        Server(model, arguments, descriptors=attack.descriptors) as server,
        GoodClient(server.target.address, attack.good_interval_s) as client,
    ):
        await asyncio.sleep(_WARM_UP_S)
        await client.take()
        await asyncio.sleep(_QUIET_S)
        quiet, began = await client.take(), time.monotonic()
        with Watch(server.target) as watch:
            try:
                async with asyncio.timeout(seconds + _GRACE_S):
                    seen = await attack.run(server.target, seconds)
            except TimeoutError:
                seen = {"ended": f"by the time limit of {seconds + _GRACE_S:g} s"}
            except (OSError, grpc.RpcError) as error:
                seen = {"ended": repr(error)[:200]}
            length = time.monotonic() - began
            good = await client.take()
            before = watch.samples[0]
            recovered_s = await _recovery(server.target, client, before)
        return Result(
            name=f"{attack.name} (bare)" if bare else attack.name,
            seconds=round(length, 1),
            quiet=quiet,
            good=good,
            seen=seen,
            before=before,
            peak=watch.peak(),
            after=server.target.sample(),
            recovered_s=recovered_s,
            errors=server.log()[-_ERRORS:],
        )


async def _recovery(server: Target, client: GoodClient, before: Sample) -> float | None:
    """Wait until the good client is served and the server holds no more than before; return the seconds, or None."""
    began = time.monotonic()
    while time.monotonic() < began + _RECOVERY_S:
        await client.take()
        await asyncio.sleep(_RECOVERY_STEP_S)
        figures, now = await client.take(), server.sample()
        served = all(set(figures[name]["counts"]) == {how} for name, how in (("requests", "OK"), ("health", "SERVING")))
        if served and now.descriptors <= before.descriptors and now.processes == before.processes:
            return time.monotonic() - began
    return None


def _machine(serve_args: Sequence[str]) -> dict[str, Any]:
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    )
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
        "serve_args": list(serve_args),
    }
