"""A synchronous client of the gRPC service `expertwire.v1`; `AsyncClient` is its twin for asyncio.

with Client("127.0.0.1:50051") as client:
    for chunk in client.generate("Once upon a time", temperature=0, max_tokens=64):
        print(chunk.text, end="", flush=True)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import grpc

from expertwire.deploy.grpc import client_messages as values
from expertwire.deploy.grpc.client_messages import Chunk, Progress, ServerError, raise_server_error
from expertwire.deploy.grpc.client_session import ClientSession
from expertwire.deploy.grpc.strategy_messages import ServerVerifier
from expertwire.deploy.proto import expertwire_v1_pb2 as pb
from expertwire.deploy.proto import expertwire_v1_pb2_grpc as pb_grpc
from expertwire.engine.frontend.chat import Chat

__all__ = ["Chunk", "Client", "Generation", "ServerError", "ServerVerifier"]


class Generation(Progress):
    """The stream of one request: iterate over its chunks once. Closing it early aborts the request."""

    def __init__(self, request_id: str, call: Any) -> None:  # a `grpc.Call` that is also an iterator
        super().__init__(request_id)
        self._call = call

    def __iter__(self) -> Iterator[Chunk]:
        """Raises `ServerError`."""
        try:
            for message in self._call:
                yield from self.add(message)
        except grpc.RpcError as error:
            raise_server_error(error)
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
        timeout_s: timeout of all calls but `generate`, `chat` and `watch_experts`; None waits for ever.
        retries: how often, in [0, 4], a call that is refused for the moment (UNAVAILABLE, RESOURCE_EXHAUSTED) is tried again,
            after the time that the server names. A stream is not tried again once output has come, nor a request of over 256 KiB.

    Raises:
        ValueError: `retries` is not allowed.
    """

    def __init__(
        self,
        address: str = "127.0.0.1:50051",
        *,
        credentials: grpc.ChannelCredentials | None = None,
        token: str | None = None,
        timeout_s: float | None = 30.0,
        retries: int = 0,
    ) -> None:
        options = values.channel_options(retries)
        self._channel = (
            grpc.insecure_channel(address, options)
            if credentials is None
            else grpc.secure_channel(address, credentials, options)
        )
        self._metadata = () if token is None else (("authorization", f"Bearer {token}"),)
        self._stub = pb_grpc.InferenceStub(self._channel)
        self._timeout_s = timeout_s
        self._retries = retries

    def generate(
        self, prompt: str | Sequence[int] | Chat, *, timeout_s: float | None = None, **arguments: Any
    ) -> Generation:
        """Request outputs for a prompt.

        Args:
            prompt: text, token ids or a chat.
            timeout_s: the server refuses the request if its first token cannot come in time, and aborts it after this time.
            arguments: `request_id` (unique among the tenant's running requests), `priority` (lower is served earlier with the
                scheduling policy "priority"), `model` of a server with several, `tenant` and `cache_salt` (cached prefixes are
                shared only within one of each),
                `strategy` of test-time compute (an object of `expertwire.strategies`, its options, or a string as on the command
                line; its verifier is a name of the server's, in an object `ServerVerifier(name)`), `all_branches` (send the
                output of every branch as it comes, instead of that of the selected ones at the end), and fields of
                `expertwire.SamplingParams`.

        Raises:
            ValueError: an argument is unknown or of the wrong type. Errors of the server come from the iteration.
        """
        request = values.make_request(prompt, arguments)
        return Generation(request.request_id, self._stub.Generate(request, timeout=timeout_s, metadata=self._metadata))

    def chat(
        self, messages: Sequence[Mapping[str, Any]], *, timeout_s: float | None = None, **arguments: Any
    ) -> Generation:
        """Request answers in a conversation, which the server renders with the model's chat template.

        Args:
            messages: dictionaries with "role" and "content".
            timeout_s: as in `generate`.
            arguments: other fields of `expertwire.Chat`, but `chat_template`, and what `generate` takes.

        Raises:
            ValueError: as in `generate`, or the chat is malformed.
        """
        chat = values.make_chat(messages, arguments)
        return self.generate(chat, timeout_s=timeout_s, **arguments)

    def session(self, *, token_ids_only: bool = False, window_tokens: int = 0, model: str = "") -> ClientSession:
        """Begin a session, in which many requests share one call.

        Args:
            token_ids_only: send no text, which costs the server a fraction.
            window_tokens: output tokens that a branch sends before it waits for `ClientSession.grant`, at least 16; 0: as many as
                the connection takes.
            model: of all its requests; "": the first.

        Errors of the server come from the iteration.
        """
        options = pb.SessionOptions(token_ids_only=token_ids_only, window_tokens=window_tokens, model=model)
        return ClientSession(self._stub.Session, self._metadata, options, self._retries)

    def abort(self, *request_ids: str) -> None:
        """End running requests of this tenant; others are ignored. Raises `ServerError`."""
        self._call(self._stub.Abort, pb.AbortRequest(request_ids=request_ids))

    def tokenize(self, prompt: str | Chat, *, add_special_tokens: bool = True, model: str = "") -> list[int]:
        """Return the tokens of a text or a chat. Raises `ServerError`."""
        request = values.make_tokenize_request(prompt, add_special_tokens=add_special_tokens)
        request.model = model
        return list(self._call(self._stub.Tokenize, request).token_ids)

    def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True, model: str = "") -> str:
        """Return the text of tokens. Raises `ServerError`."""
        request = pb.DetokenizeRequest(token_ids=token_ids, skip_special_tokens=skip_special_tokens, model=model)
        return self._call(self._stub.Detokenize, request).text

    def model_info(self, model: str = "") -> dict[str, Any]:
        """Return the fields of `ModelInfo` of the .proto, messages as dictionaries. Raises `ServerError`."""
        return values.from_model_info(self._call(self._stub.GetModelInfo, pb.GetModelInfoRequest(model=model)))

    def models(self) -> dict[str, str]:
        """Return why each of the server's models cannot serve, by name; "" if it can. Raises `ServerError`."""
        return {model.name: model.problem for model in self._call(self._stub.ListModels, pb.ListModelsRequest()).models}

    def server_info(self) -> dict[str, Any]:
        """Return version, uptime_s, fronts, and config: option -> (value, reason). Raises `ServerError`."""
        return values.from_server_info(self._call(self._stub.GetServerInfo, pb.GetServerInfoRequest()))

    def stats(self, model: str = "") -> dict[str, Any]:
        """Return counters and gauges of the engine; `expert_load` has tokens by layer and expert. Raises `ServerError`."""
        return values.from_stats(self._call(self._stub.GetStats, pb.GetStatsRequest(model=model)))

    def loads(self, model: str = "") -> dict[str, Any]:
        """Return num_waiting, num_held, and the loads of the ranks. Raises `ServerError`."""
        return values.from_loads(self._call(self._stub.GetLoads, pb.GetLoadsRequest(model=model)))

    def watch_experts(self, interval_s: float = 1.0, model: str = "") -> Iterator[list[list[int]]]:
        """Yield the tokens that each expert has computed, by layer, once in so many seconds. Raises `ServerError`."""
        call = self._stub.WatchExperts(
            pb.WatchExpertsRequest(interval_s=interval_s, model=model), metadata=self._metadata
        )
        try:
            for message in call:
                yield [list(layer.tokens) for layer in message.layers]
        except grpc.RpcError as error:
            raise_server_error(error)
        finally:
            call.cancel()

    def flush_cache(self, model: str = "") -> dict[str, int]:
        """Empty the prefix cache of blocks that no request uses; return their number by cache. Raises `ServerError`."""
        return dict(self._call(self._stub.FlushCache, pb.FlushCacheRequest(model=model)).freed_blocks)

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

    def _call(self, method: Any, request: Any) -> Any:
        try:
            return method(request, timeout=self._timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise_server_error(error)
