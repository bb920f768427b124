"""The models of a front, by name: each has a frontend, requests of its own and processes that tokenise."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from expertwire.deploy.grpc.cascade_loop import CascadeLoop, ServedCascade
from expertwire.deploy.grpc.requests import Requests
from expertwire.engine.frontend.api import RequestError, RequestFailed
from expertwire.engine.frontend.cascade_legs import CascadePolicy
from expertwire.engine.frontend.text_workers import TextWorkers
from expertwire.strategies.decision_log import DecisionLog

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServedModel:
    """A model that is served."""

    requests: Requests
    texts: TextWorkers


class Models:
    """The models of a front.

    Args:
        models: the first answers calls that name none.
        failed: by name, why further models cannot serve: their engines had failed before this front began.
        cascades: policies over the models, by name.
        log: gets the cascades' decisions; None: there is none.
    """

    def __init__(
        self,
        models: Sequence[ServedModel],
        failed: Mapping[str, str],
        cascades: Mapping[str, CascadePolicy],
        log: DecisionLog | None,
    ) -> None:
        self._models = {model.requests.frontend.model_info.name: model for model in models}
        self._failed = failed
        self._policies = cascades
        served = {}
        for name, policy in cascades.items():
            of = [self._models.get(each) for each in (policy.cascade.small, policy.cascade.large)]
            if (small := of[0]) is not None and (large := of[1]) is not None:
                served[name] = ServedCascade(policy, small.requests, large.requests)
                if policy.cascade.draft_tolerance is not None and not small.requests.makes_same_tokens(large.requests):
                    _log.warning(
                        "warning: draft_tolerance of the cascade %s has no effect, as its models have different tokenizers",
                        name,
                    )
        self.cascades = CascadeLoop(served, log)

    @property
    def names(self) -> list[str]:
        """Names of all models, of those that serve first, and of cascades."""
        return [*self._models, *self._failed, *self._policies]

    def is_cascade(self, name: str) -> bool:
        """Return whether a name is that of a cascade."""
        return name in self._policies

    def check_cascade(self, name: str) -> None:
        """Raise RequestFailed if a model of a cascade cannot serve."""
        cascade = self._policies[name].cascade
        for each in (cascade.small, cascade.large):
            self.find(each).requests.check_alive()

    def find(self, name: str) -> ServedModel:
        """Return the model of a name, or the first one if it is empty.

        Raises:
            RequestFailed: there is none, or its engine has failed.
        """
        if name in self._failed:
            raise RequestFailed(RequestError("UNAVAILABLE", self._failed[name]))
        if name in self._policies:
            raise ValueError(f"model must be no cascade here, and {name!r} is one; models: {', '.join(self._models)}")
        if name and name not in self._models:
            text = f"model must be one of {', '.join(self.names)}, got {name!r:.200}"
            raise RequestFailed(RequestError("NOT_FOUND", text))
        return self._models[name] if name else next(iter(self._models.values()))

    def of_session(self, name: str) -> ServedModel:
        """Return the model of a session of this name; of a cascade's the small one. Errors as those of `find`."""
        return self.find(self._policies[name].cascade.small if name in self._policies else name)

    def problem(self, name: str) -> str:
        """Return why a model cannot serve at the moment, or ""."""
        if (policy := self._policies.get(name)) is not None:
            return self.problem(policy.cascade.small) or self.problem(policy.cascade.large)
        return self._failed.get(name) or self._models[name].requests.problem

    @property
    def is_ready(self) -> bool:
        """True if at least one model can serve."""
        return any(not each.problem and not each.draining for each in self._requests)

    @property
    def failure(self) -> str:
        """The message with which all engines have failed, or "": one of them works."""
        failures = [each.failure for each in self._requests]
        return failures[0] if all(failures) else ""

    def check_alive(self) -> None:
        """Raise RequestFailed if all engines have failed."""
        if self.failure:
            self._requests[0].check_alive()

    def abort_by_name(self, tenant: str, request_ids: Sequence[str]) -> None:
        """End a tenant's requests with these ids, of every model."""
        for each in self._requests:
            if not each.failure:
                each.abort_by_name(tenant, request_ids)

    def end_stalled(self) -> None:
        """End the requests whose clients have read nothing for too long; see `Requests`. Late verifiers are noticed."""
        self.cascades.deliver()
        for each in self._requests:
            each.end_stalled()

    async def drain(self, timeout_s: float) -> None:
        """Refuse new requests and wait for those that run; see `Requests`."""
        await asyncio.gather(*(each.drain(timeout_s) for each in self._requests))

    def stop(self) -> None:
        """Stop reading from the frontends."""
        self.cascades.stop()
        for each in self._requests:
            each.stop()

    @property
    def _requests(self) -> list[Requests]:
        return [model.requests for model in self._models.values()]
