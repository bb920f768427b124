"""The methods of `expertwire.v1.Inference` that ask for something, instead of for text."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np

from expertwire.deploy.grpc import messages as grpc_messages
from expertwire.deploy.grpc.calls import Call
from expertwire.deploy.grpc.catalog import Catalog
from expertwire.deploy.grpc.models import Models, ServedModel
from expertwire.deploy.grpc.server_info import ServerInfo
from expertwire.deploy.proto import expertwire_v1_pb2 as pb
from expertwire.engine.frontend.api import RequestError, RequestFailed
from expertwire.engine.frontend.chat import ChatText
from expertwire.engine.frontend.prompts import check_has_tokenizer, check_ids
from expertwire.scheduler.sampling_params import SamplingParams

_ANSWER_S = 10.0
_MIN_INTERVAL_S = 0.1


class QueryServicer:
    """Queries about the engine and its tokenizer.

    Args:
        models: the models.
        info: the server's options; None: there are none.
        catalog: strategies and verifiers that clients may name.
    """

    def __init__(self, models: Models, info: ServerInfo | None, catalog: Catalog) -> None:
        self._models = models
        self._info = info
        self._catalog = catalog

    async def Tokenize(self, request: pb.TokenizeRequest, call: Call) -> pb.TokenizeResponse:
        """See the .proto."""
        model = self._alive(request.model)
        special = not request.HasField("add_special_tokens") or request.add_special_tokens
        prompt = grpc_messages.to_prompt(request)
        assert isinstance(prompt, str | ChatText), type(prompt)
        check_has_tokenizer(prompt, model.requests.frontend.tokenizer is not None)
        if isinstance(prompt, str):
            tokens = await model.texts.tokenize(prompt, client=call.client, add_special_tokens=special)
        else:
            tokens = await model.texts.encode(prompt, SamplingParams(), client=call.client)
        return pb.TokenizeResponse(token_ids=tokens.tolist())

    async def Detokenize(self, request: pb.DetokenizeRequest, call: Call) -> pb.DetokenizeResponse:
        """See the .proto."""
        model = self._alive(request.model)
        skip = not request.HasField("skip_special_tokens") or request.skip_special_tokens
        tokens = np.array(request.token_ids, np.int32)
        if len(tokens):
            check_ids(
                "token_ids", (int(tokens.min()), int(tokens.max())), model.requests.frontend.model_info.vocab_size
            )
        text = await model.texts.detokenize(tokens, client=call.client, skip_special_tokens=skip)
        return pb.DetokenizeResponse(text=text)

    async def GetModelInfo(self, request: pb.GetModelInfoRequest, call: Call) -> pb.ModelInfo:
        """See the .proto."""
        frontend = self._alive(request.model).requests.frontend
        info, tokenizer = frontend.model_info, frontend.tokenizer
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
        return grpc_messages.from_stats(call.identity.visible(await _stats(self._alive(request.model))))

    async def GetLoads(self, request: pb.GetLoadsRequest, call: Call) -> pb.Loads:
        """See the .proto."""
        return grpc_messages.from_loads(await _stats(self._alive(request.model)))

    async def WatchExperts(self, request: pb.WatchExpertsRequest, call: Call) -> None:
        """See the .proto."""
        interval_s = request.interval_s if request.HasField("interval_s") else 1.0
        if not _MIN_INTERVAL_S <= interval_s <= 1e6:
            raise ValueError(f"interval_s must be seconds in [{_MIN_INTERVAL_S:g}, 1e6], got {interval_s!r}")
        model = self._alive(request.model)
        info = model.requests.frontend.model_info
        if not info.num_experts:
            raise ValueError(f"{info.architecture} has no experts to watch")
        while True:
            await call.write(grpc_messages.from_expert_loads(await _stats(model)))
            await asyncio.sleep(interval_s)

    async def FlushCache(self, request: pb.FlushCacheRequest, call: Call) -> pb.FlushCacheResponse:
        """See the .proto."""
        model = self._alive(request.model)
        freed = await _ask(model, model.requests.frontend.request_cache_flush)
        return pb.FlushCacheResponse(freed_blocks=freed)

    async def ListModels(self, request: pb.ListModelsRequest, call: Call) -> pb.ListModelsResponse:
        """See the .proto."""
        models = [
            pb.ServedModel(name=name, problem=self._models.problem(name), is_cascade=self._models.is_cascade(name))
            for name in self._models.names
        ]
        return pb.ListModelsResponse(models=models)

    def _alive(self, name: str) -> ServedModel:
        """Return a model whose engine has not failed.

        Raises:
            RequestFailed: there is none of the name, or its engine has failed.
        """
        model = self._models.find(name)
        model.requests.check_alive()
        return model


async def _stats(model: ServedModel) -> dict[str, Any]:
    return await _ask(model, model.requests.frontend.request_stats)


async def _ask(model: ServedModel, request: Callable[[Callable[[Any], None]], None]) -> Any:
    """Return the controller's answer to a request."""
    model.requests.check_alive()
    answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    request(lambda value: None if answer.done() else answer.set_result(value))
    model.requests.watch_writes()
    try:
        value = await asyncio.wait_for(answer, _ANSWER_S)
    except TimeoutError as error:
        text = f"the engine did not answer within {_ANSWER_S:g} s"
        raise RequestFailed(RequestError("UNAVAILABLE", text)) from error
    model.requests.check_alive()
    return value
