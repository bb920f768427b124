"""Messages of clients as Python values: requests from arguments, outputs, usage, and errors of the server."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import grpc
from google.protobuf import json_format

from expertwire.deploy.grpc.group_results import GroupResult, from_group_result
from expertwire.deploy.grpc.messages import FINISH_REASONS, from_chat, from_sampling_params
from expertwire.deploy.grpc.status import PUSHBACK
from expertwire.deploy.grpc.strategy_messages import from_strategy
from expertwire.deploy.proto import expertwire_v1_pb2 as pb
from expertwire.engine.frontend.api import Logprob, LogprobDict
from expertwire.engine.frontend.chat import Chat

_REASON_NAMES = {code: name for name, code in FINISH_REASONS.items()}
_CHAT_OPTIONS = tuple(field.name for field in pb.Chat.DESCRIPTOR.fields if field.name != "messages")
_OPTIONS = ("request_id", "priority", "tenant", "cache_salt", "model")
_STRATEGY = ("strategy", "all_branches")


class ServerError(RuntimeError):
    """Error status of a call.

    Attributes:
        code: name of the gRPC status, for instance "INVALID_ARGUMENT".
        message: the server's message.
        retry_after_s: seconds to wait before trying again, if the server knows.
    """

    def __init__(self, code: str, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """New output of one branch."""

    branch: int
    token_ids: list[int]
    text: str
    logprobs: list[LogprobDict] | None  # one entry per token, if requested
    finish_reason: str | None  # "stop", "length" or "abort" on the last chunk
    stop_reason: str | int | None  # the stop string or stop token that matched
    expert_load: list[list[int]] | None  # by layer and expert, on the last chunk, if requested


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Token counts, times and seed of a request. Fields as in the .proto."""

    prompt_tokens: int
    completion_tokens: int
    seed: int
    cached_prompt_tokens: int
    reasoning_tokens: int
    time_to_first_token_s: float
    total_time_s: float
    kept_tokens: int
    pruned_tokens: int
    verifier_tokens: int


class LegResult(NamedTuple):
    """One model's part in a request of a cascade; fields as in the .proto."""

    model: str
    tokens: int
    complete: bool
    latency_s: float
    draft_tokens: int
    accepted_tokens: int


@dataclass(frozen=True)
class CascadeResult:
    """Which model of a cascade answered, and why; fields as in the .proto."""

    model: str
    reason: str
    policy_version: str
    legs: list[LegResult]
    in_random_slice: bool


class Progress:
    """Progress of a request's stream.

    Attributes:
        request_id: id for `abort`.
        opens_reasoning: whether the prompt has the start of reasoning, so that the text begins within it; set before the first
            chunk.
        prompt_logprobs: one entry per prompt token, None for the first, if requested; complete before the first chunk.
        usage: set when the stream has ended without an error.
        group: likewise, of a request with a strategy.
        cascade: likewise, of a request that names a cascade.
    """

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.opens_reasoning = False
        self.prompt_logprobs: list[LogprobDict | None] = []
        self.usage: Usage | None = None
        self.group: GroupResult | None = None
        self.cascade: CascadeResult | None = None
        self._group = pb.GroupResult()

    def add(self, message: pb.GenerateResponse) -> list[Chunk]:
        """Take note of a message; return its chunks."""
        self.opens_reasoning |= message.opens_reasoning
        self.prompt_logprobs += [_to_logprobs(entry) for entry in message.prompt_logprobs]
        if message.HasField("group"):
            self._group.MergeFrom(message.group)
        if message.HasField("cascade"):
            self.cascade = _to_cascade(message.cascade)
        if message.HasField("usage"):
            self.group = from_group_result(self._group) if self._group.branches else None
            self.usage = Usage(**{field: getattr(message.usage, field) for field in _USAGE_FIELDS})
        return [_to_chunk(chunk) for chunk in message.chunks]


def _to_cascade(message: pb.CascadeResult) -> CascadeResult:
    legs = [LegResult(*(getattr(leg, field) for field in LegResult._fields)) for leg in message.legs]
    return CascadeResult(message.model, message.reason, message.policy_version, legs, message.in_random_slice)


_USAGE_FIELDS = tuple(pb.Usage.DESCRIPTOR.fields_by_name)


def channel_options(retries: int) -> list[tuple[str, Any]]:
    """Return the options of a channel that tries calls again, as gRFC A6 defines it.

    Args:
        retries: tries after the first, in [0, 4].

    Raises:
        ValueError: `retries` is something else.
    """
    if retries not in range(5):
        raise ValueError(f"retries must be an integer in [0, 4], got {retries!r}")
    policy = {
        "maxAttempts": retries + 1,
        "initialBackoff": "0.2s",
        "maxBackoff": "5s",
        "backoffMultiplier": 2,
        "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED"],
    }
    config = {"methodConfig": [{"name": [{"service": "expertwire.v1.Inference"}], "retryPolicy": policy}]}
    return [("grpc.service_config", json.dumps(config))] if retries else [("grpc.enable_retries", 0)]


