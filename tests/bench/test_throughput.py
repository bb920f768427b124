"""The throughput benchmark: its figures against a clock of our own, and one run of the command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import fake_frontend

from expertwire.bench.serving import throughput
from expertwire.bench.serving.throughput import Mark, Sample, Workload
from expertwire.engine.config.engine_config import EngineConfig
from expertwire.engine.frontend.api import EngineFailed, RequestError
from expertwire.scheduler.sampling_params import SamplingParams

DEMO_MODEL = Path(throughput.__file__).parents[2] / "expertwire" / "demo_model"


class CountingFrontend(fake_frontend.FakeFrontend):
    """Gives every open request one token a poll, and notes how many were open."""

    def __init__(self):
        super().__init__()
        self.most_open = 0
        self.tokens = {}

    def poll(self, timeout_s):
        self.most_open = max(self.most_open, self.num_open)
        for number in [request.id for request in self._requests if not request.done]:
            self.tokens[number] = self.tokens.get(number, 0) + 1
            last = self.tokens[number] == self.submitted[number][1].max_tokens
            self.push(number, token_ids=(7,), finish_reason="length" if last else None)
        return super().poll(timeout_s)


@pytest.fixture
def frontend():
    return CountingFrontend()


@pytest.mark.parametrize(("prompts", "concurrency"), [(5, 2), (3, 8)])
def test_all_prompts_run_and_no_more_than_asked_at_once(frontend, prompts, concurrency):
    workload = Workload(input_len=4, output_len=3, num_prompts=prompts, concurrency=concurrency, temperature=0)
    tokens = [np.full(4, 9, np.int32)] * prompts
    sample = throughput.run(frontend, tokens, workload.params(3), concurrency)
    assert [len(job.arrivals) for job in sample.jobs] == [3] * prompts
    assert frontend.most_open == min(prompts, concurrency)
    assert (sample.prefilled is not None) == (prompts <= concurrency)


def test_a_failure_is_raised(frontend):
    def fail(timeout_s):
        frontend.fail("the engine failed at rank 1: gone", 1)
        return fake_frontend.FakeFrontend.poll(frontend, timeout_s)

    frontend.poll = fail
    with pytest.raises(EngineFailed, match="rank 1"):
        throughput.run(frontend, [np.full(4, 9, np.int32)], SamplingParams(), 1)


def test_a_refused_prompt_is_raised(frontend):
    def refuse(timeout_s):
        frontend.push(0, error=RequestError("INVALID_ARGUMENT", "no room"), token_ids=())
        return fake_frontend.FakeFrontend.poll(frontend, timeout_s)

    frontend.poll = refuse
    with pytest.raises(ValueError, match="no room"):
        throughput.run(frontend, [np.full(4, 9, np.int32)], SamplingParams(), 1)


def test_the_figures_of_a_known_run():
    # Two requests of ten tokens in, four out: first tokens at 1 s and 2 s, then one a second until 5 s.
    jobs = [
        throughput._Job(0.0, [1.0, 3.0, 4.0, 5.0]),
        throughput._Job(0.0, [2.0, 3.0, 4.0, 5.0]),
    ]
    sample = Sample(jobs=jobs, begin=Mark(wall=0, cpu=10), prefilled=Mark(wall=2, cpu=14), end=Mark(wall=5, cpu=20))
    workload = Workload(input_len=10, output_len=4, num_prompts=2, concurrency=2, temperature=0)
    info = fake_frontend.MODEL_INFO  # three CPU ranks
    result = throughput.report(EngineConfig(model="m"), info, workload, sample, 3 << 20)
    rates = result["tokens_per_s"]
    assert rates["input"] == {"all": 4, "per_rank": pytest.approx(4 / 3), "per_gpu": None, "per_core_s": 2}
    assert rates["output"] == {"all": 1.6, "per_rank": pytest.approx(1.6 / 3), "per_gpu": None, "per_core_s": 0.8}
    assert rates["total"]["all"] == pytest.approx(5.6)
    assert (rates["prefill"]["all"], rates["prefill"]["per_core_s"]) == (10, 5)
    assert (rates["decode"]["all"], rates["decode"]["per_core_s"]) == (2, 1)
    assert result["ttft_ms"]["median"] == 1500
    assert result["tpot_ms"]["median"] == pytest.approx(1e3 * (4 / 3 + 1) / 2)
    assert (result["wall_s"], result["cpu_s"], result["memory_pss_mib"]) == (5, 10, 3)
    lines = throughput.table(result).splitlines()
    assert next(line for line in lines if line.startswith("input")).split() == ["input", "4.00", "1.33", "n/a", "2.00"]


def test_random_weights_need_no_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text((DEMO_MODEL / "config.json").read_text())
    out = tmp_path / "report.json"
    command = [sys.executable, "-m", "expertwire.deploy.cli", "bench", "throughput", str(tmp_path)]
    options = [
        "--load-format",
        "dummy",
        "--num-prompts",
        "6",
        "--concurrency",
        "3",
        "--input-len",
        "8",
        "--output-len",
        "5",
    ]
    done = subprocess.run([*command, *options, "--json", str(out)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert result["model"]["architecture"] == "Qwen3MoeForCausalLM"
    assert result["tokens_per_s"]["output"]["all"] > 0
    assert result["tokens_per_s"]["output"]["per_gpu"] is None
    assert result["memory_pss_mib"] > 100
    assert result["processes"] >= 3  # this one, the controller and a rank
    assert "per core-s" in done.stdout
