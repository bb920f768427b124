"""Cascades: requests that a small model answers, or a large one, over a frontend of each.

A `CascadeRun` is one request. It submits to the frontends, takes in what comes, and carries out what the policy
(`strategies.cascade.Cascade`) says: it aborts the small model's request at the first window of low confidence, asks the verifier,
and submits the same prompt to the large one. The small model's output is held back until it is accepted; the large one's can be
taken as it comes. Everything but the calls of verifiers happens in the frontends' thread.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np

from expertwire.engine.frontend.api import EngineFailed, Position, RequestError, Update
from expertwire.engine.frontend.cascade_drafts import accepted_output, checking_params, draft_of, num_accepted
from expertwire.engine.frontend.cascade_legs import KEPT, CascadeLeg, CascadePolicy, check_cascade_params, counts_of
from expertwire.engine.frontend.logprobs import sampled_logprob
from expertwire.engine.frontend.open_requests import OpenRequest
from expertwire.engine.frontend.verifier_calls import Outcome, VerifierCalls
from expertwire.scheduler.sampling_params import SamplingParams
from expertwire.strategies.cascade import Confidence, prompt_features
from expertwire.strategies.cascade_log import DecisionRecord
from expertwire.strategies.verifiers import Candidate, VerifierError

ABORTED = "aborted"
LegName = Literal["small", "large"]


class CascadeRun:
    """One request of a cascade, from its prompt to its decision record.

    A request of the random slice runs both models to their ends; its output can be taken when both have ended, and it fails if
    one of them does.

    Args:
        policy: decides.
        small, large: the models' parts.
        request_id: of the request; the random slice is a function of it.
        prompt: text of the prompt; None: it is decoded from the small model's tokens.
        shares_tokens: whether the models have one tokenizer, so that the large one may start from the small one's output.
        calls: calls the verifier.
        on_submit: called when a leg has been submitted.
        on_news: called when there is something to take, or the request has failed.

    Attributes:
        reason: why the client gets the output it gets: "kept", the mechanism that escalated, or "aborted"; "" before.
        record: what was decided; None while it runs, and where it has failed or was aborted.
        verifier_tokens: tokens that engines computed for its scores.
        error: the error that ended it, or None.
        done: whether it has ended, and all its output has been taken.
    """

    def __init__(
        self,
        policy: CascadePolicy,
        small: CascadeLeg,
        large: CascadeLeg,
        *,
        request_id: str,
        prompt: str | None,
        shares_tokens: bool,
        calls: VerifierCalls,
        on_submit: Callable[[LegName], None] = lambda _: None,
        on_news: Callable[[], None] = lambda: None,
    ) -> None:
        check_cascade_params(small.params)
        self.policy, self.request_id = policy, request_id
        self.legs: dict[LegName, CascadeLeg] = {"small": small, "large": large}
        self.reason = ""
        self.record: DecisionRecord | None = None
        self.verifier_tokens = 0
        self.error: RequestError | None = None
        self.done = False
        seed = small.frontend.new_seed() if small.params.seed is None else small.params.seed
        for leg in (small, large):
            leg.params = dataclasses.replace(leg.params, seed=seed)
        self._shows_logprobs = small.params.logprobs is not None
        if not self._shows_logprobs:
            small.params = dataclasses.replace(small.params, logprobs=0)
        self._prompt = prompt if prompt is not None else small.prompt_text()
        self._features = prompt_features(self._prompt, len(small.tokens))
        self._confidence = Confidence(policy.cascade.window)
        self._scores: dict[str, float | None] = {}
        self._num_asked = 0  # scores that have not come
        self._tolerance = policy.cascade.draft_tolerance if shares_tokens else None
        self._accepted: list[Update] = []  # the beginning of the large model's output, until the client takes it
        self._output: list[Update] = []  # that was held back, and that the client may have
        self._calls, self._on_submit, self._on_news = calls, on_submit, on_news
        self._in_slice = policy.cascade.in_random_slice(request_id)

    @property
    def model(self) -> str:
        """The model whose output the client gets; "" before that is decided, and if it was aborted."""
        cascade = self.policy.cascade
        return {"": "", ABORTED: "", KEPT: cascade.small}.get(self.reason, cascade.large)

    @property
    def num_tokens(self) -> int:
        """Output tokens of both models that have come."""
        return sum(leg.num_tokens for leg in self.legs.values())

    @property
    def has_output(self) -> bool:
        """True if `take` has something to return."""
        request = self.legs["large"].request
        if self.done or not self._streams:
            return bool(self._output)
        return bool(self._accepted) or (request is not None and (bool(request.untaken) or request.done))

    def begin(self) -> None:
        """Submit the first leg, or both.

        Raises:
            EngineFailed: a model's engine has failed.
        """
        cascade = self.policy.cascade
        if cascade.router is not None:
            self._scores["router"] = cascade.router.probability(self._features)
        if cascade.routes_to_large(self._features):
            self.reason = "router"
        if not self.reason or self._in_slice:
            self._submit("small")
        if self.reason or self._in_slice:
            self._submit("large")

    def handle(self, name: LegName, request: OpenRequest) -> None:
        """Take in a leg's news, from `Frontend.receive`."""
        leg = self.legs[name]
        if self.done or not leg.is_running or request.id != leg.number:
            return  # what was aborted
        if leg.checks_draft:
            self._check_draft(request)
            return
        if name == "large" and self._streams:
            leg.request = request
            if request.done:
                leg.end()
            self._on_news()
            return
        for update in leg.frontend.take(request):
            self._add(name, update)
        self._settle()

    def take(self, max_size: int | None = None) -> list[Update]:
        """Return output that the client may have; the last update is `done`. Errors are in `error`.

        Args:
            max_size: tokens and log-probabilities at most, about; the rest stays.
        """
        if not self.has_output:
            return []
        if self._streams:
            updates = self._take_large(max_size)
        else:
            updates, size = [], 0
            while self._output and (max_size is None or size < max_size):
                update = self._output.pop(0)
                size += len(update.token_ids) * (1 + (self.legs["small"].params.logprobs or 0))
                updates.append(update)
        if updates and updates[-1].done:
            self._finish()
        return updates

    def abort(self) -> None:
        """End the request: both models' parts stop. Without effect if it has ended."""
        if not self.done:
            self._end()

    def cancel(self) -> bool:
        """End the request as its client's abort by name does: a last update says so. Return whether it ran."""
        if self.done:
            return False
        last = Update(0, finish_reason="abort", seed=self.legs["small"].params.seed or 0, done=True)
        self.reason, self._in_slice, self._output = ABORTED, False, [last]
        self._settle()
        return True

    @property
    def _streams(self) -> bool:
        """True if the large model's output goes to the client as it comes."""
        return not self._in_slice and self.legs["large"].number is not None and not self._output

    def _take_large(self, max_size: int | None) -> list[Update]:
        leg, (accepted, self._accepted) = self.legs["large"], (self._accepted, [])
        if leg.request is None:
            return accepted
        updates = leg.frontend.take(leg.request, max_size)
        for update in updates:
            leg.num_tokens += len(update.token_ids)
            if update.error is not None:
                self._fail(update.error)
                return []
            leg.complete = update.finish_reason in ("stop", "length")
            if update.finish_reason == "abort":  # by the client, under the request's name
                self.reason = ABORTED
        if leg.draft:  # the check of the draft has computed what is cached
            updates = [update._replace(num_cached_tokens=0) for update in updates]
        return accepted + updates

    def _submit(self, name: LegName) -> None:
        """Begin a leg."""
        leg = self.legs[name]
        leg.begin_s = time.monotonic()
        if leg.draft:
            tokens = np.concatenate((leg.tokens, np.array(leg.draft, np.int32)))
            self._request(name, tokens, checking_params(leg.params))
        else:
            self._request(name, leg.tokens, leg.params)

    def _request(
        self, name: LegName, tokens: np.ndarray, params: SamplingParams, num_prompt: int | None = None
    ) -> None:
        leg = self.legs[name]
        options, begin_s = leg.options, self.legs["small"].begin_s
        if name == "large" and options.deadline_s is not None and begin_s:
            left_s = options.deadline_s - (time.monotonic() - begin_s)
            options = dataclasses.replace(options, deadline_s=max(0.0, left_s))
        only_sampled = name == "small" and not self._shows_logprobs
        number = leg.frontend.submit(tokens, params, options, num_prompt_tokens=num_prompt, only_sampled=only_sampled)
        leg.numbers.append(number)
        self._on_submit(name)

    def _hand_over(self) -> None:
        """Begin the large model's leg, from what the small one has written."""
        small, large = self.legs["small"], self.legs["large"]
        if self._tolerance is not None:
            max_model_len = large.frontend.model_info.max_model_len
            large.draft = draft_of(small.updates, large.params, large.tokens, max_model_len)
        with self._failing():
            self._submit("large")

    def _check_draft(self, request: OpenRequest) -> None:
        """Take in what the large model says of the draft, and let it go on behind what it keeps."""
        leg = self.legs["large"]
        assert self._tolerance is not None, "there is a draft"
        for update in leg.frontend.take(request):
            leg.num_tokens += len(update.token_ids)
            if update.error is not None:
                leg.end()
                self._fail(update.error)
                return
            if update.finish_reason == "abort":  # by the client, under the request's name
                leg.end()
                self.cancel()
                return
            if update.prompt_logprobs is not None:
                positions = update.prompt_logprobs[len(leg.tokens) :]
                leg.num_accepted = num_accepted(leg.draft, positions, self._tolerance)
                self._accept(positions[: leg.num_accepted])

    def _accept(self, positions: Sequence[Position | None]) -> None:
        leg = self.legs["large"]
        accepted = np.array(leg.draft[: len(positions)], np.int32)
        with self._failing():
            self._request("large", np.concatenate((leg.tokens, accepted)), leg.params, len(leg.tokens))
        if not self.done and len(positions):
            self._accepted = [accepted_output(leg, positions)]
            self._on_news()

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        """End the request with an error where the engine fails."""
        try:
            yield
        except EngineFailed as failed:
            self._fail(RequestError("UNAVAILABLE", str(failed)))

    def _add(self, name: LegName, update: Update) -> None:
        """Take in a part of an output that is held back."""
        leg = self.legs[name]
        leg.num_tokens += len(update.token_ids)
        leg.updates.append(update)
        if name == "small":
            for logprob in update.sampled_logprobs or map(sampled_logprob, update.logprobs or ()):
                self._confidence.push(logprob)
                if not self.reason and self.policy.cascade.doubts(self._confidence.minima):
                    self.reason = "confidence"
        if update.error is not None:
            leg.end()
            self._fail(update.error)
        elif update.finish_reason == "abort":  # by the client, under the request's name
            leg.end()
            self.reason, self._output = ABORTED, [update._replace(token_ids=(), text="", logprobs=(), done=True)]
        elif update.finish_reason is not None:
            leg.end()
            leg.complete = True
            self._completed(name)

    def _completed(self, name: LegName) -> None:
        """Ask the verifier about a whole output, if its score decides or is an outcome of the random slice."""
        verifier, leg = self.policy.verifier, self.legs[name]
        decides = name == "small" and not self.reason and self.policy.cascade.verifier_threshold is not None
        if verifier is not None and (decides or self._in_slice):
            candidate = Candidate(
                prompt=self._prompt,
                text="".join(update.text for update in leg.updates),
                prompt_token_ids=leg.tokens.tolist(),
                token_ids=[token for update in leg.updates for token in update.token_ids],
                complete=True,
            )
            self._num_asked += 1
            self._calls.ask(
                verifier, self.policy.verifier_policy, id(self), candidate, lambda found: self._scored(name, found)
            )
            self._calls.dispatch()
        elif name == "small" and not self.reason:
            self.reason = KEPT

    def _scored(self, name: LegName, outcome: Outcome) -> None:
        """Take in the score of a complete output."""
        if self.done:
            return
        self._num_asked -= 1
        self.verifier_tokens += outcome.num_tokens
        score = None if isinstance(outcome.score, VerifierError) else float(outcome.score)
        self.legs[name].outcome = score
        if name == "small":
            self._scores["verifier"] = score
            if not self.reason:
                self.reason = "verifier" if self.policy.cascade.rejects(score) else KEPT
        self._settle()

    def _settle(self) -> None:
        """Carry out what has been decided, and tell that there is something to take."""
        if self.done or not self.reason:
            return
        if self.reason == ABORTED:
            self._stop("small")
            self._stop("large")
            self._on_news()
        elif self.reason != KEPT and not self._in_slice:
            self._stop("small")
            self._hand_over()
        elif not self._num_asked and not any(leg.is_running for leg in self.legs.values()):
            self._output = self.legs["small" if self.reason == KEPT else "large"].updates
            self._on_news()

    def _stop(self, name: LegName) -> None:
        leg = self.legs[name]
        if leg.is_running:
            assert leg.number is not None, "it runs"
            leg.end()
            leg.frontend.abort(leg.number)

    def _fail(self, error: RequestError) -> None:
        self.error = error
        self._end()
        self._on_news()

    def _finish(self) -> None:
        """Write down what was decided, after the last update was taken."""
        if self.reason != ABORTED:
            self.record = self._make_record()
            self.legs["small"].frontend.counts.update(counts_of(self.record))
        self._end()

    def _end(self) -> None:
        self.done = True
        self._stop("small")
        self._stop("large")
        self._calls.forget(id(self))

    def _make_record(self) -> DecisionRecord:
        cascade, minima = self.policy.cascade, self._confidence.minima
        names: dict[LegName, str] = {"small": cascade.small, "large": cascade.large}
        costs: dict[LegName, float] = {"small": cascade.small_token_cost, "large": cascade.large_token_cost}
        legs = [leg.record(names[name], costs[name]) for name, leg in self.legs.items() if leg.number is not None]
        outcomes = {names[name]: leg.outcome for name, leg in self.legs.items() if leg.outcome is not None}
        router = self._scores.get("router")
        return DecisionRecord(
            request_id=self.request_id,
            policy_version=cascade.version,
            candidates=(cascade.small, cascade.large),
            scores={**self._scores, "confidence": minima[-1][1] if minima else None},
            thresholds=cascade.thresholds,
            chosen=self.model,
            reason=self.reason,
            legs=tuple(legs),
            features=self._features,
            bin=None if router is None else f"{min(int(router * 10), 9) / 10:.1f}",
            minima=tuple(minima),
            outcomes={model: score for model, score in outcomes.items() if 0 <= score <= 1} or None,
            in_random_slice=self._in_slice,
            propensity=cascade.random_share,
            verifier_tokens=self.verifier_tokens,
            draft_tolerance=self._tolerance,
            time_s=time.time(),
        )
