"""The cascades of a server, from its options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from expertwire.deploy.grpc.config import ServerConfig
from expertwire.strategies.cascade import Cascade
from expertwire.strategies.cascade_policy import read_cascade
from expertwire.strategies.decision_log import DecisionLog
from expertwire.strategies.verifiers import Verifier


def open_cascades(server: ServerConfig, models: Sequence[str], verifiers: Mapping[str, Verifier]) -> dict[str, Cascade]:
    """Return the policies of the server's cascades, by name.

    Args:
        server: the server's options.
        models: names of its models.
        verifiers: that it knows, by name.

    Raises:
        ValueError: a policy is wrong, or is not for these models and verifiers, or the log cannot be written.
    """
    cascades: dict[str, Cascade] = {}
    for text in server.cascade or ():
        name, equals, path = text.partition("=")
        if not name or not equals or not path:
            raise ValueError(f"--cascade must be NAME=FILE, got {text!r}")
        if name in models or name in cascades:
            raise ValueError(f"--cascade must have another name than the models {', '.join(models)}, got {name!r}")
        cascade = read_cascade(path)
        for field, model in (("small", cascade.small), ("large", cascade.large)):
            if model not in models:
                raise ValueError(
                    f"--cascade {name}: {field} must be one of the models {', '.join(models)}, got {model!r}"
                )
        if cascade.verifier not in verifiers and (cascade.verifier or cascade.verifier_threshold is not None):
            raise ValueError(
                f"--cascade {name}: verifier must be one that --verifier or --strategies gives "
                f"({', '.join(sorted(verifiers)) or 'none does'}), got {cascade.verifier!r}"
            )
        cascades[name] = cascade
    if server.decision_log is not None:
        if not cascades:
            raise ValueError(f"--decision-log needs --cascade, got {server.decision_log!r}")
        DecisionLog(server.decision_log).close()
    return cascades
