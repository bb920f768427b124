"""Which requests can be served at all. The others are answered with a `Rejection`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from expertwire.scheduler.config import SchedulerConfig
from expertwire.scheduler.request import Request


@dataclass(frozen=True)
class Rejection:
    """The answer to a request that is not accepted.

    Args:
        key: of the request.
        code: name of a gRPC status. INVALID_ARGUMENT: never possible; RESOURCE_EXHAUSTED: try again later.
        message: names the field, its value and what is allowed.
    """

    key: int
    code: str
    message: str


def token_limit(request: Request, config: SchedulerConfig) -> int:
    """Prompt and output tokens at most: `max_tokens` is cut to what `max_model_len` leaves for it."""
    return min(len(request.prompt) + request.params.max_tokens, config.max_model_len)


def worst_case_blocks(limit: int, config: SchedulerConfig) -> int:
    """Blocks of one cache that a request of `limit` tokens may take; the last token is never computed."""
    return config.blocks_for(limit - 1)


def invalid(request: Request, config: SchedulerConfig) -> str | None:
    """Why the request can never be served; None if it can."""
    length, params = len(request.prompt), request.params
    if length == 0:
        return "prompt must have at least 1 token, got 0"
    if length >= config.max_model_len:
        return (
            f"prompt has {length} tokens; allowed are at most {config.max_model_len - 1} "
            f"(max_model_len = {config.max_model_len}, of which one is for the output)"
        )
    wrong = np.flatnonzero((request.prompt < 0) | (request.prompt >= config.vocab_size))
    for field, ids in (
        (f"prompt[{wrong[0]}]" if len(wrong) else "", request.prompt[wrong[:1]]),
        ("stop_token_ids", params.stop_token_ids or ()),
        ("logit_bias", params.logit_bias or ()),
    ):
        for token in ids:
            if not 0 <= token < config.vocab_size:
                return f"{field} names token {token}; allowed are 0 to {config.vocab_size - 1}"
    for field in ("logprobs", "prompt_logprobs"):
        if (getattr(params, field) or 0) > config.vocab_size:
            return f"{field} is {getattr(params, field)}; allowed are at most {config.vocab_size}, the size of the vocabulary"
    limit = token_limit(request, config)
    blocks, capacity = worst_case_blocks(limit, config), config.num_blocks - 1
    if blocks > capacity:
        return (
            f"prompt ({length} tokens) and max_tokens ({limit - length} after max_model_len) need {blocks} cache blocks; a rank "
            f"has {capacity}, which is enough for {capacity * config.block_size + 1} tokens in all"
        )
    return None