def make_request(prompt: str | Sequence[int] | Chat, arguments: Mapping[str, Any]) -> pb.GenerateRequest:
    """Return the request for a prompt.

    Args:
        prompt: text, token ids or a chat.
        arguments: options of the request and sampling parameters, by name; None counts as absent.

    Raises:
        ValueError: an argument is unknown or of the wrong type.
    """
    options = {name: arguments[name] for name in _OPTIONS if arguments.get(name) is not None}
    others = {name: value for name, value in arguments.items() if name not in _OPTIONS + _STRATEGY}
    params = from_sampling_params(others)
    try:
        request = pb.GenerateRequest(**{"request_id": uuid.uuid4().hex, **options}, sampling_params=params)
    except (TypeError, ValueError) as error:
        raise ValueError(f"request options {options}: {error}") from error
    if (strategy := arguments.get("strategy")) is not None:
        request.strategy.CopyFrom(from_strategy(strategy))
    if (all_branches := arguments.get("all_branches")) is not None:
        if strategy is None:
            raise ValueError(f"all_branches needs a strategy, got {all_branches!r} without one")
        request.strategy.all_branches = all_branches
    if isinstance(prompt, Chat):
        request.chat.CopyFrom(from_chat(prompt))
    elif isinstance(prompt, str):
        request.text = prompt
    else:
        request.token_ids.SetInParent()
        request.token_ids.ids.extend(prompt)
    return request


def make_chat(messages: Sequence[Mapping[str, Any]], arguments: dict[str, Any]) -> Chat:
    """Return the chat of these messages, with its options, which are taken out of the arguments.

    Raises:
        ValueError: the chat is malformed.
    """
    options = {name: arguments.pop(name) for name in _CHAT_OPTIONS if name in arguments}
    return Chat(messages=messages, **{name: value for name, value in options.items() if value is not None})


def make_tokenize_request(prompt: str | Chat, *, add_special_tokens: bool) -> pb.TokenizeRequest:
    """Return the request for the tokens of a text or a chat."""
    if isinstance(prompt, Chat):
        return pb.TokenizeRequest(chat=from_chat(prompt))
    return pb.TokenizeRequest(text=prompt, add_special_tokens=add_special_tokens)


def from_model_info(info: pb.ModelInfo) -> dict[str, Any]:
    """Return the fields of the message, messages as dictionaries."""
    return {field.name: getattr(info, field.name) for field in pb.ModelInfo.DESCRIPTOR.fields} | {
        "output_format": json_format.MessageToDict(info.output_format, preserving_proto_field_name=True),
        "default_sampling_params": {field.name: value for field, value in info.default_sampling_params.ListFields()},
    }


def from_stats(stats: pb.Stats) -> dict[str, Any]:
    """Return counters and gauges by name; `expert_load` has tokens by layer and expert."""
    return {**json_format.MessageToDict(stats.values), "expert_load": [list(e.tokens) for e in stats.expert_load]}


def from_server_info(info: pb.ServerInfo) -> dict[str, Any]:
    """Return version, uptime_s, fronts, and the options with their reasons: name -> (value, reason)."""
    config = {entry.name: (json.loads(entry.value), entry.reason) for entry in info.config}
    return {"version": info.version, "uptime_s": info.uptime_s, "fronts": info.fronts, "config": config}


def from_loads(loads: pb.Loads) -> dict[str, Any]:
    """Return num_waiting, num_held, and the ranks' loads as dictionaries."""
    ranks = [
        {
            "rank": rank.rank,
            "num_running": rank.num_running,
            "outstanding_tokens": rank.outstanding_tokens,
            "blocks_used": dict(rank.blocks_used),
            "blocks_total": dict(rank.blocks_total),
        }
        for rank in loads.ranks
    ]
    return {"num_waiting": loads.num_waiting, "num_held": loads.num_held, "ranks": ranks}


def to_server_error(error: grpc.RpcError) -> ServerError:
    """Return the error of a failed call."""
    metadata: Any = error.trailing_metadata() or ()
    wait_ms = int(dict(metadata).get(PUSHBACK, -1))
    return ServerError(error.code().name, error.details() or "", None if wait_ms < 0 else wait_ms / 1e3)


def raise_server_error(error: grpc.RpcError) -> NoReturn:
    """Raise the `ServerError` of a failed call."""
    raise to_server_error(error) from error


def _to_chunk(chunk: pb.Chunk) -> Chunk:
    stop = chunk.WhichOneof("stop_reason")
    return Chunk(
        branch=chunk.branch,
        token_ids=list(chunk.token_ids),
        text=chunk.text,
        logprobs=[_to_logprobs(entry) or {} for entry in chunk.logprobs] or None,
        finish_reason=_REASON_NAMES.get(chunk.finish_reason),
        stop_reason=stop and getattr(chunk, stop),
        expert_load=[list(layer.tokens) for layer in chunk.expert_load] or None,
    )


def _to_logprobs(entry: pb.PositionLogprobs) -> LogprobDict | None:
    return {token.token_id: Logprob(token.logprob, token.rank, token.decoded_token) for token in entry.tokens} or None
