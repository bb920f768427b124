"""The strategies and verifiers that clients of a server may name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from expertwire.deploy.grpc.strategy_messages import to_options
from expertwire.deploy.proto import expertwire_v1_pb2 as pb
from expertwire.strategies.base import Strategy
from expertwire.strategies.registry import NO_VERIFIERS, STRATEGIES, strategy_from_dict
from expertwire.strategies.verifiers import Verifier


@dataclass(frozen=True, kw_only=True)
class Catalog:
    """Strategies and verifiers by name.

    Args:
        strategies: classes of strategies.
        verifiers: verifiers; each is called by threads.
    """

    strategies: Mapping[str, type] = field(default_factory=lambda: STRATEGIES)
    verifiers: Mapping[str, Verifier] = field(default_factory=lambda: NO_VERIFIERS)

    @property
    def strategy_names(self) -> list[str]:
        """The names of the strategies, in order."""
        return sorted(self.strategies)

    @property
    def verifier_names(self) -> list[str]:
        """The names of the verifiers, in order."""
        return sorted(self.verifiers)

    def strategy(self, message: pb.Strategy) -> Strategy:
        """Return the strategy that a message asks for.

        Raises:
            ValueError: names the field and the values it allows.
        """
        return strategy_from_dict(to_options(message), verifiers=self.verifiers, strategies=self.strategies)
