"""Warm-up: compile every compiled loop before there is a request to wait for the compiler.

Letters as in `plan`.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from expertwire.scheduler.config import CacheSpec, SchedulerConfig
from expertwire.scheduler.plan import StepResult
from expertwire.scheduler.request import Request
from expertwire.scheduler.sampling_params import SamplingParams
from expertwire.scheduler.scheduler import Scheduler

_cache = partial(CacheSpec, bytes_per_token=1, writers=(0,), readers=(0,))
_CACHES = (
    _cache(name="full", kind="full"),
    _cache(name="window", kind="window", window=3),
    _cache(name="chunk", kind="chunk", chunk_size=2),
    _cache(name="state", kind="state", snapshot_every=4),
)


def warm_up() -> None:
    """Serve a few requests on a simulated rank, with a common prefix, a group that forks, a preemption and a failure.

    Takes some 10 s where nothing has been compiled yet, and otherwise a fraction of a second.
    """
    config = SchedulerConfig(
        num_ranks=1,
        max_num_seqs=3,
        max_num_batched_tokens=4,
        max_model_len=12,
        block_size=2,
        num_blocks=10,
        max_queued_requests=9,
        eos_token_ids=(1,),
        vocab_size=9,
        chunked_prefill_size=3,
    )
    scheduler = Scheduler(config, _CACHES)
    for key in range(3):
        scheduler.submit(_request(key), 0.0)
    output: list[int] = []  # of request 0
    for step in range(60):
        plan = scheduler.plan(0.0)
        if plan is not None:
            slot_O = plan.sched_slot_S[plan.sched_sample_S == 1]
            token_O = np.full(len(slot_O), 4, np.int32)
            if step == 4:
                token_O[-1:] = -1
            result = StepResult.sampled(step=plan.step, rank=0, slot_O=slot_O, token_O=token_O)
            output += [key for key in scheduler.commit(plan, [result], 0.0).key_O.tolist() if key == 0]
        if step == 6:
            scheduler.submit_group([_request(key, len(output)) for key in (4, 5)], 0.0, parent=0)
        scheduler.check_integrity()
    assert scheduler.idle, f"the warm-up does not end: {scheduler.stats()}"
    stats = scheduler.stats()
    assert min(stats["preemptions"], stats["cached_tokens"], stats["non_finite"]) > 0, (
        f"the warm-up leaves something out: {stats}"
    )


def _request(key: int, num_output: int = 0) -> Request:
    prompt, output = np.full(5, 2, np.int32), np.full(num_output, 4, np.int32)
    return Request(
        key=key, prompt=prompt, output=output, params=SamplingParams(max_tokens=7, stop_token_ids=[3]), seed=0
    )
