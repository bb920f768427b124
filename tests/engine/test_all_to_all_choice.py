"""An engine computes the same bits whichever way its tokens travel."""

import importlib.resources
import json

import psutil
import pytest
import test_invariance as invariance
from helpers import parity

from expertwire import LLM, SamplingParams
from expertwire.engine.frontend.api import EngineFailed

DEMO = str(importlib.resources.files("expertwire") / "demo_model")
LENGTHS = [1, 2, 17, 65, 200]


def test_tiny_checkpoint():
    options = [{"ep_size": 1}, {"ep_size": 2, "num_redundant_experts": 2, "all2all_backend": "nvlink"}]
    invariance.check("qwen3_moe", "bfloat16", LENGTHS, options)


@pytest.mark.slow
def test_a_frozen_rank_is_named():
    """By those that wait for it, with the layer and the phase."""
    before = set(psutil.Process().children())
    with LLM(
        DEMO, launcher="local", ep_size=2, threads_per_rank=1, all2all_backend="nvlink", step_timeout_s=10.0
    ) as llm:
        llm.generate(["1+1="], SamplingParams(max_tokens=2), use_tqdm=False)
        llm.stats()  # afterwards all ranks have answered everything, and wait for a plan
        children = set(psutil.Process().children()) - before
        started = sorted(children, key=lambda child: (child.create_time(), child.pid))[-3:]
        _controller, _rank_0, rank_1 = started
        rank_1.suspend()
        with pytest.raises(EngineFailed, match=r"^rank 1 has stalled: .* dispatch of layer \d+") as failed:
            llm.generate(["1+1="], SamplingParams(max_tokens=8), use_tqdm=False)
    assert failed.value.rank == 1
    _, alive = psutil.wait_procs(started, 15)
    assert not alive


def said(outputs):
    """Tokens and log-probabilities, of prompts too if they were asked for."""
    entries = [at for out in outputs for at in [*(out.prompt_logprobs or [])[1:], *out.outputs[0].logprobs]]
    return [(token, entry.logprob) for at in entries for token, entry in at.items()]


def table_of(folder, **us):
    """A file by which backends took so long between two CPU ranks."""
    entries = [{"ranks": 2, "tokens": 64, "backend": name, "nccl": {}, "p50_us": value} for name, value in us.items()]
    file = {"machine": {"device": "cpu", "name": "a CPU"}, "row_bytes": 512, "top_k": 2, "entries": entries}
    path = folder / "times.json"
    path.write_text(json.dumps(file))
    return str(path)


@pytest.mark.slow
def test_rows_that_travel_in_fp8_are_rounded_alike_on_any_number_of_ranks(tmp_path):
    """Also where they stay on their rank. A table decides how those of two ranks travel."""
    params = SamplingParams(temperature=0, max_tokens=12, logprobs=5, prompt_logprobs=5, ignore_eos=True)
    table = table_of(tmp_path, nvlink=50.0, reference=40.0, nccl=60.0)
    answers, ways = [], []
    for options in (
        {"ep_size": 1},
        {"ep_size": 2, "num_redundant_experts": 2, "all2all_table": table},
        {"ep_size": 4},
    ):
        options |= {"dispatch_dtype": "fp8", "kv_cache_memory_bytes": 20_000_000}
        with LLM(DEMO, launcher="local", threads_per_rank=1, **options) as llm:
            answers.append(said(llm.generate(["12+34=", "Sort: dcab", "7*8="], params, use_tqdm=False)))
            ways.append(llm.model_info.all_to_all)
    assert answers[0] == answers[1] == answers[2]
    assert [way.partition(":")[0] for way in ways] == ["", "reference", "nvlink"]
    assert ways[1].endswith("40 us, nvlink 50 us, nccl 60 us")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ep_size": 3}, "was measured with 2 ranks, not with 3"),
        ({"ep_size": 2, "device": "cuda"}, "was measured on cpu, the ranks are on cuda"),
        ({"ep_size": 2, "all2all_backend": "nccl"}, "has no effect with all2all_backend 'nccl'"),
    ],
)
def test_a_table_of_other_ranks_is_refused_before_any_starts(tmp_path, options, message):
    before = psutil.Process().children()
    with pytest.raises(ValueError, match=f"^all2all_table .*{message}"):
        LLM(DEMO, launcher="local", all2all_table=table_of(tmp_path, nccl=1.0), **options)
    assert psutil.Process().children() == before


def test_rows_that_no_scale_fits():
    with pytest.raises(
        ValueError, match=r"^dispatch_dtype 'fp8' needs rows of a multiple of 128 numbers; Qwen3Moe.* has 96"
    ):
        LLM(parity.checkpoint("qwen3_moe"), launcher="local", dispatch_dtype="fp8")


@pytest.mark.full
@pytest.mark.parametrize("variant", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tiny_checkpoints_on_many_ranks(variant, dtype):
    options = [{"ep_size": size, "all2all_backend": name} for name in ("reference", "nvlink") for size in (2, 4)]
    invariance.check(variant, dtype, LENGTHS, options)


@pytest.mark.full
@pytest.mark.parametrize("ep_size", [2, 4])
def test_demo_model(ep_size):
    """Also with requests that run together."""
    params = SamplingParams(temperature=0.7, seed=5, max_tokens=24, logprobs=5, ignore_eos=True)
    prompts = ["12+34=", "Sort: dcab", "Reverse: hello", "7*8="]

    def run(all_to_all):
        with LLM(DEMO, launcher="local", ep_size=ep_size, threads_per_rank=1, all2all_backend=all_to_all) as llm:
            outputs = llm.generate(prompts, params, use_tqdm=False)
        return said(outputs)

    assert run("nvlink") == run("reference")
