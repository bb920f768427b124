"""A frontend that does not read for a while gets everything all the same, also when the engine has become idle meanwhile."""

import time

from helpers import tiny_checkpoints as tiny

from expertwire import SamplingParams
from expertwire.engine.config.engine_config import EngineConfig
from expertwire.engine.engine import Engine
from expertwire.engine.frontend.frontend import Frontend
from expertwire.engine.launcher import LocalLauncher

NUM_REQUESTS = 10


def wait_until_idle(frontend):
    deadline = time.monotonic() + 120
    while (stats := frontend.stats())["num_running"] or stats["num_waiting"]:
        assert time.monotonic() < deadline, stats
        time.sleep(0.05)


def test_outputs_wait_for_a_slow_frontend():
    # Far more than a socket's buffer holds.
    params = SamplingParams(max_tokens=2, prompt_logprobs=64, ignore_eos=True)
    config = EngineConfig(
        model=str(tiny.cached("qwen3")), dtype="float32", threads_per_rank=1, kv_cache_memory_bytes=20_000_000
    )
    with Engine(config, LocalLauncher()) as engine:
        slow, other = (Frontend(engine.connect(), None) for _ in range(2))
        for i in range(NUM_REQUESTS):
            slow.submit(slow.encode(tiny.prompt(300, seed=i), params), params)
        while not other.stats()["num_plans"]:
            time.sleep(0.01)
        wait_until_idle(other)
        updates, deadline = [], time.monotonic() + 20
        while slow.num_open and time.monotonic() < deadline:
            updates += slow.poll(0.2)
        other.close()
        slow.close()
    assert sum(update.done for update in updates) == NUM_REQUESTS
    assert [len(update.prompt_logprobs) for update in updates if update.prompt_logprobs] == [300] * NUM_REQUESTS
