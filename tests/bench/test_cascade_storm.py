"""The storm of cascades: that nothing is left of it, and all tokens are accounted for."""

from __future__ import annotations

import contextlib

import pytest

from expertwire.bench.test_time.cascade_storm import storm
from expertwire.bench.test_time.storm import OPTIONS
from expertwire.deploy.runtime import open_frontend
from expertwire.engine.config.engine_config import EngineConfig


@pytest.fixture(scope="module")
def frontends():
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(open_frontend(EngineConfig(**OPTIONS))) for _ in range(2)]


def test_nothing_is_left_of_cascades(frontends):
    report = storm(*frontends, 3.0, seed=2)
    assert report.problems == []
    assert {"small", "large"} <= set(report.cancelled)
    assert {"kept", "confidence", "verifier", "cancelled"} <= set(report.ended)
