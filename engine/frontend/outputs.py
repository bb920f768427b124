"""What a front tells its clients about their requests."""

from __future__ import annotations

from typing import NamedTuple

LogprobDict = dict[
    int, "Logprob"
]  # token id -> its log-probability; the token in question comes first, then the top ones


class Logprob(NamedTuple):
    """A token's log-probability under the model's raw logits.

    `rank` is 1 for the most probable token; `decoded_token` is None when the front has no tokenizer.
    """

    logprob: float
    rank: int
    decoded_token: str | None


class RequestError(NamedTuple):
    """Why a request got no (further) output. `code` is the name of a gRPC status, for instance RESOURCE_EXHAUSTED.

    `retry_after_s` is when to try again, if that is known.
    """

    code: str
    message: str
    retry_after_s: float | None = None


class Update(NamedTuple):
    """News of one branch of a request.

    Attributes:
        request_id: as returned by `Front.submit`.
        branch: which of the request's `n` outputs, from 0.
        token_ids: new tokens; an end-of-sequence or stop token is among them.
        text: new text. It is held back while it may be the beginning of a stop string, and ends before a stop string and before
            an end-of-sequence or stop token.
        logprobs: one entry a new token when asked for, else None.
        prompt_logprobs: once, on branch 0, when asked for: one entry a prompt token, None for the first.
        expert_load: with `finish_reason`, when asked for: by layer and expert, how many of the tokens that were computed for
            the branch went there. A token counts once, those found in the prefix cache and the last one do not.
        finish_reason: "stop", "length" or "abort" on the branch's last update.
        stop_reason: the stop string or the id among `stop_token_ids` that ended the branch.
        seed: of the request; the branch's draws follow from (seed, branch, position).
        num_cached_tokens: prompt tokens that branch 0 found in the prefix cache; 0 until its first token.
        error: the whole request failed; no further update comes.
        done: the request's last update.
    """

    request_id: int
    branch: int = 0
    token_ids: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[LogprobDict, ...] | None = None
    prompt_logprobs: list[LogprobDict | None] | None = None
    expert_load: list[list[int]] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    seed: int = 0
    num_cached_tokens: int = 0
    error: RequestError | None = None
    done: bool = False


class EngineFailed(RuntimeError):
    """The engine cannot go on; nothing can be generated any more.

    Attributes:
        rank: the rank to blame, -1 when there is none.
    """

    def __init__(self, message: str, rank: int = -1) -> None:
        super().__init__(message)
        self.rank = rank

    def __reduce__(self) -> tuple[type[EngineFailed], tuple[str, int]]:
        return EngineFailed, (str(self), self.rank)
