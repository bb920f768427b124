"""An engine computes the same bits whichever way its tokens travel."""

import importlib.resources

import psutil
import pytest
import test_invariance as invariance

from expertwire import LLM, SamplingParams
from expertwire.engine.outputs import EngineFailed

DEMO = str(importlib.resources.files("expertwire") / "demo_model")
LENGTHS = [1, 2, 17, 65, 200]


def test_tiny_checkpoint():
    options = [{"ep_size": 1}, {"ep_size": 2, "redundant_experts": 2, "all_to_all": "nvlink"}]
    invariance.check("qwen3_moe", "bfloat16", LENGTHS, options)


def test_a_frozen_rank_is_named():
    """By those that wait for it, with the layer and the phase."""
    before = set(psutil.Process().children())
    with LLM(DEMO, launcher="local", ep_size=2, threads_per_rank=1, all_to_all="nvlink", step_timeout_s=10.0) as llm:
        llm.generate(["1+1="], SamplingParams(max_tokens=2), use_tqdm=False)
        llm.stats()  # afterwards all ranks have answered everything
        started = sorted(set(psutil.Process().children()) - before, key=lambda child: (child.create_time(), child.pid))
        _, *ranks = started  # the first is the controller
        ranks[1].suspend()
        with pytest.raises(EngineFailed, match=r"^rank 1 has stalled: .* dispatch of layer \d+") as failed:
            llm.generate(["1+1="], SamplingParams(max_tokens=8), use_tqdm=False)
    assert failed.value.rank == 1
    _, alive = psutil.wait_procs(started, 15)
    assert not alive


@pytest.mark.full
@pytest.mark.parametrize("variant", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tiny_checkpoints_on_many_ranks(variant, dtype):
    options = [{"ep_size": size, "all_to_all": name} for name in ("reference", "nvlink") for size in (2, 4)]
    invariance.check(variant, dtype, LENGTHS, options)


@pytest.mark.full
@pytest.mark.parametrize("ep_size", [2, 4])
def test_demo_model(ep_size):
    """Also with requests that run together."""
    params = SamplingParams(temperature=0.7, seed=5, max_tokens=24, logprobs=5, ignore_eos=True)
    prompts = ["12+34=", "Sort: dcab", "Reverse: hello", "7*8="]

    def run(all_to_all):
        with LLM(DEMO, launcher="local", ep_size=ep_size, threads_per_rank=1, all_to_all=all_to_all) as llm:
            outputs = llm.generate(prompts, params, use_tqdm=False)
        return [
            [(token, entry.logprob) for at in output.outputs[0].logprobs for token, entry in at.items()]
            for output in outputs
        ]

    assert run("nvlink") == run("reference")
