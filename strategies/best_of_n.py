"""Best-of-n: n branches, of which the client gets the one with the highest score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from expertwire.strategies.base import UNLIMITED, Action, Branch, Budget, Group, Needs, Selection, Status
from expertwire.strategies.checks import require_callable, require_integer, require_one_of
from expertwire.strategies.verifiers import DEFAULT_POLICY, Verifier, VerifierPolicy
from expertwire.strategies.votes import (
    last_score,
    mean_logprob,
    start_missing,
    unfinished,
    verify_finished,
    without_score,
)


@dataclass(frozen=True)
class BestOfN:
    """The finished branch with the highest score of `n`; the lowest index among equals.

    Args:
        n: branches.
        verifier: scores finished branches, where `score` is "verifier".
        score: "verifier", or "mean_logprob": the mean log-probability of a branch's tokens.
        verifier_policy: limits of the verifier.
        budget: limits of the group.

    Raises:
        ValueError: names the field and what it allows.
    """

    n: int
    verifier: Verifier | None = None
    score: str = "verifier"
    verifier_policy: VerifierPolicy = DEFAULT_POLICY
    budget: Budget = UNLIMITED

    def __post_init__(self) -> None:
        require_integer("n", self.n, minimum=1)
        require_one_of("score", self.score, ("verifier", "mean_logprob"))
        if self.score == "verifier":
            require_callable("verifier", self.verifier, why='score="verifier" needs it; score="mean_logprob" does not')
        elif self.verifier is not None:
            raise ValueError(f'verifier must be None with score="mean_logprob", got {self.verifier!r}')

    @property
    def needs(self) -> Needs:
        """Scores, or log-probabilities."""
        return Needs(
            logprobs=self.score == "mean_logprob",
            verifier=self.verifier,
            verifier_policy=self.verifier_policy,
            budget=self.budget,
        )

    def decide(self, group: Group) -> Sequence[Action]:
        """Start all branches at once; ask for a score of each that finishes."""
        verify = verify_finished(group) if self.score == "verifier" else []
        return [*start_missing(group, self.n), *verify]

    def select(self, group: Group) -> Selection:
        """Return the finished branch with the highest score."""
        finished = group.with_status(Status.FINISHED)
        scored = [(score, branch) for branch in finished if (score := self._score(branch)) is not None]
        if not scored:
            return without_score(group) if self.score == "verifier" else unfinished(group)
        score, best = min(scored, key=lambda pair: (-pair[0], pair[1].index))
        return Selection(branches=(best.index,), reason=f"highest {self.score} of {len(scored)}: {score:.6g}")

    def _score(self, branch: Branch) -> float | None:
        return last_score(branch) if self.score == "verifier" else mean_logprob(branch)
