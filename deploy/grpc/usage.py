"""Usage of a request, in tokens and seconds, for the last message of its stream."""

from __future__ import annotations

import time
from collections.abc import Sequence

from expertwire.deploy.proto import expertwire_v1_pb2 as pb
from expertwire.engine.frontend.api import Update
from expertwire.engine.frontend.group_run import GroupRun
from expertwire.engine.frontend.open_requests import OpenRequest
from expertwire.engine.frontend.tokenizer import ReasoningIds

_NO_REASONING = ReasoningIds((), -1)


class UsageCounter:
    """Tokens and times of one request.

    Args:
        prompt_tokens: length of the prompt.
        reasoning: the tokens around reasoning; None if the model has none.
        arrived_s: when it arrived, by `time.monotonic`.
        opens_reasoning: whether the prompt ends with the start of reasoning.
    """

    def __init__(
        self, prompt_tokens: int, reasoning: ReasoningIds | None, arrived_s: float, *, opens_reasoning: bool
    ) -> None:
        self._arrived_s = arrived_s
        self._prompt_tokens = prompt_tokens
        self._seed = self._cached_tokens = self._completion_tokens = self._reasoning_tokens = 0
        self._first_token_s = self._total_s = 0.0
        self._reasoning = reasoning or _NO_REASONING
        self._opens_reasoning = opens_reasoning
        self._branches: dict[int, _Reasoning] = {}

    def add(self, update: Update) -> None:
        """Count an update."""
        self._seed, self._cached_tokens = update.seed, update.num_cached_tokens
        if num_tokens := len(update.token_ids):
            self._total_s = time.monotonic() - self._arrived_s
            if not self._completion_tokens:
                self._first_token_s = self._total_s
            self._completion_tokens += num_tokens
            if self._reasoning is not _NO_REASONING:
                if (branch := self._branches.get(update.branch)) is None:
                    branch = self._branches[update.branch] = _Reasoning(self._reasoning, self._opens_reasoning)
                self._reasoning_tokens += branch.count(update.token_ids)

    def add_columns(self, request: OpenRequest) -> None:
        """Count the tokens of a request that came in columns, at its end."""
        if request.num_column_tokens and request.began_s is not None:
            self._completion_tokens += request.num_column_tokens
            self._reasoning_tokens += request.num_column_reasoning
            self._first_token_s = request.began_s - self._arrived_s
            self._total_s = time.monotonic() - self._arrived_s

    def message(self) -> pb.Usage:
        """Return the message."""
        return pb.Usage(
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._completion_tokens,
            seed=self._seed,
            cached_prompt_tokens=self._cached_tokens,
            reasoning_tokens=self._reasoning_tokens,
            time_to_first_token_s=self._first_token_s,
            total_time_s=self._total_s,
        )


class GroupUsage:
    """Tokens and times of one request with a strategy.

    Args:
        run: its group.
        reasoning, arrived_s, opens_reasoning: as for `UsageCounter`.
    """

    def __init__(
        self, run: GroupRun, reasoning: ReasoningIds | None, arrived_s: float, *, opens_reasoning: bool
    ) -> None:
        self._run, self._arrived_s = run, arrived_s
        self._reasoning, self._opens_reasoning = reasoning, opens_reasoning

    def message(self) -> pb.Usage:
        """Return the message; of a group that runs, up to now."""
        run, counts = self._run, self._run.token_counts()
        assert run.params.seed is not None, "a group has a seed"
        return pb.Usage(
            prompt_tokens=len(run.tokens),
            completion_tokens=run.num_tokens,
            seed=run.params.seed,
            cached_prompt_tokens=run.num_cached_tokens,
            reasoning_tokens=self._num_reasoning(),
            time_to_first_token_s=0.0 if run.first_token_s is None else run.first_token_s - self._arrived_s,
            total_time_s=time.monotonic() - self._arrived_s,
            kept_tokens=counts.kept,
            pruned_tokens=counts.pruned,
            verifier_tokens=counts.verifier,
        )

    def _num_reasoning(self) -> int:
        if self._reasoning is None:
            return 0
        num = 0
        for branch in self._run.branches:
            reader = _Reasoning(self._reasoning, self._opens_reasoning)
            reader.count(branch.token_ids[: branch.num_shared])
            num += reader.count(branch.token_ids[branch.num_shared :])
        return num


class _Reasoning:
    """The reasoning of one branch, of which the output is before, within or behind."""

    def __init__(self, ids: ReasoningIds, is_open: bool) -> None:
        self._ids = ids
        self._matched = (
            len(ids.start) if is_open else 0
        )  # tokens of the start that have come; all of them: within reasoning

    def count(self, token_ids: Sequence[int]) -> int:
        """Return how many of the next tokens are reasoning, without its delimiters."""
        (start, end), num, at = self._ids, 0, 0
        while at < len(token_ids):
            if self._matched == len(start):
                closed = _find(end, token_ids, at)
                num += closed - at
                self._matched = 0 if closed < len(token_ids) else len(start)
                at = closed + 1
            elif self._matched == 0:
                begun = _find(start[0], token_ids, at)
                self._matched = int(begun < len(token_ids))
                at = begun + 1
            elif token_ids[at] == start[self._matched]:
                self._matched, at = self._matched + 1, at + 1
            else:
                self._matched = 0  # the token may begin it anew
        return num


def _find(token: int, token_ids: Sequence[int], at: int) -> int:
    """Return the index of a token from `at` on, or the number of tokens."""
    try:
        return token_ids.index(token, at)
    except ValueError:
        return len(token_ids)
