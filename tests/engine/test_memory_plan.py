"""Real models' use of a GPU's memory: pinned, so that a change of any part is seen."""

from pathlib import Path

import pytest
from helpers.slow import slow_but

from expertwire.engine.loader.inspection import inspect

CONFIGS = Path(__file__).parents[2] / "bench" / "configs"
H200 = 143_771 << 20  # as the driver tells it
# Model, ranks and tokens of a request; then MB of weights, symmetric buffers, activations and graphs, and tokens that fit.
TABLES = [
    ("deepseek-v3", 8, 16_384, (101375, 357, 4107, 3409), 360_592),
    ("kimi-k2-thinking", 8, 16_384, (95450, 470, 3741, 3409), 448_496),
    ("gpt-oss-120b", 1, 131_072, (66602, 0, 1120, 514), 1_697_984),
    ("qwen3-30b-a3b", 1, 40_960, (61064, 0, 882, 505), 733_536),
]


@pytest.mark.parametrize("case", slow_but([TABLES[3]], TABLES), ids=[table[0] for table in TABLES])
def test_of_an_h200(case):
    name, ep_size, context, expected, tokens = case
    found = inspect(CONFIGS / name, ep_size)
    plan = found.memory_plan(context, H200)
    parts = sum(plan.weights.values()), plan.symmetric_buffers, plan.activations, plan.graphs
    assert tuple(round(part / 1e6) for part in parts) == expected
    assert found.cache_tokens(plan, context) == tokens
    rest = plan.slots + plan.context + plan.caches
    assert sum(parts) + rest == int(0.9 * H200)
