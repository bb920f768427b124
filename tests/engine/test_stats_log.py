"""The line of statistics: rates of a busy interval, none across a pause."""

from __future__ import annotations

from expertwire.engine.stats_log import StatsLog

GAUGES = {
    "num_running": 12, "num_waiting": 3, "held": 1, "running": [6, 6], "blocks": {"full": 100, "window": 50},
    "blocks_used": {"full": [40, 20], "window": [40, 20]}, "cached_tokens": 25, "prompt_tokens": 100,
}  # fmt: skip


class Engine:
    """Steps at times that the test says; each computes 100 tokens of prompts and 20 of decoding."""

    def __init__(self):
        self.lines, self.now_s = [], 100.0
        self.totals = {"tokens_computed": 5000, "tokens_sampled": 300}
        self.log = StatsLog(self.lines.append, lambda: self.now_s)

    def run(self, steps, step_s=0.5):
        for _ in range(steps):
            self.now_s += step_s
            self.totals["tokens_computed"] += 120
            self.totals["tokens_sampled"] += 20
            self.log.step(self.totals, lambda: GAUGES)


def test_a_busy_engine_says_its_rates_every_ten_seconds():
    engine = Engine()
    engine.run(20)
    assert engine.lines == []
    engine.run(1)
    assert engine.lines == [
        "prefill 200.0 tokens/s, decode 40.0 tokens/s, running 12, waiting 3, held 1, KV cache 60.0%, prefix cache hits 25.0%"
    ]
    engine.run(40)
    assert engine.lines == engine.lines[:1] * 3


def test_a_pause_is_not_averaged():
    engine = Engine()
    engine.run(10)
    engine.now_s += 3600
    engine.run(20)
    assert engine.lines == []
    engine.run(1)
    assert engine.lines[0].startswith("prefill 200.0 tokens/s, decode 40.0 tokens/s")
