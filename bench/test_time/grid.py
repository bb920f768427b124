"""The strategies of the study."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from expertwire.deploy import demo_verifiers
from expertwire.deploy.demo_task import END_OF_STEP, Kind
from expertwire.strategies.adaptive_consistency import AdaptiveConsistency
from expertwire.strategies.answers import RegexAnswer
from expertwire.strategies.base import Budget, Strategy
from expertwire.strategies.beam import BeamSearch
from expertwire.strategies.best_of_n import BestOfN
from expertwire.strategies.compute_optimal import Bin, ComputeOptimal
from expertwire.strategies.confidence_pruning import ConfidencePruning
from expertwire.strategies.confidence_vote import ConfidenceVote
from expertwire.strategies.first_k_finish import FirstKFinish
from expertwire.strategies.majority_vote import MajorityVote
from expertwire.strategies.step_retries import StepRetries

ANSWER = RegexAnswer(r"answer ([0-9]+)")
NEEDS_32 = {("SUM", 4)}
MIDDLE: frozenset[tuple[Kind, int]] = frozenset({("SUM", 4), ("SUM", 5), ("SUM", 6)})  # votes and probes tell something
# Here best-of-16 leaves room for more than 8 beams.
HARD: frozenset[tuple[Kind, int]] = frozenset({("SUM", 7), ("SUM", 8), ("COUNTDOWN", 4), ("COUNTDOWN", 5)})


@dataclass(frozen=True)
class Entry:
    """A strategy of the study.

    Attributes:
        name: in tables.
        make: from the size of the problems.
        branches: started at most from the prompt.
        votes: whether it votes; `COUNTDOWN` problems contain their answer, so votes are no use there.
        groups_at_once: simulated together, where branches are forked.
        bins: in which it is tried; empty: in all.
        cuts: budgets of tokens, in whole answers, at which the same branches are looked at; the last one is that of the run.
    """

    name: str
    make: Callable[[int], Strategy]
    branches: int = 1
    votes: bool = False
    groups_at_once: int = 100
    bins: frozenset[tuple[Kind, int]] = frozenset()
    cuts: tuple[int, ...] = ()

    def fits(self, kind: Kind, size: int, branches: int) -> bool:
        """Return whether the strategy makes sense in a bin whose bank has so many branches."""
        return (
            (not self.bins or (kind, size) in self.bins)
            and self.branches <= branches
            and (not self.votes or (kind, size) in MIDDLE)
        )


def _best_of(n: int) -> Entry:
    return Entry(f"best-of-{n}", lambda size: BestOfN(n, verifier=demo_verifiers.outcome), n)


def _majority(n: int) -> Entry:
    return Entry(f"majority of {n}", lambda size: MajorityVote(n, ANSWER), n, votes=True)


def _whole_answers(count: int, size: int) -> Budget:
    return Budget(tokens=count * (size - 1) * (size + 6))


BEST_OF = tuple(_best_of(n) for n in (1, 2, 4, 8, 16))
BANKED = (
    *BEST_OF,
    *(_majority(n) for n in (4, 8, 16, 32)),
    Entry("confidence vote of 16", lambda size: ConfidenceVote(16, ANSWER), 16, votes=True),
    Entry("adaptive consistency of 32", lambda size: AdaptiveConsistency(32, ANSWER, concurrency=1), 32, votes=True),
    Entry("adaptive, 4 at once, of 32", lambda size: AdaptiveConsistency(32, ANSWER), 32, votes=True),
    Entry(
        "confidence pruning of 16",
        lambda size: ConfidencePruning(16, ANSWER, warm_up=4, keep_share=0.75, window=6),
        16,
        votes=True,
    ),
    Entry("first 4 of 16", lambda size: FirstKFinish(16, 4, ANSWER), 16, votes=True),
)


def _beam_search(n: int) -> Strategy:
    return BeamSearch(n, 4, demo_verifiers.process, step_text=END_OF_STEP)


def _beam(n: int, bins: frozenset[tuple[Kind, int]] = frozenset()) -> Entry:
    return Entry(f"beam {n}x4", lambda size: _beam_search(n), groups_at_once=800 // n, bins=bins)


def _probe(size: int) -> Strategy:
    rows = (Bin(strategy=BestOfN(2, demo_verifiers.process), least=0.5), Bin(strategy=_beam_search(8)))
    return ComputeOptimal(rows, probe=2, signal="verifier", verifier=demo_verifiers.process)


def _greedy_probe(n: int, bins: frozenset[tuple[Kind, int]] = frozenset()) -> Entry:
    """Return the strategy of a greedy output and, where the verifier rejects it, a beam search."""
    rows = (Bin(strategy=BestOfN(1, demo_verifiers.process), least=0.5), Bin(strategy=_beam_search(n)))
    strategy = ComputeOptimal(rows, probe=1, greedy_probe=True, signal="verifier", verifier=demo_verifiers.process)
    return Entry(f"checked greedy, then beam {n}x4", lambda size: strategy, groups_at_once=800 // n, bins=bins)


FORKING = (
    _beam(8),
    _beam(4),
    _beam(16, HARD),
    Entry(
        "step retries",
        lambda size: StepRetries(
            demo_verifiers.process, END_OF_STEP, max_retries=10_000, budget=_whole_answers(8, size)
        ),
        groups_at_once=500,
        cuts=(2, 4, 8),
    ),
    Entry("probe of 2, then beam 8x4", _probe, groups_at_once=100, bins=MIDDLE),
    _greedy_probe(4),
    _greedy_probe(8),
    _greedy_probe(16, HARD),
)
ON_ENGINE = (
    "majority of 16",
    "confidence pruning of 16",
    "beam 4x4",
    "beam 8x4",
    "probe of 2, then beam 8x4",
    "checked greedy, then beam 8x4",
)


def on_engine(kind: Kind, size: int) -> list[Entry]:
    """Return the strategies that are run on the engine, too; steps retried within 8 whole answers are one."""
    entries = [entry for entry in (*BANKED, *FORKING) if entry.name in ON_ENGINE and entry.fits(kind, size, 16)]
    retries = next(entry for entry in FORKING if entry.name == "step retries")
    return [*BEST_OF, *entries, replace(retries, name="step retries, 8x")]
