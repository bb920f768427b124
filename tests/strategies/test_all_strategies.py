"""Every strategy, with random models, orders of arrival, verifiers that fail, and budgets."""

from __future__ import annotations

import dataclasses
import json
import random

import pytest
from helpers.examples import examples
from helpers.simulated_groups import END, run_group
from hypothesis import given
from hypothesis import strategies as st

from expertwire.strategies.accounting import count_tokens
from expertwire.strategies.adaptive_consistency import AdaptiveConsistency
from expertwire.strategies.answers import RegexAnswer
from expertwire.strategies.auto import Auto
from expertwire.strategies.base import UNLIMITED, Branch, Budget, Finish, Fork, Group, Score, Selection, Start, Status
from expertwire.strategies.beam import BeamSearch
from expertwire.strategies.best_of_n import BestOfN
from expertwire.strategies.compute_optimal import Bin, ComputeOptimal
from expertwire.strategies.confidence_pruning import ConfidencePruning
from expertwire.strategies.confidence_vote import ConfidenceVote
from expertwire.strategies.dvts import DVTS
from expertwire.strategies.first_k_finish import FirstKFinish
from expertwire.strategies.lookahead import Lookahead
from expertwire.strategies.majority_vote import MajorityVote
from expertwire.strategies.record import Recorded, ReplayMismatch, action_from_dict, action_to_dict, replay
from expertwire.strategies.registry import STRATEGIES
from expertwire.strategies.sequential_revision import SequentialRevision
from expertwire.strategies.step_retries import StepRetries
from expertwire.strategies.verifier_vote import VerifierVote
from expertwire.strategies.verifiers import VerifierPolicy

NUMBER = RegexAnswer(r"\d+")


def verifier(candidates):
    """Scores from the text, and failures of all kinds for some texts."""
    scores = []
    for candidate in candidates:
        value = sum(map(ord, candidate.text)) % 11
        if value == 7:
            raise ArithmeticError("seven")
        scores.append(float("nan") if value == 3 else value / 10)
    return scores


def all_strategies(budget: Budget, on_failure: str = "drop") -> list:
    policy = VerifierPolicy(on_failure=on_failure)
    verified = {"verifier": verifier, "verifier_policy": policy, "budget": budget}
    search = {"n": 4, "width": 2, "step_text": ";", **verified}
    search_in_table = BeamSearch(**{**search, "budget": UNLIMITED}, answer=NUMBER)
    table = (
        Bin(least=0.75, strategy=MajorityVote(6, NUMBER)),
        Bin(least=0.5, strategy=search_in_table),
        Bin(strategy=SequentialRevision(1)),
    )
    return [
        AdaptiveConsistency(9, NUMBER, concurrency=3, budget=budget),
        Auto(NUMBER, budget if budget != UNLIMITED else Budget(branches=6)),
        BeamSearch(**search),
        BeamSearch(**search, aggregation="prod", max_steps=2, answer=NUMBER),
        BestOfN(4, score="mean_logprob", budget=budget),
        BestOfN(5, **verified),
        ComputeOptimal(table, answer=NUMBER, **verified),
        ConfidencePruning(8, NUMBER, warm_up=3, window=2, keep_share=0.5, budget=budget),
        ConfidencePruning(8, NUMBER, warm_up=2, window=1, consensus=0.6, top_share=0.5, budget=budget),
        ConfidenceVote(5, NUMBER, confidence="lowest_window", window=2, budget=budget),
        DVTS(**search, aggregation="min"),
        FirstKFinish(5, 2, NUMBER, budget=budget),
        Lookahead(**search, lookahead=2),
        MajorityVote(7, NUMBER, budget=budget),
        SequentialRevision(2, chains=2, choose="majority", answer=NUMBER, budget=budget),
        SequentialRevision(2, end_text=";", budget=budget),
        StepRetries(step_text=";", least=0.3, max_retries=5, **verified),
        VerifierVote(5, NUMBER, **verified),
    ]


def random_model(seed: int):
    """Return a model that says digits, letters and ";", and ends outputs at random places; some have no answer."""

    def model(index: int, text: str, greedy: bool) -> tuple[str, float]:
        rng = random.Random(f"{seed} {0 if greedy else index} {text}")
        char = rng.choice(["1", "2", "2", "a", "b", ";", END] if len(text) < 12 else [END])
        return char, -rng.random()

    return model


BUDGETS = st.sampled_from([UNLIMITED, UNLIMITED, Budget(tokens=25), Budget(branches=4), Budget(seconds=6)])
POLICIES = st.sampled_from(["drop", "zero"])


def test_the_list_is_complete():
    assert {type(strategy) for strategy in all_strategies(UNLIMITED)} == set(STRATEGIES.values())


