"""Conversions between the messages of `expertwire.v1` and the values of the engine's frontend."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from expertwire.deploy.proto import expertwire_v1_pb2 as pb
from expertwire.engine.config.engine_config import ModelInfo
from expertwire.engine.frontend.api import Position, RequestOptions, Update
from expertwire.engine.frontend.chat import JSON_FIELDS, Chat, ChatText
from expertwire.engine.frontend.logprobs import rows_of
from expertwire.engine.frontend.output_formats import OutputFormat
from expertwire.scheduler.sampling_params import SamplingParams, check_lengths

FINISH_REASONS: Mapping[str, pb.FinishReason] = {
    "stop": pb.FINISH_REASON_STOP,
    "length": pb.FINISH_REASON_LENGTH,
    "abort": pb.FINISH_REASON_ABORT,
}


def to_prompt(request: pb.GenerateRequest | pb.TokenizeRequest) -> str | Sequence[int] | ChatText:
    """Return the prompt of a request; nothing looks at its contents here.

    Raises:
        ValueError: there is none.
    """
    kind = request.WhichOneof("prompt")
    if kind is None:
        allowed = ", ".join(field.name for field in request.DESCRIPTOR.oneofs_by_name["prompt"].fields)
        raise ValueError(f"prompt is missing: set one of {allowed}")
    if kind == "chat":
        return ChatText(fields={field.name: value for field, value in request.chat.ListFields()})
    if kind == "text":
        return request.text
    assert isinstance(request, pb.GenerateRequest), kind
    return request.token_ids.ids


def from_chat(chat: Chat) -> pb.Chat:
    """Return the message of a chat. A template of the client's own cannot be sent.

    Raises:
        ValueError: a value cannot be JSON, or `chat_template` is set.
    """
    if chat.chat_template is not None:
        raise ValueError("chat_template cannot be sent: the server uses the model's templates")
    values = {field.name: getattr(chat, field.name) for field in dataclasses.fields(chat)}
    del values["chat_template"]
    return pb.Chat(**{name: _to_json(name, value) for name, value in values.items() if value is not None})


def to_options(request: pb.GenerateRequest, tenant: str, deadline_s: float | None) -> RequestOptions:
    """Return the options of a request that counts for `tenant`.

    Raises:
        ValueError: names the field and the values it allows.
    """
    return RequestOptions(
        priority=request.priority, tenant=tenant, cache_salt=request.cache_salt, deadline_s=deadline_s
    )


def to_sampling_params(message: pb.SamplingParams, info: ModelInfo) -> SamplingParams:
    """Return the sampling parameters of a message; fields that are not set have the model's defaults.

    Raises:
        ValueError: names the field and the values it allows.
    """
    fields = {field.name: value for field, value in message.ListFields()}
    check_lengths(fields)
    return info.sampling_params(**{name: _plain(value) for name, value in fields.items()})


def from_sampling_params(values: Mapping[str, Any]) -> pb.SamplingParams:
    """Return the message of those fields of `SamplingParams` that are not None.

    Raises:
        ValueError: an unknown field or a value of the wrong type.
    """
    fields = {name: value for name, value in values.items() if value is not None}
    if isinstance(fields.get("stop"), str):
        fields["stop"] = [fields["stop"]]
    if unknown := sorted(fields.keys() - pb.SamplingParams.DESCRIPTOR.fields_by_name.keys()):
        allowed = ", ".join(pb.SamplingParams.DESCRIPTOR.fields_by_name)
        raise ValueError(f"no sampling parameter is called {unknown[0]}; there are {allowed}")
    try:
        return pb.SamplingParams(**fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"sampling parameters {fields}: {error}") from error


def from_model_info(info: ModelInfo, output_format: OutputFormat | None, chat_variables: Sequence[str]) -> pb.ModelInfo:
    """Return the message of `info`, with the output format and the chat template's variables."""
    values = dataclasses.asdict(info)
    del values["path"], values["all_to_all"]
    values["default_sampling_params"] = from_sampling_params(info.default_sampling_params)
    values["output_format"] = None if output_format is None else from_output_format(output_format)
    version = importlib.metadata.version("expertwire")
    return pb.ModelInfo(version=version, chat_variables=chat_variables, **values)


def from_output_format(output_format: OutputFormat) -> pb.OutputFormat:
    """Return the message of an output format, without its marks."""
    start, end = output_format.reasoning or ("", "")
    return pb.OutputFormat(
        name=output_format.name,
        reasoning_start=start,
        reasoning_end=end,
        end_of_turn=output_format.end_of_turn,
        reasoning_efforts=output_format.reasoning_efforts,
    )


def from_stats(values: Mapping[str, Any]) -> pb.Stats:
    """Return the message of `Frontend.stats`."""
    message = pb.Stats()
    message.values.update({name: value for name, value in values.items() if name != "expert_load"})
    for tokens in values.get("expert_load", ()):
        message.expert_load.add(tokens=tokens)
    return message


def from_loads(values: Mapping[str, Any]) -> pb.Loads:
    """Return the loads of the ranks from `Frontend.stats`."""
    ranks = [
        pb.RankLoad(
            rank=rank,
            num_running=num_running,
            outstanding_tokens=values["outstanding_tokens"][rank],
            blocks_used={cache: used[rank] for cache, used in values["blocks_used"].items()},
            blocks_total=values["blocks"],
        )
        for rank, num_running in enumerate(values["running"])
    ]
    return pb.Loads(num_waiting=values["num_waiting"], num_held=values["held"], ranks=ranks)


def from_expert_loads(values: Mapping[str, Any]) -> pb.ExpertLoads:
    """Return the tokens of the experts from `Frontend.stats`."""
    return pb.ExpertLoads(layers=[pb.ExpertLoad(tokens=tokens) for tokens in values["expert_load"]])


def add_logprobs(field: Any, positions: Iterable[Position | None]) -> None:
    """Append log-probabilities to a field of `PositionLogprobs`, in the order of each position; None becomes an empty entry."""
    for position in positions:
        add = field.add().tokens.add
        for token, logprob, rank, text in () if position is None else rows_of(position):
            entry = add()  # setting its fields one by one takes half the time of passing them
            entry.token_id, entry.logprob, entry.rank = token, logprob, rank
            entry.decoded_token = text or ""


def write_chunk(chunk: pb.Chunk, update: Update) -> None:
    """Write an update into an empty chunk. Most have one token and its text, and there is one for each token."""
    if update.branch:
        chunk.branch = update.branch
    chunk.token_ids.extend(update.token_ids)
    if update.text:
        chunk.text = update.text
    if update.logprobs is not None:
        add_logprobs(chunk.logprobs, update.logprobs)
    if update.finish_reason is not None:
        chunk.finish_reason = FINISH_REASONS[update.finish_reason]
    if update.expert_load is not None:
        chunk.expert_load.extend(pb.ExpertLoad(tokens=tokens) for tokens in update.expert_load)
    if isinstance(update.stop_reason, str):
        chunk.stop_string = update.stop_reason
    elif update.stop_reason is not None:
        chunk.stop_token_id = update.stop_reason


def _to_json(field: str, value: Any) -> Any:
    try:
        return json.dumps(value, ensure_ascii=False) if field in JSON_FIELDS else value
    except (TypeError, ValueError) as error:
        raise ValueError(f"{field} must be a JSON value: {error}") from error


def _plain(value: Any) -> Any:
    if isinstance(value, bool | int | float | str):
        return value
    return dict(value) if isinstance(value, Mapping) else list(value)
