"""Log-probabilities of a step's outputs, as dictionaries by token. Shape letters as in `scheduler.outputs`."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from expertwire.engine.frontend.api import Logprob, LogprobDict
from expertwire.engine.frontend.open_requests import Branch
from expertwire.engine.frontend.tokenizer import Tokenizer
from expertwire.scheduler.outputs import StepOutputs


def sampled(message: StepOutputs, row: int, tokenizer: Tokenizer | None) -> LogprobDict:
    """Return the log-probabilities of one row: the sampled token's first."""
    top = slice(message.top_offsets_O1[row], message.top_offsets_O1[row + 1])
    own = int(message.token_O[row]), float(message.logprob_O[row]), int(message.token_rank_O[row])
    return _entries(*own, message.top_ids[top], message.top_logprobs[top], tokenizer)


def add_prompt_logprobs(message: StepOutputs, sequences: Mapping[int, Branch], tokenizer: Tokenizer | None) -> None:
    """Note the log-probabilities of prompt tokens in the requests of `sequences`, by sequence id."""
    offsets = message.prompt_top_offsets_I1.tolist()
    values = zip(message.prompt_logprob_I.tolist(), message.prompt_token_rank_I.tolist(), strict=True)
    rows = zip(message.prompt_key_I.tolist(), message.prompt_position_I.tolist(), values, strict=True)
    for row, (sequence_id, position, (logprob, rank)) in enumerate(rows):
        branch = sequences.get(sequence_id)
        # The prompt of a preempted request is computed again; its log-probabilities have been reported.
        if branch is None or branch.request.prompt_logprobs is None:
            continue
        top = slice(offsets[row], offsets[row + 1])
        own = branch.request.prompt[position], logprob, rank
        entries = _entries(*own, message.prompt_top_ids[top], message.prompt_top_logprobs[top], tokenizer)
        branch.request.prompt_logprobs[position] = entries


def _entries(
    token: int, logprob: float, rank: int, ids: np.ndarray, values: np.ndarray, tokenizer: Tokenizer | None
) -> LogprobDict:
    text_of = tokenizer.token_text if tokenizer else _no_text
    entries = {token: Logprob(logprob, rank, text_of(token))}
    for place, (top, value) in enumerate(zip(ids.tolist(), values.tolist(), strict=True), start=1):
        if top != token:
            entries[top] = Logprob(value, place, text_of(top))
    return entries


def _no_text(token: int) -> None:
    return None
