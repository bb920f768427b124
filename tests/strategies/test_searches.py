"""Searches over steps and revisions: beam search, DVTS, lookahead, sequential revision."""

from __future__ import annotations

import pytest
from helpers.simulated_groups import END, run_group

from expertwire.strategies.answers import RegexAnswer
from expertwire.strategies.base import Branch, Budget, Group, Score, Status
from expertwire.strategies.beam import BeamSearch
from expertwire.strategies.dvts import DVTS
from expertwire.strategies.lookahead import ROLLOUT, Lookahead
from expertwire.strategies.sequential_revision import SequentialRevision
from expertwire.strategies.step_retries import StepRetries
from expertwire.strategies.steps import aggregate, step_scores
from expertwire.strategies.verifiers import VerifierPolicy

NUMBER = RegexAnswer(r"\d+")


def digits(depth):
    """A model whose step is a digit and ";": branch i says (i + 3 * step) % 10; the last of `depth` steps has no ";"."""

    def model(index, text, greedy):
        steps = text.count(";")
        if text and not text.endswith(";"):
            return (";" if steps < depth - 1 else END), -0.1
        return ("9" if greedy else str((index + 3 * steps) % 10)), -0.1

    return model


def digit_sum(candidates):
    return [float(sum(int(char) for char in candidate.text if char.isdigit())) for candidate in candidates]


@pytest.mark.parametrize(
    ("aggregation", "scores", "expected"),
    [
        ("last", [0.9, 0.2, 0.5], 0.5),
        ("min", [0.9, 0.2, 0.5], 0.2), ("prod", [0.9, 0.2, 0.5], 0.09), ("last", [None, 0.5], 0.5),
        ("last", [0.5, None], None), ("min", [None, 0.5], None), ("prod", [None, 0.5], None), ("last", [], None),
    ],
)  # fmt: skip
def test_aggregations_by_hand(aggregation, scores, expected):
    assert aggregate(scores, aggregation) == (None if expected is None else pytest.approx(expected))


def test_scores_of_steps_come_from_the_parents_too():
    """A child forked after step one, where its parent went on to a second step that is not the child's."""
    parent = Branch(
        index=0, token_ids=(1, 2, 3, 4), step_ends=(2, 4), status=Status.PRUNED,
        scores=(Score(num_tokens=2, value=0.9), Score(num_tokens=4, value=0.1)),
    )  # fmt: skip
    child = Branch(
        index=1, parent=0, num_shared=3, num_forced=1, token_ids=(1, 2, 7, 8, 9), step_ends=(2, 4), status=Status.FINISHED,
        scores=(Score(num_tokens=4, value=0.8), Score(num_tokens=5, value=0.7)),
    )  # fmt: skip
    group = Group(num_prompt_tokens=1, branches=(parent, child))
    assert step_scores(group, child) == [0.9, 0.8, 0.7]


class TestBeamSearch:
    def test_the_best_go_on_and_are_expanded_to_n(self):
        """Four beams of width two: steps 0, 1, 2, 3; beams 3 and 2 go on, each with one fork more."""
        outcome = run_group(BeamSearch(4, 2, digit_sum, step_text=";"), digits(2))
        branches = outcome.group.branches
        assert [branch.text[:2] for branch in branches[:4]] == ["0;", "1;", "2;", "3;"]
        assert [branch.parent for branch in branches] == [None] * 4 + [3, 2]
        assert outcome.statuses() == ["pruned", "pruned", "finished", "finished", "finished", "finished"]
        # The second digits of branches 2 to 5 are 5, 6, 7, 8: the sums are 7, 9, 3 + 7 = 10 and 2 + 8 = 10.
        assert [branch.text for branch in branches[2:]] == ["2;5", "3;6", "3;7", "2;8"]
        assert outcome.selection.branches == (4,)

    def test_tokens_are_sampled_once(self):
        """Four first steps of two tokens, four second steps of two."""
        outcome = run_group(BeamSearch(4, 2, digit_sum, step_text=";"), digits(2))
        assert outcome.num_sampled == outcome.group.num_tokens == 4 * 2 + 4 * 2

    def test_beams_that_are_complete_leave_and_the_others_are_expanded(self):
        """An even branch ends at once; of the odd ones the best goes on, four times; of these three end."""

        def model(index, text, greedy):
            if not text:
                return str(index), -0.1
            if len(text) == 1 and index < 4 and index % 2 == 0:
                return END, -0.1
            return (";" if text.count(";") == 0 or index < 4 else END), -0.1

        outcome = run_group(BeamSearch(4, 4, digit_sum, step_text=";", max_steps=3), model)
        assert outcome.statuses()[:4] == ["finished", "pruned", "finished", "pruned"]
        assert [branch.parent for branch in outcome.group.branches[4:]] == [3, 3, 3]
        assert outcome.statuses()[4:] == ["finished"] * 3

    def test_after_the_last_step_beams_run_to_their_ends(self):
        outcome = run_group(BeamSearch(4, 2, digit_sum, step_text=";", max_steps=1), digits(3))
        assert outcome.statuses() == ["finished"] * 4
        assert outcome.group.branches[3].text == "3;6;9"

    def test_a_beam_whose_verifier_fails_does_not_go_on(self):
        def fails_for_three(candidates):
            return [float("nan") if candidate.text == "3;" else score
                    for candidate, score in zip(candidates, digit_sum(candidates), strict=True)]  # fmt: skip

        outcome = run_group(BeamSearch(4, 2, fails_for_three, step_text=";"), digits(2))
        assert outcome.statuses()[:4] == ["pruned", "finished", "finished", "pruned"]

    def test_complete_beams_may_vote(self):
        strategy = BeamSearch(4, 2, digit_sum, step_text=";", answer=NUMBER)
        selection = run_group(strategy, digits(2)).selection
        assert selection.weights == {"5": 7.0, "6": 9.0, "7": 10.0, "8": 10.0}
        assert selection.answer == "7"

    def test_if_all_scores_fail_nothing_is_returned(self):
        for depth in (1, 2):  # before and after the beams are complete
            selection = run_group(BeamSearch(2, 1, lambda _: [float("nan")], step_text=";"), digits(depth)).selection
            assert selection.branches == ()
            assert "the verifier failed for 2 of 2 branches" in selection.reason

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"width": 3}, "width must divide n = 4"), ({"width": 5}, "width must be an integer from 1 to 4"),
            ({"aggregation": "mean"}, "aggregation must be one of 'last', 'min', 'prod'"), ({"step_text": ""}, "step_text"),
            ({"verifier": None}, "verifier must be given"), ({"max_steps": 0}, "max_steps"), ({"answer": 5}, "answer"),
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("kind", [BeamSearch, DVTS])
    def test_bad_options_name_the_field(self, kind, options, message):
        with pytest.raises(ValueError, match=message):
            kind(**{"n": 4, "width": 2, "verifier": digit_sum, **options})


