"""An asyncio client of the gRPC service `expertwire.v1`, the twin of `client.Client`.

async with AsyncClient("127.0.0.1:50051") as client:
    async for chunk in client.generate("Once upon a time", temperature=0, max_tokens=64):
        print(chunk.text, end="", flush=True)
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Self

import grpc

from expertwire.deploy.grpc import client_messages as values
from expertwire.deploy.grpc.client_messages import Chunk, Progress, raise_server_error
from expertwire.deploy.grpc.client_session import AsyncClientSession
from expertwire.deploy.proto import expertwire_v1_pb2 as pb
from expertwire.deploy.proto import expertwire_v1_pb2_grpc as pb_grpc
from expertwire.engine.frontend.chat import Chat


class AsyncGeneration(Progress):
    """The stream of one request: iterate over its chunks once. Closing it early aborts the request."""

    def __init__(self, request_id: str, call: Any) -> None:  # a `grpc.aio.UnaryStreamCall`
        super().__init__(request_id)
        self._call = call

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        """Raises `ServerError`."""
        try:
            async for message in self._call:
                for chunk in self.add(message):
                    yield chunk
        except grpc.RpcError as error:
            raise_server_error(error)
        finally:
            self._call.cancel()

    def close(self) -> None:
        """Abort the request, if it still runs."""
        self._call.cancel()


class AsyncClient:
    """A connection to a server, made within a running event loop. Arguments and methods as those of `client.Client`."""

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
            grpc.aio.insecure_channel(address, options)
            if credentials is None
            else grpc.aio.secure_channel(address, credentials, options)
        )
        self._metadata = () if token is None else (("authorization", f"Bearer {token}"),)
        self._stub: Any = pb_grpc.InferenceStub(self._channel)
        self._timeout_s = timeout_s
        self._retries = retries

    def generate(
        self, prompt: str | Sequence[int] | Chat, *, timeout_s: float | None = None, **arguments: Any
    ) -> AsyncGeneration:
        """Request outputs for a prompt; see `Client.generate`."""
        request = values.make_request(prompt, arguments)
        call = self._stub.Generate(request, timeout=timeout_s, metadata=self._metadata)
        return AsyncGeneration(request.request_id, call)

    def chat(
        self, messages: Sequence[Mapping[str, Any]], *, timeout_s: float | None = None, **arguments: Any
    ) -> AsyncGeneration:
        """Request answers in a conversation; see `Client.chat`."""
        chat = values.make_chat(messages, arguments)
        return self.generate(chat, timeout_s=timeout_s, **arguments)

    def session(self, *, token_ids_only: bool = False, window_tokens: int = 0, model: str = "") -> AsyncClientSession:
        """Begin a session, in which many requests share one call; see `Client.session`."""
        options = pb.SessionOptions(token_ids_only=token_ids_only, window_tokens=window_tokens, model=model)
        return AsyncClientSession(self._stub.Session, self._metadata, options, self._retries)

    async def abort(self, *request_ids: str) -> None:
        """End running requests of this tenant; others are ignored. Raises `ServerError`."""
        await self._call(self._stub.Abort, pb.AbortRequest(request_ids=request_ids))

    async def tokenize(self, prompt: str | Chat, *, add_special_tokens: bool = True, model: str = "") -> list[int]:
        """Return the tokens of a text or a chat. Raises `ServerError`."""
        request = values.make_tokenize_request(prompt, add_special_tokens=add_special_tokens)
        request.model = model
        return list((await self._call(self._stub.Tokenize, request)).token_ids)

    async def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True, model: str = "") -> str:
        """Return the text of tokens. Raises `ServerError`."""
        request = pb.DetokenizeRequest(token_ids=token_ids, skip_special_tokens=skip_special_tokens, model=model)
        return (await self._call(self._stub.Detokenize, request)).text

    async def model_info(self, model: str = "") -> dict[str, Any]:
        """Return the fields of `ModelInfo`; see `Client.model_info`. Raises `ServerError`."""
        return values.from_model_info(await self._call(self._stub.GetModelInfo, pb.GetModelInfoRequest(model=model)))

    async def models(self) -> dict[str, str]:
        """Return why each of the server's models cannot serve, by name; "" if it can. Raises `ServerError`."""
        return {
            model.name: model.problem
            for model in (await self._call(self._stub.ListModels, pb.ListModelsRequest())).models
        }

    async def server_info(self) -> dict[str, Any]:
        """Return the server's options; see `Client.server_info`. Raises `ServerError`."""
        return values.from_server_info(await self._call(self._stub.GetServerInfo, pb.GetServerInfoRequest()))

    async def stats(self, model: str = "") -> dict[str, Any]:
        """Return counters and gauges of the engine; see `Client.stats`. Raises `ServerError`."""
        return values.from_stats(await self._call(self._stub.GetStats, pb.GetStatsRequest(model=model)))

    async def loads(self, model: str = "") -> dict[str, Any]:
        """Return the loads of the ranks; see `Client.loads`. Raises `ServerError`."""
        return values.from_loads(await self._call(self._stub.GetLoads, pb.GetLoadsRequest(model=model)))

    async def watch_experts(self, interval_s: float = 1.0, model: str = "") -> AsyncIterator[list[list[int]]]:
        """Yield the tokens of the experts, by layer, once in so many seconds. Raises `ServerError`."""
        call = self._stub.WatchExperts(
            pb.WatchExpertsRequest(interval_s=interval_s, model=model), metadata=self._metadata
        )
        try:
            async for message in call:
                yield [list(layer.tokens) for layer in message.layers]
        except grpc.RpcError as error:
            raise_server_error(error)
        finally:
            call.cancel()

    async def flush_cache(self, model: str = "") -> dict[str, int]:
        """Empty the prefix cache; see `Client.flush_cache`. Raises `ServerError`."""
        return dict((await self._call(self._stub.FlushCache, pb.FlushCacheRequest(model=model))).freed_blocks)

    async def close(self) -> None:
        """Close the connection; running requests are aborted."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def _call(self, method: Any, request: Any) -> Any:
        try:
            return await method(request, timeout=self._timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise_server_error(error)
