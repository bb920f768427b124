"""What fronts and the controller say to each other, as named arrays (`comm.control` carries them).

A front opens a channel, sends `Hello`, and receives `Welcome`. Then it sends `Submit` and `Abort` messages, in any order, and
receives `Outputs`, `Rejected`, `Stats` and at most one `Failure`, after which the channel is of no more use. Request ids are
chosen by the front and are unique on its channel; an output with `n` branches is `n` requests (same seed, branch 0..n-1).

Shape letters: Q requests, O outputs (one token of one request each), R prompt-log-probability rows, C counts of experts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Hello:
    """First message of a front."""


@dataclass(frozen=True, kw_only=True)
class Welcome:
    """The controller's answer: what is served, as a dictionary of JSON values (`ModelInfo.to_dict`)."""

    model_info: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Submit:
    """New requests. `params[i].seed` is never None here: the front has chosen one."""

    ids_Q: np.ndarray  # i64
    branches_Q: np.ndarray  # i32
    params: list[dict[str, Any]]  # `SamplingParams.to_dict`, one a request
    options: list[dict[str, Any]]  # `RequestOptions.to_dict`, one a request; a deadline counts from when this arrives
    token_offsets_Q1: np.ndarray  # i64
    tokens: np.ndarray  # i32


@dataclass(frozen=True, kw_only=True)
class Abort:
    """The client is gone, or a stop string was found: free these requests. Unknown and finished ids are ignored."""

    ids: np.ndarray  # i64


@dataclass(frozen=True, kw_only=True)
class AskStats:
    """Ask for a `Stats` answer."""


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """What one step says of a front's requests. Log-probability fields as in `scheduler.plan.StepResult`."""

    step: int
    id_O: np.ndarray  # i64
    token_O: np.ndarray  # i32; -1 on a row that carries only prompt log-probabilities or an abort
    finish_O: np.ndarray  # u8, FinishReason
    num_cached_O: np.ndarray  # i32, prompt tokens that the request found in the prefix cache
    logprob_O: np.ndarray  # f32
    token_rank_O: np.ndarray  # i32
    top_offsets_O1: np.ndarray  # i32
    top_ids: np.ndarray  # i32
    top_logprobs: np.ndarray  # f32
    prompt_id_R: np.ndarray  # i64
    prompt_position_R: np.ndarray  # i32
    prompt_logprob_R: np.ndarray  # f32
    prompt_token_rank_R: np.ndarray  # i32
    prompt_top_offsets_R1: np.ndarray  # i32
    prompt_top_ids: np.ndarray  # i32
    prompt_top_logprobs: np.ndarray  # f32
    routed_id_C: np.ndarray  # i64
    routed_expert_C: np.ndarray  # i32, layer * logical experts + expert; of one request it may be there twice
    routed_tokens_C: np.ndarray  # i32, those computed in this step that went to it


@dataclass(frozen=True, kw_only=True)
class Rejected:
    """Answers to requests that were not admitted. `code` is the name of a gRPC status, for instance INVALID_ARGUMENT.

    `retry_after_s` is when to try a RESOURCE_EXHAUSTED request again; None if nothing is known.
    """

    ids: list[int]
    codes: list[str]
    messages: list[str]
    retry_after_s: list[float | None]


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Counters and gauges of the engine, JSON values; the keys are documented where `engine.controller` fills them."""

    values: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Failure:
    """The engine cannot go on: for instance a rank has died. `rank` is -1 when no rank is to blame."""

    rank: int
    message: str


Message = Hello | Welcome | Submit | Abort | AskStats | Outputs | Rejected | Stats | Failure
_KINDS: Mapping[str, type] = {
    kind.__name__: kind for kind in (Hello, Welcome, Submit, Abort, AskStats, Outputs, Rejected, Stats, Failure)
}


def encode(message: Message) -> dict[str, np.ndarray]:
    """A message as named arrays: arrays as they are, everything else in one JSON array of bytes named `_`."""
    arrays: dict[str, np.ndarray] = {}
    plain: dict[str, Any] = {"kind": type(message).__name__}
    for name, value in vars(message).items():
        if isinstance(value, np.ndarray):
            arrays[name] = value
        else:
            plain[name] = value
    arrays["_"] = np.frombuffer(json.dumps(plain).encode(), np.uint8)
    return arrays


def decode(arrays: Mapping[str, np.ndarray]) -> Message:
    """The inverse of `encode`.

    Raises:
        ValueError: the message is none of ours.
    """
    try:
        plain = json.loads(bytes(arrays["_"]))
        kind = _KINDS[plain.pop("kind")]
        return kind(**plain, **{name: value for name, value in arrays.items() if name != "_"})
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"not a message of this protocol: fields {sorted(arrays)}") from error