class TestDVTS:
    def test_subtrees_are_independent(self):
        """Beam search would go on with 3 and 2; subtrees {0, 1} and {2, 3} go on with 1 and 3."""
        outcome = run_group(DVTS(4, 2, digit_sum, step_text=";"), digits(2))
        branches = outcome.group.branches
        assert outcome.statuses() == ["pruned", "finished", "pruned", "finished", "finished", "finished"]
        assert [branch.parent for branch in branches] == [None] * 4 + [1, 3]
        assert [branch.label for branch in branches] == ["tree-0"] * 2 + ["tree-1"] * 2 + ["tree-0", "tree-1"]
        # Sums: 1 + 4 and 1 + 7 in one tree, 3 + 6 and 3 + 8 in the other.
        assert outcome.selection.branches == (5,)

    def test_a_subtree_ends_when_its_best_is_complete(self):
        def model(index, text, greedy):
            if not text:
                return str(index), -0.1
            return (END if index == 1 else ";"), -0.1

        outcome = run_group(DVTS(2, 2, digit_sum, step_text=";"), model)
        assert outcome.statuses() == ["pruned", "finished"]

    def test_a_branch_that_completed_and_lost_does_not_end_its_subtree_later(self):
        """Branch 1 ends with 8 after the first step, where branch 0 has 9; that goes on to 9 + 0 and 9 + 1."""

        def model(index, text, greedy):
            if not text:
                return ("9" if index == 0 else "8"), -0.1
            if text.endswith(";"):
                return ("0" if index == 0 else "1"), -0.1
            return (END if index == 1 or ";" in text else ";"), -0.1

        outcome = run_group(DVTS(2, 2, digit_sum, step_text=";"), model)
        assert outcome.statuses() == ["finished"] * 3
        assert outcome.text == "9;1"


class TestStepRetries:
    def test_a_step_is_sampled_again_from_where_it_began(self):
        """Branch 0 says "0;", which is refused; 1 says "1;"; 1 to 4 go on with 4 to 7, and 5 with 8."""

        def accepts(candidates):
            return [float(candidate.text in ("1;", "1;8")) for candidate in candidates]

        outcome = run_group(StepRetries(accepts, step_text=";"), digits(2))
        branches = outcome.group.branches
        assert [branch.parent for branch in branches] == [None, None, 1, 2, 3, 4]
        assert [branch.num_shared for branch in branches] == [0, 0, 2, 2, 2, 2]
        assert outcome.text == "1;8"
        assert outcome.num_sampled == 2 + 4 + 4 * 2
        assert outcome.selection.reason == "5 steps were sampled again"

    def test_a_score_at_least_least_is_accepted(self):
        assert run_group(StepRetries(digit_sum, step_text=";", least=2), digits(2)).text == "2;5"

    @pytest.mark.parametrize("score", [0.0, float("nan")])
    def test_after_the_last_retry_the_output_is_not_judged(self, score):
        outcome = run_group(StepRetries(lambda _: [score], step_text=";", max_retries=2), digits(2))
        assert outcome.statuses() == ["pruned", "pruned", "finished"]
        assert outcome.text == "2;5"
        assert not outcome.group.branches[2].scores

    def test_a_branch_whose_verifier_failed_is_not_chosen_when_the_budget_ends(self):
        strategy = StepRetries(lambda _: [float("nan")], step_text=";", budget=Budget(branches=2))
        selection = run_group(strategy, digits(1)).selection
        assert selection.branches == ()
        assert "the verifier failed for 2 of 2 branches" in selection.reason

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"verifier": None}, "verifier must be given"), ({"step_text": ""}, "step_text"), ({"least": "x"}, "least"),
            ({"max_retries": -1}, "max_retries"),
        ],
    )  # fmt: skip
    def test_bad_options_name_the_field(self, options, message):
        with pytest.raises(ValueError, match=message):
            StepRetries(**{"verifier": digit_sum, **options})


