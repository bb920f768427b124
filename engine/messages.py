"""What fronts and the controller say to each other, as named arrays (`comm.control.channel` carries them).

A front opens a channel, sends `Hello`, and receives `Welcome`. Then it sends `Submit` and `Abort` messages, in any order, and
receives `StepOutputs`, `Rejection`, `Stats` and at most one `Failure`, after which the channel is of no more use. Request ids are
chosen by the front and are unique on its channel; a request with `n` branches has `n` of them.

Shape letter: B branches of a request.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

from expertwire.scheduler.outputs import StepOutputs
from expertwire.scheduler.request import Rejection


@dataclass(frozen=True, kw_only=True)
class Hello:
    """First message of a front."""


@dataclass(frozen=True, kw_only=True)
class Welcome:
    """The controller's answer: what is served, as a dictionary of JSON values (`ModelInfo.to_dict`)."""

    model_info: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Submit:
    """A request: an id for each of its branches, from 0 on. The front has chosen the seed, so `params` has one."""

    ids_B: np.ndarray  # i64
    params: dict[str, Any]  # `SamplingParams.to_dict`; of branches that share a prompt, the first reports on it
    options: dict[str, Any]  # `RequestOptions.to_dict`; a deadline counts from when this arrives
    tokens: np.ndarray  # i32, the prompt


@dataclass(frozen=True, kw_only=True)
class Abort:
    """The client is gone, or a stop string was found: free these requests. Unknown and finished ids are ignored."""

    ids: np.ndarray  # i64


@dataclass(frozen=True, kw_only=True)
class AskStats:
    """Ask for a `Stats` answer."""


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Counters and gauges of the engine, JSON values; the keys are documented where `engine.controller` fills them."""

    values: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Failure:
    """The engine cannot go on: for instance a rank has died. `rank` is -1 when no rank is to blame."""

    rank: int
    message: str


Message = Hello | Welcome | Submit | Abort | AskStats | StepOutputs | Rejection | Stats | Failure
_KINDS: Mapping[str, type] = {kind.__name__: kind for kind in get_args(Message)}


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
