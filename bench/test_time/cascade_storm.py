"""`python -m expertwire.bench.test_time.cascade_storm`: random requests of cascades, cancels, and what is left.

As `storm`, with two engines without a model. Policies are random, and verifiers fail.
"""

from __future__ import annotations

import argparse
import json
import random
import select
import time
from typing import Any

from expertwire.bench.test_time.storm import OPTIONS, Report, Verifier, check_leftovers
from expertwire.deploy.runtime import open_frontend
from expertwire.engine.config.engine_config import EngineConfig
from expertwire.engine.frontend.api import RequestOptions
from expertwire.engine.frontend.cascade_legs import CascadeLeg, CascadePolicy
from expertwire.engine.frontend.cascades import CascadeRun, LegName
from expertwire.engine.frontend.frontend import Frontend
from expertwire.engine.frontend.verifier_calls import VerifierCalls
from expertwire.scheduler.sampling_params import SamplingParams
from expertwire.strategies.cascade import Cascade
from expertwire.strategies.verifiers import VerifierPolicy

_MOST_OPEN = 8  # requests
_DRAIN_S = 60.0


def random_policy(rng: random.Random, verifier: Verifier) -> CascadePolicy:
    """Return a policy with any of the mechanisms."""
    cascade = Cascade(
        small="small",
        large="large",
        version="1",
        confidence_threshold=rng.choice([None, 0.0, -1.0, -6.0]),
        window=rng.randint(1, 8),
        verifier="v",
        verifier_threshold=rng.choice([None, 0.5]),
        random_share=rng.choice([0.0, 0.3]),
        draft_tolerance=rng.choice([None, 0.0, 1e3]),
    )
    return CascadePolicy(cascade=cascade, verifier=verifier, verifier_policy=VerifierPolicy(timeout_s=0.5))


class _Requests:
    """The requests of a storm: all `runs`, and those that are `live`."""

    def __init__(self, small: Frontend, large: Frontend, calls: VerifierCalls) -> None:
        self.frontends: dict[LegName, Frontend] = {"small": small, "large": large}
        self.calls, self.runs, self.live = calls, list[CascadeRun](), list[CascadeRun]()
        self._legs: dict[tuple[LegName, int], CascadeRun] = {}

    def begin(self, policy: CascadePolicy, prompt: list[int], params: SamplingParams) -> None:
        """Begin a request."""
        legs = {
            name: CascadeLeg(
                frontend=frontend, tokens=frontend.encode(prompt, params), params=params, options=RequestOptions()
            )
            for name, frontend in self.frontends.items()
        }

        def note(name: LegName) -> None:
            number = legs[name].number
            assert number is not None, "it has been submitted"
            self._legs[name, number] = run

        run = CascadeRun(
            policy,
            legs["small"],
            legs["large"],
            request_id=str(len(self.runs)),
            prompt="a prompt",
            shares_tokens=True,
            calls=self.calls,
            on_submit=note,
        )
        self.runs.append(run)
        self.live.append(run)
        run.begin()

    def poll(self) -> None:
        """Take what has come, and all output."""
        select.select([self.calls.fileno(), *(each.fileno() for each in self.frontends.values())], [], [], 0.002)
        for name, frontend in self.frontends.items():
            for request in frontend.receive(0):
                self._legs[name, request.id].handle(name, request)
        self.calls.deliver()
        for run in self.live:
            run.take()
        self.live = [run for run in self.live if not run.done]


def storm(small: Frontend, large: Frontend, seconds: float, *, seed: int, fault_share: float = 0.1) -> Report:
    """Run requests for so many seconds, let the rest end, and take stock. The frontends must have nothing else to do."""
    report, rng = Report(), random.Random(seed)
    verifier, vocab = Verifier(random.Random(seed + 1), fault_share), small.model_info.vocab_size
    calls = VerifierCalls()
    requests = _Requests(small, large, calls)
    cancelled: set[int] = set()
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s or requests.live:
        if time.monotonic() < end_s and len(requests.live) < _MOST_OPEN:
            prompt = [rng.randrange(vocab) for _ in range(rng.randint(1, 90))]
            params = SamplingParams(
                max_tokens=rng.randint(1, 80), seed=rng.randrange(99), ignore_eos=rng.random() < 0.5
            )
            requests.begin(random_policy(rng, verifier), prompt, params)
            report.started["cascade"] += 1
        if requests.live and rng.random() < 0.05:
            run = rng.choice(requests.live)
            report.cancelled[next((name for name, leg in run.legs.items() if leg.is_running), "verifying")] += 1
            cancelled.add(id(run))
            run.abort()
            requests.live.remove(run)
        requests.poll()
        if time.monotonic() > end_s + _DRAIN_S:
            report.problems.append(f"{len(requests.live)} requests never end")
            break
    for run in requests.runs:
        if not run.done or (id(run) in cancelled) + (run.record is not None) + (run.error is not None) != 1:
            report.problems.append(f"request {run.request_id}: {run.record}, {run.error}")
        report.ended["cancelled" if id(run) in cancelled else run.reason if run.error is None else run.error.code] += 1
    calls.close()
    for name, frontend in requests.frontends.items():
        of_runs = sum(run.legs[name].num_tokens for run in requests.runs)
        check_leftovers(frontend, report, of_runs)
    return report


def main() -> int:
    """Run a storm, print what it found, and return 1 if something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with open_frontend(EngineConfig(**OPTIONS)) as small, open_frontend(EngineConfig(**OPTIONS)) as large:
        report = storm(small, large, args.seconds, seed=args.seed)
    shown: dict[str, Any] = {name: dict(getattr(report, name)) for name in ("started", "cancelled", "ended", "stats")}
    print(json.dumps(shown | {"problems": report.problems}, indent=1))
    return int(bool(report.problems))


if __name__ == "__main__":
    raise SystemExit(main())
