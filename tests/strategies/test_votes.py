"""Strategies that sample whole outputs and choose among them: best-of-n, votes, first-k."""

from __future__ import annotations

import math

import pytest
from helpers.simulated_groups import run_group, scripted

from expertwire.strategies.answers import RegexAnswer, WholeText
from expertwire.strategies.base import Budget
from expertwire.strategies.best_of_n import BestOfN
from expertwire.strategies.confidence_vote import ConfidenceVote
from expertwire.strategies.first_k_finish import FirstKFinish
from expertwire.strategies.majority_vote import MajorityVote
from expertwire.strategies.verifier_vote import VerifierVote
from expertwire.strategies.verifiers import VerifierError, VerifierPolicy, checked_scores

NUMBER = RegexAnswer(r"\d+")


def digits(candidates):
    """A verifier whose score is the output's number."""
    return [float(candidate.text or "0") for candidate in candidates]


def failing(candidates):
    """A verifier that fails for outputs with a 9."""
    if any("9" in candidate.text for candidate in candidates):
        raise ArithmeticError("nine")
    return digits(candidates)


class TestBestOfN:
    def test_it_takes_the_highest_score_and_of_equals_the_first(self):
        outcome = run_group(BestOfN(4, digits), scripted("3", "7", "5", "7"))
        assert outcome.selection.branches == (1,)
        assert "highest verifier of 4: 7" in outcome.selection.reason

    def test_without_a_verifier_it_takes_the_likeliest_if_asked(self):
        rows = [[-1.0, -1.0], [-0.1, -0.2], [-0.5, -0.1]]
        model = scripted("a", "b", "c", logprobs=rows)
        assert run_group(BestOfN(3, score="mean_logprob"), model).text == "b"

    @pytest.mark.parametrize(
        ("on_failure", "outputs", "branches"),
        [("drop", ("9", "2", "5"), (2,)), ("zero", ("9", "-2"), (0,)), ("drop", ("9", "19"), ())],
    )
    def test_failures_of_the_verifier(self, on_failure, outputs, branches):
        strategy = BestOfN(len(outputs), failing, verifier_policy=VerifierPolicy(on_failure=on_failure))
        selection = run_group(strategy, scripted(*outputs)).selection
        assert selection.branches == branches
        assert branches or "failed for 2 of 2 branches" in selection.reason

    def test_an_error_ends_the_request(self):
        with pytest.raises(VerifierError, match="nine"):
            run_group(BestOfN(2, failing, verifier_policy=VerifierPolicy(on_failure="error")), scripted("9", "1"))

    def test_a_budget_leaves_the_longest_output(self):
        outcome = run_group(BestOfN(3, digits, budget=Budget(tokens=7)), scripted("1234567"))
        assert outcome.num_sampled == 7
        assert outcome.selection.branches == (0,)
        assert "budget" in outcome.selection.reason

    def test_bad_options_name_the_field(self):
        for options, message in [
            ({"n": 0}, "n must be an integer >= 1, got 0"),
            ({"n": True}, "n must be an integer"),
            ({"n": 2, "score": "best"}, "score must be one of 'verifier', 'mean_logprob'"),
            ({"n": 2}, "verifier must be given"),
            ({"n": 2, "score": "mean_logprob", "verifier": digits}, "verifier must be None"),
        ]:
            with pytest.raises(ValueError, match=message):
                BestOfN(**options)


class TestMajorityVote:
    def test_most_votes_win_and_ties_go_to_the_lowest_index(self):
        outcome = run_group(MajorityVote(5, NUMBER, stop_when_decided=False), scripted("7", "is 5", "7", "5", "none"))
        assert outcome.selection.answer == "7"
        assert outcome.selection.branches == (0,)
        assert outcome.selection.weights == {"7": 2.0, "5": 2.0}

    def test_outputs_without_an_answer_have_no_vote(self):
        outcome = run_group(MajorityVote(4, NUMBER), scripted("none", "no", "what", "3"))
        assert outcome.selection.answer == "3"
        assert outcome.selection.branches == (3,)

    def test_without_any_answer_the_first_finished_branch_is_the_result(self):
        outcome = run_group(MajorityVote(2, NUMBER), scripted("long text", "no"))
        assert outcome.selection.answer is None
        assert outcome.selection.branches == (0,)
        assert "none of 2 finished branches has an answer" in outcome.selection.reason

    def test_it_ends_when_nothing_can_overtake(self):
        """Two votes of three decide; the third branch is still at work."""
        model = scripted("7", "7", "12345678")
        early = run_group(MajorityVote(3, NUMBER), model)
        late = run_group(MajorityVote(3, NUMBER, stop_when_decided=False), model)
        assert early.selection.answer == late.selection.answer == "7"
        assert early.statuses() == ["finished", "finished", "pruned"]
        assert early.num_sampled < late.num_sampled

    def test_a_lead_that_a_tie_could_take_is_not_decided(self):
        """Branch 0 could still make it one to one, and has the lower index."""
        outcome = run_group(MajorityVote(2, NUMBER), scripted("12345", "7"))
        assert outcome.selection.answer == "12345"


