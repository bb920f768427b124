"""The methods of `expertwire.v1.Inference` that ask for something, instead of for text."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np

from expertwire.deploy.grpc import messages as grpc_messages
from expertwire.deploy.grpc.calls import Call
from expertwire.deploy.grpc.catalog import Catalog
from expertwire.deploy.grpc.requests import Requests
from expertwire.deploy.grpc.server_info import ServerInfo
from expertwire.deploy.proto import expertwire_v1_pb2 as pb
from expertwire.engine.frontend.api import RequestError, RequestFailed
from expertwire.engine.frontend.chat import ChatText
from expertwire.engine.frontend.prompts import check_has_tokenizer, check_ids
from expertwire.engine.frontend.text_workers import TextWorkers
from expertwire.scheduler.sampling_params import SamplingParams

_ANSWER_S = 10.0
_MIN_INTERVAL_S = 0.1


class QueryServicer:
    """Queries about the engine and its tokenizer.

    Args:
        requests: the requests of all calls.
        texts: tokenise and detokenise.
        info: the server's options; None: there are none.
        catalog: strategies and verifiers that clients may name.
    """

    def __init__(self, requests: Requests, texts: TextWorkers, info: ServerInfo | None, catalog: Catalog) -> None:
        self._requests, self._frontend = requests, requests.frontend
        self._texts = texts
        self._info = info
        self._catalog = catalog

    async def Tokenize(self, request: pb.TokenizeRequest, call: Call) -> pb.TokenizeResponse:
        """See the .proto."""
        self._requests.check_alive()
        special = not request.HasField("add_special_tokens") or request.add_special_tokens
        prompt = grpc_messages.to_prompt(request)
        assert isinstance(prompt, str | ChatText), type(prompt)
        check_has_tokenizer(prompt, self._frontend.tokenizer is not None)
        if isinstance(prompt, str):
            tokens = await self._texts.tokenize(prompt, client=call.client, add_special_tokens=special)
        else:
            tokens = await self._texts.encode(prompt, SamplingParams(), client=call.client)
        return pb.TokenizeResponse(token_ids=tokens.tolist())

    async def Detokenize(self, request: pb.DetokenizeRequest, call: Call) -> pb.DetokenizeResponse:
        """See the .proto."""
        self._requests.check_alive()
        skip = not request.HasField("skip_special_tokens") or request.skip_special_tokens
        tokens = np.array(request.token_ids, np.int32)
        if len(tokens):
            check_ids("token_ids", (int(tokens.min()), int(tokens.max())), self._frontend.model_info.vocab_size)
        text = await self._texts.detokenize(tokens, client=call.client, skip_special_tokens=skip)
        return pb.DetokenizeResponse(text=text)

    async def GetModelInfo(self, request: pb.GetModelInfoRequest, call: Call) -> pb.ModelInfo:
        """See the .proto."""
        self._requests.check_alive()
        info, tokenizer = self._frontend.model_info, self._frontend.tokenizer
        if tokenizer is None:
            message = grpc_messages.from_model_info(info, None, ())
        else:
            message = grpc_messages.from_model_info(info, tokenizer.output_format, tokenizer.chat_variables)
        message.strategies.extend(self._catalog.strategy_names)
        message.verifiers.extend(self._catalog.verifier_names)
        return message

    async def GetServerInfo(self, request: pb.GetServerInfoRequest, call: Call) -> pb.ServerInfo:
        """See the .proto."""
        return pb.ServerInfo() if self._info is None else self._info.message()

    async def GetStats(self, request: pb.GetStatsRequest, call: Call) -> pb.Stats:
        """See the .proto."""
        return grpc_messages.from_stats(call.identity.visible(await self._stats()))

    async def GetLoads(self, request: pb.GetLoadsRequest, call: Call) -> pb.Loads:
        """See the .proto."""
        return grpc_messages.from_loads(await self._stats())

    async def WatchExperts(self, request: pb.WatchExpertsRequest, call: Call) -> None:
        """See the .proto."""
        interval_s = request.interval_s if request.HasField("interval_s") else 1.0
        if not _MIN_INTERVAL_S <= interval_s <= 1e6:
            raise ValueError(f"interval_s must be seconds in [{_MIN_INTERVAL_S:g}, 1e6], got {interval_s!r}")
        if not self._frontend.model_info.num_experts:
            raise ValueError(f"{self._frontend.model_info.architecture} has no experts to watch")
        while True:
            await call.write(grpc_messages.from_expert_loads(await self._stats()))
            await asyncio.sleep(interval_s)

    async def FlushCache(self, request: pb.FlushCacheRequest, call: Call) -> pb.FlushCacheResponse:
        """See the .proto."""
        freed = await self._ask(self._frontend.request_cache_flush)
        return pb.FlushCacheResponse(freed_blocks=freed)

    async def _stats(self) -> dict[str, Any]:
        return await self._ask(self._frontend.request_stats)

    async def _ask(self, request: Callable[[Callable[[Any], None]], None]) -> Any:
        """Return the controller's answer to a request."""
        self._requests.check_alive()
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        request(lambda value: None if answer.done() else answer.set_result(value))
        self._requests.watch_writes()
        try:
            value = await asyncio.wait_for(answer, _ANSWER_S)
        except TimeoutError as error:
            text = f"the engine did not answer within {_ANSWER_S:g} s"
            raise RequestFailed(RequestError("UNAVAILABLE", text)) from error
        self._requests.check_alive()
        return value
