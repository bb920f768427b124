"""Drafts: what the small model of a cascade has written when its request goes to the large one, which starts from it.

The large model computes prompt and draft at once, as a prompt whose log-probabilities are wanted, and keeps the tokens before the
first that it finds too unlikely. Then it goes on behind these as if it had sampled them. With the tolerance 0 it keeps what it
would have chosen itself, so that a greedy output is its own, bit for bit, in fewer steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from expertwire.engine.frontend.api import Position, Update
from expertwire.engine.frontend.cascade_legs import CascadeLeg
from expertwire.engine.frontend.logprobs import rows_of
from expertwire.scheduler.sampling_params import MAX_PROMPT_ENTRIES, SamplingParams

_NUM_TOP = 2  # log-probabilities that tell whether a token is the most probable one, and the only one


def draft_of(updates: Sequence[Update], params: SamplingParams, prompt: np.ndarray, max_model_len: int) -> list[int]:
    """Return the part of an output that is a draft for a request with these parameters; empty if there is none.

    The token that ended the output is left out. Log-probabilities are of raw logits, so that they say nothing about a token
    where penalties, a bias or the control of thinking have a say; and stop strings are not looked for in a draft.

    Args:
        updates: of the output so far.
        params: of the request for the large model.
        prompt: its prompt.
        max_model_len: of the large model.
    """
    is_raw = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (1.0, 0.0, 0.0)
    has_own_rules = params.logit_bias or params.min_tokens or params.controls_thinking or params.stop
    if not is_raw or has_own_rules or params.expert_load:
        return []
    tokens = [token for update in updates for token in update.token_ids]
    if updates and updates[-1].finish_reason == "stop":
        tokens = tokens[:-1]
    room = params.most_output_tokens(len(prompt), max_model_len) - 1
    room = min(room, MAX_PROMPT_ENTRIES // (1 + _num_top(params)) - len(prompt))
    return tokens[: max(0, room)]


def checking_params(params: SamplingParams) -> SamplingParams:
    """Return the parameters of the request that checks a draft, which is part of its prompt."""
    return dataclasses.replace(params, max_tokens=1, logprobs=None, prompt_logprobs=_num_top(params))


def num_accepted(draft: Sequence[int], positions: Sequence[Position | None], tolerance: float) -> int:
    """Return how many of the first tokens of a draft are kept.

    Args:
        draft: its tokens.
        positions: the large model's log-probabilities of each.
        tolerance: by which a token's log-probability may be below the most probable token's.
    """
    for count, (token, position) in enumerate(zip(draft, positions, strict=True)):
        assert position is not None, "asked for by `checking_params`"
        own, *others = rows_of(position)
        assert own[0] == token, (own, token)
        best = max(logprob for _, logprob, _, _ in others)
        is_tie = best == own[1] and tolerance == 0  # which of the two the model would choose is not known
        if is_tie or best - own[1] > tolerance:
            return count
    return len(draft)


def accepted_output(leg: CascadeLeg, positions: Sequence[Position | None]) -> Update:
    """Return the tokens of a draft that were kept, with their text and log-probabilities, as the output's beginning.

    Args:
        leg: of the large model, which has just been submitted to go on behind them.
        positions: the large model's log-probabilities of each.
    """
    assert leg.number is not None, "it has been submitted"
    request = leg.frontend.find(leg.number)
    assert request is not None, "it has only now been submitted"
    [branch] = request.running.values()
    text, tokens = "".join(branch.texts), tuple(leg.draft[: len(positions)])
    branch.texts.clear()
    return Update(request.id, 0, tokens, text, _accepted_logprobs(positions, leg.params), seed=request.seed)


def _accepted_logprobs(positions: Sequence[Position | None], params: SamplingParams) -> tuple[Position, ...] | None:
    """Return the log-probabilities of tokens that were kept, as many as the request asks for; None if it asks for none."""
    if params.logprobs is None:
        return None
    wanted = params.logprobs
    found = []
    for position in positions:
        assert position is not None, "asked for by `checking_params`"
        entries = position.items()
        found.append({token: entry for n, (token, entry) in enumerate(entries) if n == 0 or entry.rank <= wanted})
    return tuple(found)


def _num_top(params: SamplingParams) -> int:
    return max(_NUM_TOP, params.logprobs or 0)
