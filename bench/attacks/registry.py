"""All attacks, by name."""

from __future__ import annotations

from collections.abc import Mapping

from expertwire.bench.attacks import (
    bursts,
    connections,
    costly_strategies,
    crowds,
    frozen,
    full_shared_memory,
    large_text,
    local_strangers,
    lost_wakeup,
    malformed,
    not_a_number,
    stop_strings,
    strangers,
    unread_streams,
)
from expertwire.bench.attacks.attack import Attack

_MODULES = (
    lost_wakeup, large_text, unread_streams, stop_strings, local_strangers, bursts, frozen, connections, strangers,
    malformed, not_a_number, crowds, full_shared_memory, costly_strategies,
)  # fmt: skip
ATTACKS: Mapping[str, Attack] = {attack.name: attack for module in _MODULES for attack in module.ATTACKS}
