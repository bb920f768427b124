"""Models with latent attention, dense and sparse, as on a GPU: all kernels interpreted, beside the same steps on the CPU."""

import numpy as np
import pytest
from helpers import architectures
from helpers.fake_graphs import FakeCapture
from test_gpu_engine import MAX_RUNNING, NUM_BLOCKS, SIZES, build

from expertwire.kernels import registry as kernels
from expertwire.kernels.gpu.device import describe
from expertwire.scheduler.config import SchedulerConfig
from expertwire.scheduler.request import Request
from expertwire.scheduler.sampling_params import SamplingParams
from expertwire.scheduler.scheduler import Scheduler


def greedy(folder, ops):
    """Return two tokens after each of two prompts."""
    config, runner = build(folder, ops, 1, FakeCapture())
    bounds = {"num_ranks": 1, "max_num_seqs": MAX_RUNNING, "max_num_batched_tokens": 24, "num_blocks": NUM_BLOCKS}
    rest = {"max_queued_requests": 9, "eos_token_ids": (), "vocab_size": config.vocab_size}
    scheduler = Scheduler(SchedulerConfig(**bounds, **rest, **SIZES), config.cache_specs())
    for key, length in enumerate((2, 5)):
        prompt = np.arange(5, 5 + length, dtype=np.int32) * (key + 3)
        params = SamplingParams(max_tokens=2, temperature=0.0)
        assert scheduler.submit(Request(key=key, prompt=prompt, params=params, seed=0), 0.0) is None
    tokens = {}
    while not scheduler.idle:
        plan = scheduler.plan(0.0)
        outputs = scheduler.commit(plan, [runner.launch(plan).finish()], 0.0)
        for key, token in zip(outputs.key_O.tolist(), outputs.token_O.tolist(), strict=True):
            tokens.setdefault(key, []).append(token)
    return tokens


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v32"])
def test_the_same_tokens_as_on_the_cpu(name):
    folder = architectures.folder(name)
    assert greedy(folder, kernels.triton(describe("cpu"))) == greedy(folder, kernels.cpu())