@pytest.mark.parametrize("which", range(len(all_strategies(UNLIMITED))))
@examples(25)
@given(seed=st.integers(0, 10**6), order=st.none() | st.integers(0, 10**6), budget=BUDGETS, on_failure=POLICIES)
def test_a_strategy_ends_keeps_its_budget_and_replays(which, seed, order, budget, on_failure):
    """The simulated driver checks each action, that decisions are repeatable, and that the group ends."""
    strategy = all_strategies(budget, on_failure)[which]
    lines: list[str] = []
    # The driver asks twice for every decision, and `Recorded` may be asked once only.
    outcome = run_group(strategy, random_model(seed), seed=order)
    again = run_group(strategy, random_model(seed), seed=order)
    assert (again.selection, again.decisions) == (outcome.selection, outcome.decisions), "equal runs, equal results"

    recorded = Recorded(strategy, lines.append)
    for group, actions in outcome.decisions:
        assert list(recorded.decide(group)) == list(actions)
    assert recorded.select(outcome.group) == outcome.selection
    replayed = replay(lines, strategy)
    assert [decision.actions for decision in replayed[:-1]] == [tuple(actions) for _, actions in outcome.decisions]
    assert replayed[-1].selection == outcome.selection
    assert replayed[-1].group == outcome.group, "the log has all that the strategy was told"

    limit = strategy.needs.budget
    assert limit.tokens is None or outcome.num_sampled <= limit.tokens
    assert limit.branches is None or len(outcome.group.branches) <= limit.branches

    counts = count_tokens(outcome.group, outcome.selection)
    assert counts.kept + counts.pruned == outcome.num_sampled == outcome.group.num_tokens
    assert min(counts.kept, counts.pruned) >= 0

    selected = [outcome.group.branches[index] for index in outcome.selection.branches]
    dropped = [branch for branch in selected if any(score.value is None for score in branch.scores)]
    assert not dropped or isinstance(strategy, ComputeOptimal), "a branch that was dropped is not chosen"
    assert outcome.selection.reason
    if not selected:
        assert "failed" in outcome.selection.reason
    if outcome.selection.answer is not None:
        assert selected[0].answer == outcome.selection.answer


@examples(20)
@given(seed=st.integers(0, 10**6), order=st.integers(0, 10**6))
def test_whole_outputs_do_not_depend_on_the_order_of_arrival(seed, order):
    """Strategies that wait for all their branches give one result in whatever order these come."""
    strategies = [
        BestOfN(5, verifier),
        ConfidenceVote(5, NUMBER),
        MajorityVote(5, NUMBER, stop_when_decided=False),
        VerifierVote(5, NUMBER, verifier),
        BeamSearch(4, 2, verifier, step_text=";", max_steps=30),
    ]
    for strategy in strategies:
        results = [run_group(strategy, random_model(seed), seed=arrival).selection for arrival in (None, order)]
        assert results[0].answer == results[1].answer
        if not isinstance(strategy, BeamSearch):
            assert results[0] == results[1]


class Fickle:
    """A strategy that does not keep to its log."""

    needs = MajorityVote(2, NUMBER).needs

    def __init__(self, count: int, branches: tuple[int, ...]) -> None:
        self.count, self.branches = count, branches

    def decide(self, group):
        return [] if group.branches else [Start(self.count)]

    def select(self, group):
        return Selection(branches=self.branches)


def test_a_replay_finds_the_first_difference():
    lines: list[str] = []
    recorded = Recorded(Fickle(2, (0,)), lines.append, description={"strategy": "fickle"})
    recorded.decide(Group(num_prompt_tokens=3))
    recorded.select(Group(num_prompt_tokens=3, branches=(Branch(index=0), Branch(index=1)), elapsed_s=1.5))
    assert json.loads(lines[0])["strategy"] == {"strategy": "fickle"}
    replay(lines, Fickle(2, (0,)))
    with pytest.raises(ReplayMismatch, match=r"decision 0.*count=2.*count=3"):
        replay(lines, Fickle(3, (0,)))
    with pytest.raises(ReplayMismatch, match=r"decision 1"):
        replay(lines, Fickle(2, (1,)))


@pytest.mark.parametrize(
    "line",
    [
        "",
        "5",
        "{}",
        '{"event": "status", "branch": 0}',
        '{"event": "tokens", "branch": 9}',
        '{"event": "x", "branch": 0}',
    ],
)
def test_a_line_that_is_no_event_is_refused(line):
    start = json.dumps({"event": "group", "num_prompt_tokens": 1, "forced_texts": [], "strategy": None})
    with pytest.raises(ValueError, match="line 2 is no event"):
        replay([start, line], MajorityVote(2, NUMBER))


@pytest.mark.parametrize("action", [Start(3, "a"), Start(1, greedy=True), Fork(1, 2, 7, (5, 6), True, "b"), Finish()])
def test_actions_as_json(action):
    assert action_from_dict(json.loads(json.dumps(action_to_dict(action)))) == action


def test_tokens_that_a_finished_child_shares_are_kept():
    """The parent's first three of five tokens are the child's; the child has one forced token and two of its own."""
    score = Score(num_tokens=5, value=0.5, verifier_tokens=11)
    parent = Branch(index=0, token_ids=(1, 2, 3, 4, 5), status=Status.PRUNED, scores=(score,))
    child = Branch(index=1, parent=0, num_shared=4, num_forced=1, token_ids=(1, 2, 3, 9, 6, 7), status=Status.FINISHED)
    lost = dataclasses.replace(parent, index=2)
    counts = count_tokens(Group(num_prompt_tokens=1, branches=(parent, child, lost)), Selection(branches=(1,)))
    assert (counts.kept, counts.pruned, counts.verifier) == (3 + 2, 2 + 5, 22)
