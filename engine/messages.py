"""Messages between frontends and the controller, and their encoding as named arrays (see `comm.control.channel`).

A frontend opens a channel, sends `Hello` and receives `Welcome`. Then it sends `Submit`, `Credit`, `Resume`, `Abort`,
`AbortByName`, `Count`, `StatsRequest` and `CacheFlush` in any order, and receives `StepOutputs`, `Rejection`, `Stats`,
`CacheFlush`, `AbortByName`, `Beat` if it asked for it, and at most one `Failure`, the last.
The frontend chooses the sequence ids, unique on its channel; a request with `n` branches has `n` of them.

**Branches.** The sequences of one `Submit` are a group: their common tokens are computed once, and either all are accepted or one
`Rejection` names the first. More branches of the same request are another `Submit` with the same `params` and the next
`first_branch`: from the prompt, or, a *fork*, from the prompt and output tokens that the frontend knows or wants
(`num_prompt_tokens`). Draws are a function of (seed, branch, position) alone, so a branch does not depend on when it starts.

**Pauses.** A sequence that samples one of its `pause_token_ids` is paused: that token has PAUSED for a finish reason in
`StepOutputs`, and no token follows until `Resume`. A token that had been sampled by then comes when it is resumed; it may be the
last one, or have PAUSED in its turn. A token that ends the sequence has its own finish reason. `Credit` and `Abort` work as ever.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

from expertwire.scheduler.outputs import Rejection, StepOutputs


@dataclass(frozen=True, kw_only=True)
class Hello:
    """First message of a frontend.

    Args:
        beats: whether the controller shall send a `Beat` at least twice a second.
    """

    beats: bool = False


@dataclass(frozen=True, kw_only=True)
class Welcome:
    """The controller's answer: `ModelInfo.to_dict`, and whether beats follow."""

    model_info: dict[str, Any]
    beats: bool = False


@dataclass(frozen=True, kw_only=True)
class Submit:
    """A group of branches of a request.

    Args:
        sequence_ids: i64, of the branches `first_branch` and on.
        params: `SamplingParams.to_dict`, with a seed, which the frontend chose if need be. `max_tokens` and `min_tokens` count
            the output tokens in `tokens`, too. Prompt log-probabilities come with branch 0 only.
        options: `RequestOptions.to_dict`; a deadline counts from the arrival of this message.
        tokens: i32, the prompt and what the output begins with.
        credit: output tokens that each sequence may sample before the frontend sends `Credit`; None: no limit.
        num_prompt_tokens: how many of `tokens` are the prompt; None: all.
        first_branch: index of the first sequence among the branches of its request.
        parent: id of a sequence with which these share the cache blocks of their common tokens if it still has them; else they
            find them in the prefix cache or compute them again. Any id is allowed, also of a sequence that has ended.
        pause_token_ids: i32, ascending: ids after which a sequence is paused, at most 65,536.
    """

    sequence_ids: np.ndarray
    params: dict[str, Any]
    options: dict[str, Any]
    tokens: np.ndarray
    credit: int | None = None
    num_prompt_tokens: int | None = None
    first_branch: int = 0
    parent: int | None = None
    pause_token_ids: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))


@dataclass(frozen=True, kw_only=True)
class Credit:
    """The reader has taken tokens of these sequences: each may sample as many more. Unknown and finished ids are ignored."""

    ids: np.ndarray  # i64
    tokens: np.ndarray  # i64


@dataclass(frozen=True, kw_only=True)
class Resume:
    """Let these paused sequences go on. Ids that are unknown, finished or not paused are ignored."""

    ids: np.ndarray  # i64


@dataclass(frozen=True, kw_only=True)
class Abort:
    """Free these sequences: the client has gone, or a stop string was found. Unknown and finished ids are ignored."""

    ids: np.ndarray  # i64


@dataclass(frozen=True, kw_only=True)
class Count:
    """Counts of the frontend since its last message, by name. `Stats` has the sums over all frontends since the start."""

    values: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class StatsRequest:
    """Request for a `Stats` message."""


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Counters and gauges of the engine, as JSON values; `engine.controller` documents the keys."""

    values: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class CacheFlush:
    """Request to empty the prefix cache of blocks that no request uses; the answer has their number on all ranks, by cache."""

    freed_blocks: dict[str, int] | None = None


@dataclass(frozen=True, kw_only=True)
class AbortByName:
    """Abort requests by the ids that clients gave them, wherever they are: the controller passes it on to every frontend."""

    tenant: str
    request_ids: list[str]


@dataclass(frozen=True, kw_only=True)
class Beat:
    """The controller works. `problem` says why the engine cannot serve at the moment, for instance that a rank is silent."""

    problem: str


@dataclass(frozen=True, kw_only=True)
class Failure:
    """The engine has failed, for instance because a rank has died. `rank` is -1 when no rank is at fault."""

    rank: int
    message: str


Message = (
    Hello
    | Welcome
    | Submit
    | Credit
    | Resume
    | Abort
    | AbortByName
    | Count
    | StatsRequest
    | CacheFlush
    | StepOutputs
    | Rejection
    | Stats
    | Beat
    | Failure
)
_KINDS: Mapping[str, type] = {kind.__name__: kind for kind in get_args(Message)}


def encode(message: Message) -> dict[str, np.ndarray]:
    """Return a message as named arrays: its arrays as they are, all other fields as JSON in an array of bytes named `_`."""
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
    """Return the message that `encode` encoded.

    Raises:
        ValueError: the arrays are no such message.
    """
    try:
        plain = json.loads(bytes(arrays["_"]))
        kind = _KINDS[plain.pop("kind")]
        return kind(**plain, **{name: value for name, value in arrays.items() if name != "_"})
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"not a message of this protocol: fields {sorted(arrays)}") from error