def test_confidence_weighs_votes():
    """Two unsure votes of exp(-1) = 0.37 against a sure one of exp(-0.1) = 0.90."""
    rows = [[-1.0, -1.0], [-1.0, -1.0], [-0.1, -0.1]]
    outcome = run_group(ConfidenceVote(3, NUMBER), scripted("4", "4", "8", logprobs=rows))
    assert outcome.selection.answer == "8"
    assert outcome.selection.weights == pytest.approx({"4": 2 * math.exp(-1), "8": math.exp(-0.1)})


def test_the_lowest_window_is_not_the_mean():
    """Branch 0 has the better mean, but a window of two tokens with mean -2."""
    rows = [[-0.0, -2.0, -2.0, 0.0, 0.0, 0.0, 0.0], [-1.0] * 7]
    model = scripted("aaaaa1", "bbbbb2", logprobs=rows)
    assert run_group(ConfidenceVote(2, NUMBER), model).selection.answer == "1"
    lowest = ConfidenceVote(2, NUMBER, confidence="lowest_window", window=2)
    assert run_group(lowest, model).selection.weights == pytest.approx({"1": math.exp(-2), "2": math.exp(-1)})


def test_a_verifier_weighs_votes():
    """Snell's weighted best-of-n by hand: 0.3 + 0.4 > 0.6, and of the answer's branches the better one."""
    scores = {"a1": 0.3, "b2": 0.6, "c1": 0.4}
    strategy = VerifierVote(3, NUMBER, lambda candidates: [scores[candidate.text] for candidate in candidates])
    selection = run_group(strategy, scripted("a1", "b2", "c1")).selection
    assert selection.answer == "1"
    assert selection.branches == (2,)
    assert selection.weights == pytest.approx({"1": 0.7, "2": 0.6})


def test_a_verifier_that_fails_takes_the_vote_away():
    selection = run_group(VerifierVote(3, NUMBER, failing), scripted("9", "9", "1")).selection
    assert selection.weights == {"1": 1.0}


class TestFirstKFinish:
    def test_the_first_ends_the_others(self):
        outcome = run_group(FirstKFinish(3), scripted("long 1", "2", "longer 3"))
        assert outcome.text == "2"
        assert outcome.statuses() == ["pruned", "finished", "pruned"]
        assert outcome.num_sampled == 6  # two steps of three branches

    def test_the_first_k_vote(self):
        outcome = run_group(FirstKFinish(5, 3, NUMBER), scripted("5", "a7", "aa7", "aaaaa5", "aaaaa5"))
        assert outcome.selection.answer == "7"
        assert outcome.statuses() == ["finished"] * 3 + ["pruned"] * 2

    def test_several_answers_need_an_extractor(self):
        with pytest.raises(ValueError, match="answer must be given"):
            FirstKFinish(4, 2)
        with pytest.raises(ValueError, match="k must be an integer from 1 to 4, got 5"):
            FirstKFinish(4, 5, WholeText())


@pytest.mark.parametrize(
    ("returned", "problem"),
    [
        ([1.0], "1 scores of 2 candidates"), (None, "NoneType"), ("ab", "str"), ([1.0, float("nan")], "candidate 1 is nan"),
        ([1.0, "2"], "'2', not a number"), ([True, 1.0], "True"),
        ([1.0, float("inf")], "inf"), ([1.0, None], "None"), (3.0, "float"),
    ],
)  # fmt: skip
def test_bad_scores_are_failures(returned, problem):
    with pytest.raises(VerifierError, match=problem):
        checked_scores(returned, 2)


def test_good_scores_may_be_an_array():
    import numpy as np

    assert checked_scores(np.array([1.5, 2.0], np.float32), 2) == [1.5, 2.0]
    assert checked_scores((), 0) == []


@pytest.mark.parametrize(
    ("options", "field"),
    [({"on_failure": "ignore"}, "on_failure"), ({"timeout_s": 0}, "timeout_s"), ({"max_batch": 0}, "max_batch")],
)
def test_bad_policies_are_refused(options, field):
    with pytest.raises(ValueError, match=rf"verifier_policy\.{field}"):
        VerifierPolicy(**options)


@pytest.mark.parametrize("options", [{"tokens": 0}, {"branches": 1.5}, {"seconds": -1}, {"seconds": float("nan")}])
def test_bad_budgets_are_refused(options):
    with pytest.raises(ValueError, match=rf"budget\.{next(iter(options))}"):
        Budget(**options)
