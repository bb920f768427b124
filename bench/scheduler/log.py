"""The log of a scheduler's calls, and its replay: the same calls must give the same plans, byte by byte.

One JSON object a line, gzipped if the file's name ends with .gz. The first describes the scheduler,
each other one is a call: its inputs (`now` among them) and what came back. A plan is logged as one
digest a field, so that a difference can be named.
"""

from __future__ import annotations

import base64
import dataclasses
import gzip
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from expertwire.comm.control.channel import pack, unpack
from expertwire.scheduler.config import CacheSpec, SchedulerConfig
from expertwire.scheduler.outputs import Rejection, StepOutputs
from expertwire.scheduler.plan import StepPlan, StepResult
from expertwire.scheduler.policy import make_policy
from expertwire.scheduler.quotas import TenantQuota
from expertwire.scheduler.request import Request
from expertwire.scheduler.sampling_params import SamplingParams
from expertwire.scheduler.scheduler import Scheduler

FORMAT = 5
_ASKED = ("key", "branch", "seed", "priority", "tenant", "salt", "deadline", "credit")  # of a request, as they are


class Recorder:
    """A scheduler that logs every call. It has the calls that change a scheduler; use `scheduler` for others."""

    def __init__(self, scheduler: Scheduler, file: Path, policy: str) -> None:
        self.scheduler = scheduler
        self._file = _open(file, "w")
        self._write(
            format=FORMAT,
            policy=policy,
            config=dataclasses.asdict(scheduler.config),
            caches=[dataclasses.asdict(spec) for spec in scheduler.cache_specs],
        )

    def submit(self, request: Request, now: float) -> Rejection | None:
        rejection = self.scheduler.submit(request, now)
        asked = {name: getattr(request, name) for name in _ASKED}
        asked |= {"prompt": _text(request.prompt), "params": request.params.to_dict()}
        self._write(call="submit", now=now, request=asked, code=rejection and rejection.code)
        return rejection

    def abort(self, key: int) -> None:
        self._write(call="abort", key=key)
        self.scheduler.abort(key)

    def grant(self, key: int, num_tokens: int) -> None:
        self._write(call="grant", key=key, num_tokens=num_tokens)
        self.scheduler.grant(key, num_tokens)

    def plan(self, now: float) -> StepPlan | None:
        plan = self.scheduler.plan(now)
        self._write(call="plan", now=now, plan=None if plan is None else digests(plan))
        return plan

    def commit(self, plan: StepPlan, results: Sequence[StepResult], now: float) -> StepOutputs:
        messages = [base64.b64encode(pack(result.to_arrays())).decode() for result in results]
        self._write(call="commit", now=now, step=plan.step, results=messages)
        return self.scheduler.commit(plan, results, now)

    def close(self) -> None:
        self._file.close()

    def _write(self, **fields: Any) -> None:
        self._file.write(json.dumps(fields, separators=(",", ":")) + "\n")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Replayed:
    """Result of a replay.

    Args:
        plans: compared.
        difference: the first one, with its line and what differs; None if there is none.
    """

    plans: int
    difference: str | None


def replay(file: Path) -> Replayed:
    """Run a log through a fresh scheduler, until something differs.

    Raises:
        ValueError: the file is not a log, or of another version.
    """
    lines = _lines(file)
    _, head = next(lines, (0, {}))
    if head.get("format") != FORMAT:
        raise ValueError(f"{file} is not a log of scheduler calls of format {FORMAT}")
    tuples = {name: tuple(value) for name, value in head["config"].items() if isinstance(value, list)}
    quotas = {tenant: TenantQuota(**quota) for tenant, quota in head["config"]["tenant_quotas"].items()}
    default = head["config"]["default_tenant_quota"]
    others = default and TenantQuota(**default)
    config = SchedulerConfig(**head["config"] | tuples | {"tenant_quotas": quotas, "default_tenant_quota": others})
    caches = tuple(CacheSpec(**spec) for spec in head["caches"])
    scheduler = Scheduler(config, caches, make_policy(head["policy"]))
    in_flight: dict[int, StepPlan] = {}
    plans = 0
    for number, line in lines:
        plans += line["call"] == "plan"
        try:
            difference = _call(scheduler, line, in_flight)
        except (AssertionError, KeyError) as error:  # what was recorded cannot happen to this scheduler
            difference = f"the call fails: {type(error).__name__}: {error}"
        if difference is not None:
            return Replayed(plans=plans, difference=f"line {number}, {line['call']}: {difference}")
    return Replayed(plans=plans, difference=None)


def digests(plan: StepPlan) -> dict[str, str]:
    """Return the digest of each field's bytes, dtype and shape."""
    arrays = {name: np.asarray(value) for name, value in vars(plan).items()}
    return {
        name: hashlib.blake2b(f"{value.dtype.str}{value.shape}".encode() + value.tobytes(), digest_size=8).hexdigest()
        for name, value in arrays.items()
    }


def _call(scheduler: Scheduler, line: dict[str, Any], in_flight: dict[int, StepPlan]) -> str | None:
    """Make one recorded call; return the difference, or None."""
    match line["call"]:
        case "submit":
            rejection = scheduler.submit(_request(line["request"]), line["now"])
            if (code := rejection and rejection.code) != line["code"]:
                return f"request {line['request']['key']} was answered {line['code']}, now {code}"
        case "abort":
            scheduler.abort(line["key"])
        case "grant":
            scheduler.grant(line["key"], line["num_tokens"])
        case "plan":
            plan = scheduler.plan(line["now"])
            if plan is not None:
                in_flight[plan.step] = plan
            return _difference(line["plan"], plan)
        case "commit":
            results = [StepResult.from_arrays(unpack(base64.b64decode(text))) for text in line["results"]]
            scheduler.commit(in_flight.pop(line["step"]), results, line["now"])
        case call:
            return f"there is no such call: {call!r}"
    return None


def _difference(recorded: dict[str, str] | None, plan: StepPlan | None) -> str | None:
    if recorded is None or plan is None:
        return (
            None
            if recorded is None and plan is None
            else f"there was {'no' if recorded is None else 'a'} plan, now it is the reverse"
        )
    now = digests(plan)
    fields = [name for name in sorted(recorded | now) if recorded.get(name) != now.get(name)]
    return f"step {plan.step} differs in {', '.join(fields)}" if fields else None


def _request(asked: dict[str, Any]) -> Request:
    prompt = np.frombuffer(base64.b64decode(asked["prompt"]), np.int32)
    params = SamplingParams.from_dict(asked["params"])
    return Request(prompt=prompt, params=params, **{name: asked[name] for name in _ASKED})


def _text(prompt: np.ndarray) -> str:
    return base64.b64encode(prompt.tobytes()).decode()


def _lines(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with _open(file, "r") as stream:
        for number, text in enumerate(stream, 1):
            try:
                yield number, json.loads(text)
            except ValueError as error:
                raise ValueError(f"{file}, line {number}: {error}") from None


def _open(file: Path, mode: str) -> IO[str]:
    if file.suffix == ".gz":
        return io.TextIOWrapper(gzip.GzipFile(file, mode, compresslevel=1), encoding="utf-8")
    return file.open(mode, encoding="utf-8")
