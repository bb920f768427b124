"""The models of a front: what its log says of cascades that cannot work as their policies ask."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from expertwire.deploy.grpc.models import Models, ServedModel
from expertwire.engine.frontend.cascade_legs import CascadePolicy
from expertwire.strategies.cascade import Cascade


@pytest.mark.parametrize(("tolerance", "same", "warns"), [(0.5, False, True), (0.5, True, False), (None, False, False)])
def test_a_draft_tolerance_without_effect_is_warned_of(tolerance, same, warns, caplog):
    def model(name: str) -> ServedModel:
        frontend = SimpleNamespace(model_info=SimpleNamespace(name=name))
        requests: Any = SimpleNamespace(frontend=frontend, makes_same_tokens=lambda _: same)
        texts: Any = None
        return ServedModel(requests, texts)

    async def open_models(cascade: Cascade) -> None:
        Models([model("small"), model("large")], {}, {"fast": CascadePolicy(cascade=cascade)}, None)

    cascade = Cascade(small="small", large="large", version="1", draft_tolerance=tolerance)
    asyncio.run(open_models(cascade))
    assert [record.levelname for record in caplog.records] == ["WARNING"] * warns
    assert not warns or "draft_tolerance of the cascade fast" in caplog.text
