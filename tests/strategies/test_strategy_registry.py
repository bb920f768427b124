"""Strategies by name: command lines, JSON, and errors that say what is allowed."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest

import expertwire.strategies
from expertwire.strategies.answers import BoxedAnswer, RegexAnswer
from expertwire.strategies.base import Budget
from expertwire.strategies.best_of_n import BestOfN
from expertwire.strategies.compute_optimal import Bin, ComputeOptimal
from expertwire.strategies.majority_vote import MajorityVote
from expertwire.strategies.registry import STRATEGIES, parse_strategy, strategy_from_dict, strategy_to_dict
from expertwire.strategies.verifiers import VerifierPolicy


def exact(candidates):
    return [0.0 for _ in candidates]


VERIFIERS = {"exact": exact}


@pytest.mark.parametrize(
    ("text", "strategy"),
    [
        ("best_of_n:n=8,verifier=exact", BestOfN(8, exact)),
        ("best_of_n:n=8,score=mean_logprob", BestOfN(8, score="mean_logprob")),
        (
            "majority_vote:n=4,answer=boxed,budget.tokens=400,budget.seconds=1.5,stop_when_decided=false",
            MajorityVote(4, BoxedAnswer(), False, Budget(tokens=400, seconds=1.5)),
        ),
        (r"majority_vote:n=4,answer.type=regex,answer.pattern=(\d+)", MajorityVote(4, RegexAnswer(r"(\d+)"))),
        (r"majority_vote:n=4,answer=regex,answer.pattern=a=(\d+)", MajorityVote(4, RegexAnswer(r"a=(\d+)"))),
        (
            '{"strategy": "majority_vote", "n": 4, "answer": {"type": "regex", "pattern": "a, b"}}',
            MajorityVote(4, RegexAnswer("a, b")),
        ),
        (
            "best_of_n:n=2,verifier=exact,verifier_policy.on_failure=zero",
            BestOfN(2, exact, verifier_policy=VerifierPolicy(on_failure="zero")),
        ),
    ],
)
def test_a_command_line_is_a_strategy(text, strategy):
    options = parse_strategy(text)
    assert strategy_from_dict(options, verifiers=VERIFIERS) == strategy
    written = json.loads(json.dumps(strategy_to_dict(strategy, verifiers=VERIFIERS)))
    assert strategy_from_dict(written, verifiers=VERIFIERS) == strategy


def test_tables_are_nested_strategies():
    table = (Bin(least=0.9, strategy=MajorityVote(4, BoxedAnswer()), name="easy"), Bin(strategy=BestOfN(8, exact)))
    strategy = ComputeOptimal(table, answer=BoxedAnswer(), verifier=exact)
    written = json.loads(json.dumps(strategy_to_dict(strategy, verifiers=VERIFIERS)))
    assert written["table"][0] == {
        "strategy": {"strategy": "majority_vote", "n": 4, "answer": {"type": "boxed"}}, "least": 0.9, "name": "easy",
    }  # fmt: skip
    assert strategy_from_dict(written, verifiers=VERIFIERS) == strategy


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("best", "strategy must be one of adaptive_consistency, auto, .*, got 'best'"),
        ("", "strategy must be one of"),
        ("best_of_n:n", "name:key=value"),
        ("{", "no JSON"),
        ("best_of_n:n=8,verifier=x", "verifier must be one of: exact; got 'x'"),
        ("best_of_n:n=8", "verifier must be given"),
        ("best_of_n:n=many,score=mean_logprob", "n must be an integer >= 1, got 'many'"),
        ("best_of_n:m=8", "strategy best_of_n has the options n, verifier, score.*, got m"),
        ("majority_vote:n=3", "needs the options n, answer; answer must be given"),
        (
            "majority_vote:n=3,answer=best",
            "answer.type must be one of boxed, json_pointer, regex, whole_text, got 'best'",
        ),
        ("majority_vote:n=3,answer=regex", "answer needs the options pattern"),
        ("majority_vote:n=3,answer=5", "answer must be given"),
        ("majority_vote:n=3,answer=boxed,budget=5", "budget must be an object"),
        ("majority_vote:n=3,answer=boxed,n.x=5", "n.x cannot be set: n is 3"),
        (
            "majority_vote:n=3,answer=boxed,budget.token=5",
            "budget has the options tokens, branches, seconds, got token",
        ),
        ('{"strategy": "compute_optimal", "table": 5}', "table must be a list"),
        (
            '{"strategy": "compute_optimal", "table": [{"least": 1}]}',
            'table must have objects with the option "strategy"',
        ),
        ('{"strategy": ["a"]}', "strategy must be one of"),
        ('{"strategy": "best_of_n", "n": 2, "verifier": 5}', "verifier must be a name"),
    ],
)
def test_mistakes_are_named(text, message):
    with pytest.raises(ValueError, match=message):
        strategy_from_dict(parse_strategy(text), verifiers=VERIFIERS)


@dataclass(frozen=True)
class Mine:
    """A user's own strategy."""

    n: int = 2
    needs = MajorityVote(2, BoxedAnswer()).needs

    def decide(self, group):
        return []

    def select(self, group):
        raise NotImplementedError


def test_a_users_strategy_is_registered_without_globals():
    strategies = {**STRATEGIES, "mine": Mine}
    assert strategy_from_dict(parse_strategy("mine:n=3"), strategies=strategies) == Mine(3)
    assert strategy_to_dict(Mine(3), strategies=strategies) == {"strategy": "mine", "n": 3}
    with pytest.raises(ValueError, match="strategy must be one of"):
        strategy_from_dict({"strategy": "mine"})
    with pytest.raises(ValueError, match="Mine"):
        strategy_to_dict(Mine())


def test_a_verifier_without_a_name_is_not_written():
    with pytest.raises(ValueError, match="verifier must be among"):
        strategy_to_dict(BestOfN(2, exact))


def test_the_package_has_all_classes():
    assert {kind.__name__ for kind in STRATEGIES.values()} <= set(expertwire.strategies.__all__)
    for name in expertwire.strategies.__all__:
        assert hasattr(expertwire.strategies, name)
