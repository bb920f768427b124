"""The cascades of a front in its event loop: requests that name one, over the requests of two models."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import NamedTuple

from expertwire.deploy.grpc.calls import Call
from expertwire.deploy.grpc.requests import Requests
from expertwire.deploy.grpc.started import Prepared
from expertwire.deploy.grpc.usage import UsageCounter
from expertwire.deploy.proto import expertwire_v1_pb2 as pb
from expertwire.engine.frontend.api import EngineFailed, RequestError, RequestFailed
from expertwire.engine.frontend.cascade_legs import CascadeLeg, CascadePolicy, check_cascade_params
from expertwire.engine.frontend.cascades import CascadeRun, LegName
from expertwire.engine.frontend.open_requests import OpenRequest
from expertwire.engine.frontend.verifier_calls import VerifierCalls
from expertwire.strategies.decision_log import DecisionLog


class ServedCascade(NamedTuple):
    """A cascade and the requests of its models."""

    policy: CascadePolicy
    small: Requests
    large: Requests

    @property
    def legs(self) -> dict[LegName, Requests]:
        """The requests of each model."""
        return {"small": self.small, "large": self.large}


class OpenedCascade(NamedTuple):
    """A request of a cascade that has begun.

    Attributes:
        run: the request.
        key: tenant, and the client's id or the one chosen for it.
        served: its cascade.
        prepared: what it asks of each model.
    """

    run: CascadeRun
    key: tuple[str, str]
    served: ServedCascade
    prepared: dict[LegName, Prepared]

    def usage(self) -> UsageCounter:
        """Return a counter for the output of the model that was chosen."""
        name = self._chosen
        prepared, requests = self.prepared[name], self.served.legs[name]
        return UsageCounter(
            len(prepared.tokens), requests.reasoning_ids, prepared.arrived_s, opens_reasoning=prepared.opens_reasoning
        )

    @property
    def opens_reasoning(self) -> bool:
        """True if the prompt of the model that was chosen ends with the start of reasoning."""
        return self.prepared[self._chosen].opens_reasoning

    @property
    def _chosen(self) -> LegName:
        return "large" if self.run.model == self.served.policy.cascade.large else "small"


class _Leg(NamedTuple):
    """One model's part of a request, as its requests see it."""

    run: CascadeRun
    name: LegName

    def wake(self, request: OpenRequest) -> None:
        """Take note that it has news."""
        self.run.handle(self.name, request)


class CascadeLoop:
    """Runs cascades within the event loop of the caller.

    Args:
        cascades: by name.
        log: gets a record of each request that is answered; None: there is none.
    """

    def __init__(self, cascades: Mapping[str, ServedCascade], log: DecisionLog | None) -> None:
        self.cascades = cascades
        self._log = log
        self._calls = VerifierCalls()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._calls.fileno(), self.deliver)

    async def open(
        self, request: pb.GenerateRequest, call: Call, deadline_s: float | None, on_news: Callable[[], None]
    ) -> OpenedCascade:
        """Begin a request that names a cascade.

        Args:
            request: the client's request.
            call: the call that it came with.
            deadline_s: seconds within which its first token must come.
            on_news: called when there is output, or the request has failed.

        Raises:
            ValueError: names the field and what is allowed.
            RequestFailed: it cannot be served.
        """
        served = self.cascades[request.model]
        _check(request, served)
        small, large = served.small, served.large
        first = await small.prepare(request, call, deadline_s)
        check_cascade_params(first.params)
        other = pb.GenerateRequest()
        other.CopyFrom(request)
        other.request_id = first.key[1]
        shares = small.makes_same_chats(large) if request.HasField("chat") else small.makes_same_tokens(large)
        second = await large.prepare(other, call, deadline_s, first.tokens if shares else None)
        prepared: dict[LegName, Prepared] = {"small": first, "large": second}
        small.check_is_new(first.key)  # others have been served meanwhile
        legs = {
            name: CascadeLeg(
                frontend=requests.frontend,
                tokens=prepared[name].tokens,
                params=prepared[name].params,
                options=prepared[name].options,
            )
            for name, requests in served.legs.items()
        }

        def watch(name: LegName) -> None:
            number = legs[name].number
            assert number is not None, "it has been submitted"
            served.legs[name].watch(number, _Leg(run, name))

        run = CascadeRun(
            served.policy,
            legs["small"],
            legs["large"],
            request_id=first.key[1],
            prompt=request.text if request.HasField("text") else None,
            shares_tokens=small.makes_same_tokens(large),
            calls=self._calls,
            on_submit=watch,
            on_news=on_news,
        )
        opened = OpenedCascade(run, first.key, served, prepared)
        try:
            run.begin()
        except EngineFailed as failed:
            self._forget(opened)
            raise RequestFailed(RequestError("UNAVAILABLE", str(failed))) from failed
        return opened

    def close(self, opened: OpenedCascade) -> None:
        """Forget a request, end it if it runs, and log it if it was answered."""
        opened.served.small.remove_stream(opened.key)
        self._forget(opened)
        if self._log is not None and opened.run.record is not None:
            self._log.record(opened.run.record)

    def deliver(self) -> None:
        """Take in what verifiers have answered, and what is late."""
        self._calls.deliver()

    def stop(self) -> None:
        """Stop. Idempotent."""
        self._loop.remove_reader(self._calls.fileno())
        self._calls.close()

    def _forget(self, opened: OpenedCascade) -> None:
        opened.run.abort()
        for name, requests in opened.served.legs.items():
            for number in opened.run.legs[name].numbers:
                requests.unwatch(number)


def _check(request: pb.GenerateRequest, served: ServedCascade) -> None:
    if request.HasField("strategy"):
        raise ValueError(f"strategy must be unset for a cascade, and {request.model!r} is one")
    if request.sampling_params.HasField("prompt_logprobs"):
        raise ValueError(f"prompt_logprobs must be unset for a cascade, and {request.model!r} is one")
    if request.HasField("token_ids") and not served.small.makes_same_tokens(served.large):
        raise ValueError(
            f"token_ids must be text or chat for {request.model!r}, whose models have different tokenizers"
        )
