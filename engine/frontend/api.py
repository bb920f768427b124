"""The values that clients of a frontend pass and receive, besides prompts and `SamplingParams`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from expertwire.engine.config.engine_config import check_name
from expertwire.scheduler.config import is_int, is_number

# Token id -> its log-probability: the sampled (or the prompt's) token first, then the most probable ones.
LogprobDict = dict[int, "Logprob"]
Position = Mapping[int, "Logprob"]  # the same, read-only


@dataclass(frozen=True, kw_only=True)
class RequestOptions:
    """Options of one request for the scheduler.

    Args:
        priority: lower is served earlier with the scheduling policy "priority"; in [-2**31, 2**31).
        tenant: name of the client for fair sharing and limits; at most 128 characters.
        cache_salt: requests share cached prefixes only within one tenant and salt; at most 128 characters.
        deadline_s: seconds from now within which the first token must come; None: no deadline.

    Raises:
        ValueError: names the field and the values it allows.
    """

    priority: int = 0
    tenant: str = ""
    cache_salt: str = ""
    deadline_s: float | None = None

    def __post_init__(self) -> None:
        if not is_int(self.priority) or not -(2**31) <= self.priority < 2**31:
            raise ValueError(f"priority must be an integer in [-2**31, 2**31), got {self.priority!r}")
        for field in ("tenant", "cache_salt"):
            check_name(field, getattr(self, field))
        value = self.deadline_s
        if value is not None and (not is_number(value) or value < 0):
            raise ValueError(f"deadline_s must be None or a number of seconds >= 0, got {value!r}")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return dict(vars(self))


class Logprob(NamedTuple):
    """Log-probability of a token under the model's raw logits.

    `rank` is 1 for the most probable token; `decoded_token` is None without a tokenizer.
    """

    logprob: float
    rank: int
    decoded_token: str | None


class RequestError(NamedTuple):
    """Error that ended a request.

    `code` is the name of a gRPC status, for instance RESOURCE_EXHAUSTED; `retry_after_s` is the time to wait before trying
    again, if known.
    """

    code: str
    message: str
    retry_after_s: float | None = None


class Update(NamedTuple):
    """New output of one branch of a request.

    Attributes:
        request_id: the id that `Frontend.submit` returned.
        branch: index of the output among the request's `n`.
        token_ids: new tokens, including an end-of-sequence or stop token.
        text: new text, without the stop string, end-of-sequence or stop token that ends the output. Text that may be the
            beginning of a stop string is held back.
        logprobs: one entry per new token if requested, else None.
        sampled_logprobs: the sampled tokens' alone, where a frontend's own part has asked for these (`Frontend.submit`).
        prompt_logprobs: once, on branch 0, if requested: one entry per prompt token, None for the first.
        expert_load: with `finish_reason`, if requested: number of the branch's computed tokens by layer and expert. A token
            counts once; tokens found in the prefix cache and the last one do not count.
        finish_reason: "stop", "length" or "abort" on the branch's last update.
        stop_reason: the stop string or the id among `stop_token_ids` that ended the branch.
        seed: seed of the request; sampling depends on (seed, branch, position) alone.
        num_cached_tokens: number of prompt tokens that branch 0 found in the prefix cache; 0 before its first token.
        paused: whether the branch is paused after its last token.
        error: error of the whole request, which is its last update.
        done: whether this is the request's last update.
    """

    request_id: int
    branch: int = 0
    token_ids: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[Position, ...] | None = None
    sampled_logprobs: tuple[float, ...] = ()
    prompt_logprobs: list[Position | None] | None = None
    expert_load: list[list[int]] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    seed: int = 0
    num_cached_tokens: int = 0
    paused: bool = False
    error: RequestError | None = None
    done: bool = False


class RequestFailed(Exception):
    """A request ends with an error that is not its client's fault alone; `error` says which."""

    def __init__(self, error: RequestError) -> None:
        super().__init__(f"{error.code}: {error.message}")
        self.error = error


class EngineFailed(RuntimeError):
    """The engine has failed and can generate nothing more.

    Attributes:
        rank: the rank at fault, -1 if none is.
    """

    def __init__(self, message: str, rank: int = -1) -> None:
        super().__init__(message)
        self.rank = rank

    def __reduce__(self) -> tuple[type[EngineFailed], tuple[str, int]]:
        return EngineFailed, (str(self), self.rank)
