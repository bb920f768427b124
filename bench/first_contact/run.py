"""`python -m expertwire.bench first_contact`: all that the first half an hour on a GPU needs, whatever fails.

Stages run in the order of their value, each in a process of its own with a time limit, so that a crash or a hang loses
one item of one stage. Results are in DIR/first_contact.json after each; a later call with the same DIR runs what is
missing, was cut or has failed, and `--stages` names some to run (again). Where there is no GPU the GPU's kernels are
interpreted on toy sizes, which shows that the command works, and no figure is taken.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from expertwire.bench.first_contact import report, stage_supervisor
from expertwire.bench.first_contact.stage_record import NOT_RUN

NAME = "first_contact.json"
_MODULE = "expertwire.bench.first_contact.stages"
_LEAST_SHARE = 0.25  # of a stage's time, in less than which it is not worth starting
_LEAST_S = 10.0  # likewise, on a CPU
_KEPT = ("passed", NOT_RUN, "wrong")  # verdicts of stages that have done all they can


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of the run.

    Args:
        name: by which it is chosen.
        target: "module:function", called with a `stage_process.Run`.
        seconds: after which it has hung, on a GPU.
    """

    name: str
    target: str
    seconds: float


def _stage(name: str, seconds: float) -> Stage:
    return Stage(name=name, target=f"{_MODULE}:{name}", seconds=seconds)


STAGES = (
    _stage("environment", 60),
    _stage("tokens", 240),
    _stage("kernels_correct", 150),
    _stage("engine", 300),
    _stage("kernels_timed", 220),
    _stage("kernels_bits", 100),
    _stage("exchange", 180),
    _stage("serve", 150),
    _stage("engine_gpt_oss", 180),
    _stage("flashinfer", 90),
    _stage("kernels_timed_more", 240),
)
_CPU_SECONDS = 300.0  # of a stage


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"error: {message} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(2)


def make_parser(stages: Sequence[Stage] = STAGES) -> argparse.ArgumentParser:
    """Return the parser of the command's options."""
    parser = _Parser(
        prog="python -m expertwire.bench first_contact",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("first_contact"),
        metavar="DIR",
        help="folder for the results (default: %(default)s)",
    )
    names = ", ".join(stage.name for stage in stages)
    parser.add_argument("--stages", metavar="NAME,...", help=f"these only, also if they have results: {names}")
    parser.add_argument(
        "--budget", type=float, default=560.0, metavar="SECONDS", help="that this call may take (default: %(default)s)"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda if there is one; cpu interprets")
    return parser


def run(argv: Sequence[str], stages: Sequence[Stage] = STAGES) -> int:
    """Run the command and return the exit code: 0 if all of its stages have passed or have nothing to do here, 1 if not, 2 for
    a wrong option."""
    args = make_parser(stages).parse_args(argv)
    try:
        return main(args, stages)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def main(args: argparse.Namespace, stages: Sequence[Stage]) -> int:
    """Run stages, write results, print the report.

    Raises:
        ValueError: an option is wrong.
        OSError: the folder cannot be written.
    """
    until = time.time() + args.budget
    device = args.device or _found_device()
    args.out.mkdir(parents=True, exist_ok=True)
    results = open_results(args.out / NAME, device)
    chosen = choose(args.stages, stages, results)
    for stage in chosen:
        limit = stage.seconds if device == "cuda" else _CPU_SECONDS
        if until - time.time() < (_LEAST_SHARE * limit if device == "cuda" else _LEAST_S):
            continue
        print(f"{stage.name} ...", flush=True)
        again = args.stages is not None
        found = run_stage(stage, args.out, device, limit, until, again=again)
        results["stages"][stage.name] = found
        write(args.out / NAME, results)
        print(f"  {report.stage_line(stage.name, found)}", flush=True)
    text = report.summary(results, [stage.name for stage in stages])
    (args.out / "first_contact.txt").write_text(text + "\n", encoding="utf-8")
    print(text)
    verdicts = [results["stages"].get(stage.name, {}).get("verdict") for stage in chosen]
    return int(any(verdict not in ("passed", NOT_RUN) for verdict in verdicts))


def _found_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def open_results(file: Path, device: str) -> dict[str, Any]:
    """Return the results of earlier calls, or empty ones.

    Raises:
        ValueError: the file has other things, or results of another device.
    """
    if not file.exists():
        date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        return {"date": date, "device": device, "interpreted": device == "cpu", "stages": {}}
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
        before = results["device"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"--out: {file} is not a file of this command; choose another folder") from None
    if before != device:
        raise ValueError(
            f"--out: {file} has results of device {before!r}, and this is {device!r}; choose another folder"
        )
    return results


def choose(names: str | None, stages: Sequence[Stage], results: dict[str, Any]) -> list[Stage]:
    """Return the stages to run: those asked for, else first those without a complete result, then those that have failed.

    Raises:
        ValueError: `names` has one that is no stage.
    """
    if names is not None:
        wanted = [name.strip() for name in names.split(",")]
        known = {stage.name: stage for stage in stages}
        if unknown := [name for name in wanted if name not in known]:
            raise ValueError(f"--stages: unknown {', '.join(map(repr, unknown))}; allowed are {', '.join(known)}")
        return [stage for stage in stages if stage.name in wanted]
    verdicts = {name: found["verdict"] for name, found in results["stages"].items()}
    missing = [stage for stage in stages if verdicts.get(stage.name, "cut") == "cut"]
    return missing + [stage for stage in stages if verdicts.get(stage.name, "cut") not in ("cut", *_KEPT)]


def run_stage(stage: Stage, out: Path, device: str, limit_s: float, until: float, *, again: bool) -> dict[str, Any]:
    """Run a stage in a process of its own and return what `stage_supervisor.supervise` does.

    Args:
        again: whether a stage that was interrupted starts from the beginning instead of where it was.
    """
    rows = out / f"{stage.name}.rows"
    if again:
        rows.unlink(missing_ok=True)
    seconds = max(1.0, min(limit_s, until - time.time()))
    # Torch reads the first of these in C++, Triton when it is imported; there is no other way to tell them.
    environment = ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES=1", f"TRITON_INTERPRET={int(device == 'cpu')}"]
    python = [sys.executable, "-X", "faulthandler", "-P", "-m", "expertwire.bench.first_contact.stage_process"]
    command = ["env", *environment, *python, stage.target, device, str(out), str(rows), f"{seconds:.1f}"]
    found = stage_supervisor.supervise(command, rows, limit_s=limit_s, until=until)
    if found["verdict"] != "cut":
        rows.unlink(missing_ok=True)
    return found


def write(file: Path, results: dict[str, Any]) -> None:
    """Write the results atomically: all of them, or none if this process dies."""
    new = file.with_suffix(".new")
    new.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    os.replace(new, file)
