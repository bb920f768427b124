"""Strategies in the offline API: on an engine without a model, and on the demo model with two ranks."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers.conservation import conserved_tokens

import expertwire
from expertwire.deploy.demo_task import check, first_wrong_step, make_problem
from expertwire.strategies import (
    BeamSearch,
    BestOfN,
    Budget,
    ConfidenceVote,
    MajorityVote,
    Needs,
    RegexAnswer,
    Selection,
    Status,
    VerifierPolicy,
)
from expertwire.strategies.base import Fork, Start

SamplingParams = expertwire.SamplingParams
DEMO = Path(expertwire.__file__).with_name("demo_model")
FREE = SamplingParams(max_tokens=12, ignore_eos=True)


def most_tokens_even(candidates):
    """As a verifier: how many tokens are even numbers."""
    return [sum(token % 2 == 0 for token in candidate.token_ids) for candidate in candidates]


@pytest.fixture(scope="module")
def llm():
    with expertwire.LLM(DEMO, load_format="mock", ep_size=2, max_num_seqs=8) as llm:
        yield llm


@pytest.fixture(scope="module")
def demo():
    with expertwire.LLM(DEMO, ep_size=2) as llm:
        yield llm


@pytest.fixture(autouse=True)
def plain_tokens(request):
    """In every test all tokens are counted. It adds to this list those of plain requests."""
    engines = [request.getfixturevalue(name) for name in ("llm", "demo") if name in request.fixturenames]
    with conserved_tokens(*(engine.stats for engine in engines)) as plain:
        yield plain


def test_best_of_n_returns_the_branch_with_the_highest_score(llm):
    prompts = [[10, 11, 12], [20, 21], [30, 31]]
    outputs = llm.generate(prompts, FREE, strategy=BestOfN(5, verifier=most_tokens_even), use_tqdm=False)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.prompt_token_ids == prompt
        branches = output.group.branches
        assert [branch.fate for branch in branches] == ["kept"] * 5
        scores = [sum(token % 2 == 0 for token in branch.token_ids) for branch in branches]
        assert [branch.score for branch in branches] == scores
        [best] = output.outputs
        assert best.index == scores.index(max(scores))
        assert best.token_ids == branches[best.index].token_ids
        assert (output.group.tokens.kept, output.group.tokens.pruned) == (5 * 12, 0)


def test_branches_are_those_of_n_outputs_with_the_same_seed(llm, plain_tokens):
    params = SamplingParams(max_tokens=9, ignore_eos=True, seed=77)
    [grouped] = llm.generate([[1, 2]], params, strategy=BestOfN(4, verifier=most_tokens_even), use_tqdm=False)
    [plain] = llm.generate([[1, 2]], SamplingParams(max_tokens=9, ignore_eos=True, seed=77, n=4), use_tqdm=False)
    plain_tokens.append(4 * 9)
    assert [branch.token_ids for branch in grouped.group.branches] == [output.token_ids for output in plain.outputs]
    assert [branch.text for branch in grouped.group.branches] == [output.text for output in plain.outputs]


def test_a_token_budget_ends_the_group(llm):
    strategy = BestOfN(4, score="mean_logprob", budget=Budget(tokens=100))
    params = SamplingParams(max_tokens=500, ignore_eos=True)
    [output] = llm.generate([[1, 2]], params, strategy=strategy, use_tqdm=False)
    assert {branch.fate for branch in output.group.branches} == {"pruned"}
    assert 100 <= sum(branch.num_own_tokens for branch in output.group.branches) < 4 * 500


def test_a_time_budget_ends_the_group_while_nothing_arrives(llm):
    released = threading.Event()
    strategy = BestOfN(
        2,
        verifier=lambda candidates: released.wait(20) and [],
        budget=Budget(seconds=0.3),
        verifier_policy=VerifierPolicy(timeout_s=1000),
    )
    [output] = llm.generate([[1, 2]], FREE, strategy=strategy, use_tqdm=False)
    released.set()
    assert [branch.score for branch in output.group.branches] == [None, None]


def fails(_):
    raise ZeroDivisionError("of the verifier")


FAULTS = {
    "raises": (fails, "has raised ZeroDivisionError: of the verifier"),
    "returns NaN": (lambda candidates: [float("nan")] * len(candidates), "not a finite number"),
    "wrong length": (lambda candidates: [1.0] * (len(candidates) + 1), "scores of"),
    "exits": (lambda _: exit(3), "has raised SystemExit"),
    "hangs": (lambda _: time.sleep(3), "has not answered in time"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("on_failure", ["drop", "zero", "error"])
def test_a_verifier_that_fails_has_the_consequence_that_its_policy_says(llm, fault, on_failure):
    verifier, message = FAULTS[fault]
    policy = VerifierPolicy(on_failure=on_failure, timeout_s=0.2 if fault == "hangs" else 60)
    strategy = BestOfN(3, verifier=verifier, verifier_policy=policy)
    if on_failure == "zero":
        [output] = llm.generate([[5]], FREE, strategy=strategy, use_tqdm=False)
        assert output.outputs[0].index == 0
        assert [branch.score for branch in output.group.branches] == [0.0] * 3
        assert all(message in branch.problems[0] for branch in output.group.branches)
    else:
        with pytest.raises(RuntimeError, match=message if on_failure == "error" else "has no result"):
            llm.generate([[5]], FREE, strategy=strategy, use_tqdm=False)
    assert llm.stats()["num_running"] == 0


def test_a_strategy_that_fails_ends_its_request_alone(llm):
    class Fails(BestOfN):
        def decide(self, group):
            return [] if group.branches and 1 / 0 else super().decide(group)

    with pytest.raises(RuntimeError, match="prompt 0: the strategy Fails has failed in decide: ZeroDivisionError"):
        llm.generate([[5]], FREE, strategy=Fails(3, verifier=most_tokens_even), use_tqdm=False)
    assert llm.generate([[5]], FREE, strategy=BestOfN(3, verifier=most_tokens_even), use_tqdm=False)


def test_wrong_arguments(llm):
    with pytest.raises(ValueError, match="n must be 1 with a strategy, which starts the branches, got 2"):
        llm.generate([[5]], SamplingParams(n=2), strategy=BestOfN(3, verifier=most_tokens_even), use_tqdm=False)


def test_best_of_n_with_the_exact_verifier_solves_more_than_one_sample(demo):
    problems = [make_problem("COUNTDOWN", 3, seed) for seed in range(12)]
    by_prompt = {problem.prompt: problem for problem in problems}

    def exact(candidates):
        return [float(check(by_prompt[candidate.prompt], candidate.text)) for candidate in candidates]

    params = SamplingParams(temperature=0.7, max_tokens=64, seed=3)
    outputs = demo.generate([*by_prompt], params, strategy=BestOfN(8, verifier=exact), use_tqdm=False)
    solved = [check(by_prompt[output.prompt], output.outputs[0].text) for output in outputs]
    first = [check(by_prompt[output.prompt], output.group.branches[0].text) for output in outputs]
    assert sum(solved) > sum(first)
    assert [max(branch.score for branch in output.group.branches) == 1 for output in outputs] == solved


def test_majority_vote_prunes_what_cannot_change_the_answer(demo):
    problem = make_problem("SUM", 3, 5)
    strategy = MajorityVote(16, answer=RegexAnswer(r"answer (\d+)"))
    params = SamplingParams(temperature=0.7, max_tokens=64, seed=3)
    [output] = demo.generate([problem.prompt], params, strategy=strategy, use_tqdm=False)
    assert output.group.answer == str(problem.answer)
    assert output.group.weights[str(problem.answer)] == max(output.group.weights.values())
    assert f"answer {problem.answer}" in output.outputs[0].text


def test_confidences_are_the_same_whatever_log_probabilities_the_client_asks_for(demo):
    vote, found = ConfidenceVote(4, RegexAnswer(r"answer (\d+)")), []
    for logprobs in (None, 0, 2):
        params = SamplingParams(max_tokens=64, seed=3, logprobs=logprobs)
        [output] = demo.generate(["SUM 40 70 15 61 ?"], params, strategy=vote, use_tqdm=False)
        found.append((output.group.weights, output.outputs[0].token_ids))
        assert (output.outputs[0].logprobs is None) == (logprobs is None)
    assert found[0][0]
    assert found == [found[0]] * 3


def test_a_fork_continues_the_tokens_of_its_parent(llm, plain_tokens):
    @dataclass(frozen=True)
    class Forks:
        needs = Needs(logprobs=True, forced_texts=("12 + 7",))

        def decide(self, group):
            if not group.branches:
                return [Start(1)]
            finished = group.branches[0].status is Status.FINISHED
            if not finished or len(group.branches) > 1:
                return []
            forced = group.forced_texts[0]
            return [Fork(0, 2, num_tokens=5, label="a"), Fork(0, 1, num_tokens=6, forced=forced), Fork(0, 1)]

        def select(self, group):
            return Selection(branches=tuple(range(len(group.branches))))

    params = SamplingParams(max_tokens=12, ignore_eos=True, seed=9, logprobs=0)
    [output] = llm.generate([[1, 2, 3]], params, strategy=Forks(), use_tqdm=False)
    parent, *children = output.group.branches
    assert [(branch.parent, branch.num_shared) for branch in children] == [(0, 5), (0, 5), (0, 9), (0, 12)]
    forced = llm.tokenizer.encode("12 + 7", add_special_tokens=False)
    assert [branch.token_ids[:5] for branch in children] == [parent.token_ids[:5]] * 4
    assert children[2].token_ids[:9] == parent.token_ids[:6] + forced
    assert children[3].token_ids == parent.token_ids  # there was no room for more
    [plain] = llm.generate([[1, 2, 3]], SamplingParams(max_tokens=12, ignore_eos=True, seed=9, n=4), use_tqdm=False)
    plain_tokens.append(4 * 12)
    for index in (1, 2):  # draws of a token depend on seed, branch and position alone
        assert output.group.branches[index].token_ids[5:] == plain.outputs[index].token_ids[5:]
    for branch, completion in zip(output.group.branches, output.outputs, strict=True):
        assert branch.text == llm.tokenizer.decode(branch.token_ids)
        assert [next(iter(entry)) for entry in completion.logprobs] == branch.token_ids
    assert sum(branch.num_own_tokens for branch in output.group.branches) == 12 + 7 + 7 + 3


def test_beams_pause_after_each_step(demo):
    problem = make_problem("COUNTDOWN", 4, 7)

    def exact(candidates):
        return [float(first_wrong_step(problem, candidate.text) is None) for candidate in candidates]

    strategy = BeamSearch(8, 2, verifier=exact, step_text=";")
    params = SamplingParams(temperature=0.7, max_tokens=64, seed=3)
    [output] = demo.generate([problem.prompt], params, strategy=strategy, use_tqdm=False)
    assert check(problem, output.outputs[0].text)
    assert any(branch.parent is not None for branch in output.group.branches)
