"""`expertwire.bench.scheduler.memory`: what the planner says is what the scheduler holds."""

from pathlib import Path

import pytest

from expertwire.bench.scheduler import memory

CONFIGS = Path(__file__).resolve().parents[2] / "bench" / "configs"


@pytest.mark.parametrize("name", ["nemotron-3-nano", "qwen3-next-80b-a3b"])
def test_planned_is_measured(name):
    rows = list(memory.rows(CONFIGS / name, [1024, 8192]))
    for _, context, planned, measured, attention_planned, attention_measured in rows:
        assert planned == measured, context
        assert attention_planned == attention_measured, context
    assert rows[1][2] - rows[0][2] < (rows[1][4] - rows[0][4]) / 3, "a hybrid's memory grows slower"
