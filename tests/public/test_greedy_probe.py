"""A probe whose first output is greedy, on the demo model."""

from __future__ import annotations

from pathlib import Path

from helpers.conservation import conserved_tokens

import expertwire
from expertwire.deploy.demo_task import make_problem
from expertwire.deploy.demo_verifiers import process
from expertwire.strategies import BeamSearch, BestOfN, Bin, ComputeOptimal


def test_the_first_branch_is_greedy_and_the_others_are_those_of_the_seed():
    problems = [make_problem("SUM", 6, seed, "test").prompt for seed in range(12)]
    rows = (Bin(least=0.5, strategy=BestOfN(2, process)), Bin(strategy=BeamSearch(4, 4, process, step_text=";")))
    strategy = ComputeOptimal(rows, probe=2, greedy_probe=True, signal="verifier", verifier=process)
    greedy, sampled = (expertwire.SamplingParams(temperature=t, seed=3, max_tokens=64) for t in (0, 0.8))
    with expertwire.LLM(
        Path(expertwire.__file__).with_name("demo_model"), max_model_len=256, threads_per_rank=1
    ) as llm:
        alone = llm.generate(problems, greedy, use_tqdm=False)
        both = expertwire.SamplingParams(temperature=0.8, seed=3, max_tokens=64, n=2)
        branches = llm.generate(problems, both, use_tqdm=False)
        with conserved_tokens(llm.stats):
            outputs = llm.generate(problems, sampled, strategy=strategy, use_tqdm=False)
    for own, two, output in zip(alone, branches, outputs, strict=True):
        first, second, *searched = output.group.branches
        assert first.token_ids == own.outputs[0].token_ids
        assert second.token_ids == two.outputs[1].token_ids
        assert bool(searched) == (first.score + second.score < 1)
    assert len({len(output.group.branches) for output in outputs}) > 1