class TestLookahead:
    def test_a_step_is_judged_by_what_follows(self):
        """Branch 0 begins with the worse step, and its greedy rollout ends better."""

        def model(index, text, greedy):
            if not text:
                return str(index), -0.1
            if not text.endswith(";"):
                return (END if ";" in text else ";"), -0.1
            return ("9" if text.startswith("0") else "1"), -0.1

        outcome = run_group(Lookahead(2, 2, digit_sum, step_text=";"), model)
        beams = [branch for branch in outcome.group.branches if branch.label != ROLLOUT]
        rollouts = [branch for branch in outcome.group.branches if branch.label == ROLLOUT]
        assert [branch.status.value for branch in beams] == ["finished", "pruned", "finished"]
        assert {rollout.parent for rollout in rollouts} >= {0, 1}
        assert outcome.text == "0;9"
        beam = run_group(BeamSearch(2, 2, digit_sum, step_text=";"), model)
        assert beam.text == "1;1", "without lookahead the better first step wins"

    def test_rollouts_are_greedy_and_take_so_many_steps(self):
        outcome = run_group(Lookahead(2, 1, digit_sum, lookahead=2, step_text=";"), digits(4))
        rollouts = [branch for branch in outcome.group.branches if branch.label == ROLLOUT]
        first = rollouts[0]
        assert first.text == "0;9;9;"
        assert first.status is Status.PRUNED
        assert all(
            branch.label != ROLLOUT for branch in map(outcome.group.branches.__getitem__, outcome.selection.branches)
        )


class TestSequentialRevision:
    @staticmethod
    def model(index, text, greedy):
        """A branch says its index and ends."""
        return (END if text and text[-1].isdigit() else str(index)), -0.1

    def test_an_output_is_made_to_go_on(self):
        outcome = run_group(SequentialRevision(2, text=" Wait "), self.model)
        assert outcome.text == "0 Wait 1 Wait 2"
        assert outcome.num_sampled == 6  # the forced tokens are not sampled
        assert outcome.selection.reason == "after 2 revisions"

    def test_revisions_vote(self):
        def model(index, text, greedy):
            return (END if text and text[-1].isdigit() else "577"[index % 3]), -0.1

        strategy = SequentialRevision(2, chains=1, choose="majority", answer=NUMBER)
        selection = run_group(strategy, model).selection
        assert selection.answer == "7"
        assert selection.weights == {"5": 1.0, "7": 2.0}

    def test_the_end_of_reasoning_is_replaced(self):
        """The end's token (here "|") is left out; after the last revision it stays and the output goes on to its end."""

        def model(index, text, greedy):
            if "|" in text:
                return END, -0.1
            return ("|" if text and text[-1].isdigit() else str(index)), -0.1

        outcome = run_group(SequentialRevision(1, text="W", end_text="|"), model)
        assert outcome.text == "0W1|"
        assert outcome.statuses() == ["pruned", "finished"]

    def test_a_budget_of_branches_leaves_the_last_output(self):
        outcome = run_group(SequentialRevision(5, text="W", budget=Budget(branches=3)), self.model)
        assert outcome.text == "0W1W2"
        with_end = SequentialRevision(5, text="W", end_text="|", budget=Budget(branches=2))

        def model(index, text, greedy):
            if text.endswith("|"):
                return END, -0.1
            return ("|" if text and text[-1].isdigit() else str(index)), -0.1

        assert run_group(with_end, model).text == "0W1|"

    def test_what_ended_for_its_length_is_not_revised(self):
        outcome = run_group(SequentialRevision(3), lambda index, text, greedy: ("a", -0.1), max_tokens=5)
        assert outcome.statuses() == ["finished"]


def test_a_policy_of_zero_keeps_beams_alive():
    strategy = BeamSearch(
        2, 1, lambda _: [float("nan")], step_text=";", verifier_policy=VerifierPolicy(on_failure="zero")
    )
    assert run_group(strategy, digits(1)).selection.branches == (0,)
