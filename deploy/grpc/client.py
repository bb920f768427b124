"""A synchronous client of the gRPC service `expertwire.v1`.

with Client("127.0.0.1:50051") as client:
    for chunk in client.generate("Once upon a time", temperature=0, max_tokens=64):
        print(chunk.text, end="", flush=True)
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Self

import grpc
from google.protobuf import json_format

from expertwire.deploy.grpc.messages import FINISH_REASONS, from_chat, from_sampling_params
from expertwire.deploy.grpc.status import PUSHBACK
from expertwire.deploy.proto import expertwire_v1_pb2 as pb
from expertwire.deploy.proto import expertwire_v1_pb2_grpc as pb_grpc
from expertwire.engine.frontend.api import Logprob, LogprobDict
from expertwire.engine.frontend.chat import Chat

_REASON_NAMES = {code: name for name, code in FINISH_REASONS.items()}


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
    """Token counts and seed of a request. Fields as in the .proto."""

    prompt_tokens: int
    completion_tokens: int
    seed: int
    cached_prompt_tokens: int
    reasoning_tokens: int
    time_to_first_token_s: float
    total_time_s: float


class Generation:
    """The stream of one request: iterate over its chunks once. Closing it early aborts the request.

    Attributes:
        request_id: id for `Client.abort`.
        opens_reasoning: whether the prompt has the start of reasoning, so that the text begins within it; set before the first
            chunk.
        prompt_logprobs: one entry per prompt token, None for the first, if requested; complete before the first chunk.
        usage: set when the stream has ended without an error.
    """

    def __init__(self, request_id: str, call: Any) -> None:  # a `grpc.Call` that is also an iterator
        self.request_id = request_id
        self.opens_reasoning = False
        self.prompt_logprobs: list[LogprobDict | None] = []
        self.usage: Usage | None = None
        self._call = call

    def __iter__(self) -> Iterator[Chunk]:
        """Raises `ServerError`."""
        try:
            for message in self._call:
                self.opens_reasoning |= message.opens_reasoning
                self.prompt_logprobs += [_to_logprobs(entry) for entry in message.prompt_logprobs]
                if message.HasField("usage"):
                    self.usage = Usage(**{name: getattr(message.usage, name) for name in _USAGE_FIELDS})
                yield from map(_to_chunk, message.chunks)
        except grpc.RpcError as error:
            _raise(error)
        finally:
            self._call.cancel()

    def close(self) -> None:
        """Abort the request, if it still runs."""
        self._call.cancel()


class Client:
    """A connection to a server.

    Args:
        address: "host:port".
        credentials: those of `credentials.ssl_credentials` for a server with TLS; None speaks plain text.
        token: bearer token of a tenant, sent with every call.
        timeout_s: timeout of all calls but `generate` and `chat`; None waits for ever.
    """

    def __init__(
        self,
        address: str = "127.0.0.1:50051",
        *,
        credentials: grpc.ChannelCredentials | None = None,
        token: str | None = None,
        timeout_s: float | None = 30.0,
    ) -> None:
        self._channel = (
            grpc.insecure_channel(address) if credentials is None else grpc.secure_channel(address, credentials)
        )
        self._metadata = () if token is None else (("authorization", f"Bearer {token}"),)
        self._stub = pb_grpc.InferenceStub(self._channel)
        self._timeout_s = timeout_s

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        request_id: str | None = None,
        timeout_s: float | None = None,
        priority: int | None = None,
        tenant: str | None = None,
        cache_salt: str | None = None,
        **sampling_params: Any,
    ) -> Generation:
        """Request outputs for a prompt.

        Args:
            prompt: text or token ids.
            request_id: unique among running requests; None makes one.
            timeout_s: the server refuses the request if its first token cannot come in time, and aborts it after this time.
            priority: lower is served earlier with the scheduling policy "priority".
            tenant: name of the client for fair sharing and limits.
            cache_salt: cached prefixes are shared only within one tenant and salt.
            sampling_params: fields of `expertwire.SamplingParams`.

        Raises:
            ValueError: a sampling parameter is unknown or of the wrong type. Errors of the server come from the iteration.
        """
        options = {"priority": priority, "tenant": tenant, "cache_salt": cache_salt}
        request = _request(request_id, options, sampling_params)
        if isinstance(prompt, str):
            request.text = prompt
        else:
            request.token_ids.SetInParent()
            request.token_ids.ids.extend(prompt)
        return Generation(request.request_id, self._stub.Generate(request, timeout=timeout_s, metadata=self._metadata))

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        reasoning_effort: str | None = None,
        thinking: bool | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        request_id: str | None = None,
        timeout_s: float | None = None,
        priority: int | None = None,
        tenant: str | None = None,
        cache_salt: str | None = None,
        **sampling_params: Any,
    ) -> Generation:
        """Request answers in a conversation, which the server renders with the model's chat template.

        Args:
            messages: dictionaries with "role" and "content".
            tools: JSON schemas of functions.
            reasoning_effort: one of the model's reasoning efforts.
            thinking: whether the model thinks, if its template has a switch for it.
            chat_template_kwargs: further variables of the template.
            add_generation_prompt: end the prompt with the start of the assistant's answer.
            continue_final_message: continue the last message; excludes `add_generation_prompt`.
            request_id, timeout_s, priority, tenant, cache_salt, sampling_params: as in `generate`.

        Raises:
            ValueError: as in `generate`, or the chat is malformed.
        """
        chat = Chat(
            messages=messages,
            tools=tools,
            reasoning_effort=reasoning_effort,
            thinking=thinking,
            chat_template_kwargs={} if chat_template_kwargs is None else chat_template_kwargs,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )
        options = {"priority": priority, "tenant": tenant, "cache_salt": cache_salt}
        request = _request(request_id, options, sampling_params)
        request.chat.CopyFrom(from_chat(chat))
        return Generation(request.request_id, self._stub.Generate(request, timeout=timeout_s, metadata=self._metadata))

    def abort(self, request_id: str) -> None:
        """End a running request. Raises `ServerError`."""
        self._call(self._stub.Abort, pb.AbortRequest(request_id=request_id))

    def model_info(self) -> dict[str, Any]:
        """Return the fields of `ModelInfo` of the .proto, messages as dictionaries. Raises `ServerError`."""
        info = self._call(self._stub.GetModelInfo, pb.GetModelInfoRequest())
        output_format = json_format.MessageToDict(info.output_format, preserving_proto_field_name=True)
        defaults = {field.name: value for field, value in info.default_sampling_params.ListFields()}
        return {field.name: getattr(info, field.name) for field in pb.ModelInfo.DESCRIPTOR.fields} | {
            "output_format": output_format,
            "default_sampling_params": defaults,
        }

    def stats(self) -> dict[str, Any]:
        """Return counters and gauges of the engine; `expert_load` has tokens by layer and expert. Raises `ServerError`."""
        stats = self._call(self._stub.GetStats, pb.GetStatsRequest())
        return {**json_format.MessageToDict(stats.values), "expert_load": [list(e.tokens) for e in stats.expert_load]}

    def is_serving(self) -> bool:
        """Return whether the server's health check succeeds; False also if there is no server."""
        from grpc_health.v1 import health_pb2, health_pb2_grpc  # the only use of this package

        health: Any = health_pb2_grpc.HealthStub(self._channel)  # whose methods are made when it is
        try:
            answer = health.Check(health_pb2.HealthCheckRequest(), timeout=self._timeout_s)
        except grpc.RpcError:
            return False
        return answer.status == health_pb2.HealthCheckResponse.SERVING

    def close(self) -> None:
        """Close the connection; running requests are aborted."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _call(self, method: grpc.UnaryUnaryMultiCallable, request: Any) -> Any:
        try:
            return method(request, timeout=self._timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            _raise(error)


def _request(
    request_id: str | None, options: Mapping[str, Any], sampling_params: Mapping[str, Any]
) -> pb.GenerateRequest:
    """Return a request without a prompt."""
    params = from_sampling_params(sampling_params)
    values = {name: value for name, value in options.items() if value is not None}
    try:
        return pb.GenerateRequest(request_id=request_id or uuid.uuid4().hex, sampling_params=params, **values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"request options {values}: {error}") from error


_USAGE_FIELDS = tuple(pb.Usage.DESCRIPTOR.fields_by_name)


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


def _raise(error: grpc.RpcError) -> NoReturn:
    metadata: Any = error.trailing_metadata() or ()
    wait_ms = dict(metadata).get(PUSHBACK)
    wait_s = None if wait_ms is None else int(wait_ms) / 1e3
    raise ServerError(error.code().name, error.details() or "", wait_s) from error
