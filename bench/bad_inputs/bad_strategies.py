"""Bad strategies of requests over gRPC, as a command line writes them, with words of the error that each must give."""

from __future__ import annotations

import json
from typing import Any

REGEX = {"type": "regex", "pattern": "(a"}
STRATEGIES: tuple[tuple[str | dict[str, Any], str, *tuple[str, ...]], ...] = (
    ("magic:n=2", "INVALID_ARGUMENT", "strategy must be one of", "best_of_n", "'magic'"),
    ("best_of_n:score=mean_logprob", "INVALID_ARGUMENT", "needs the options n"),
    ("best_of_n:n=0,score=mean_logprob", "INVALID_ARGUMENT", "n must be", ">= 1"),
    ("best_of_n:n=100000,score=mean_logprob", "INVALID_ARGUMENT", "n must be at most 256", "100000"),
    ("best_of_n:n=2", "INVALID_ARGUMENT", "verifier must be given"),
    ("best_of_n:n=2,verifier=exact", "INVALID_ARGUMENT", "verifier must be one of", "none is configured", "'exact'"),
    ("best_of_n:n=2,score=length", "INVALID_ARGUMENT", "score must be one of", "'mean_logprob'", "'length'"),
    ("best_of_n:n=2,size=2 (refused by the client)", "ValueError", "best_of_n has the options n, verifier", "size"),
    ("majority_vote:n=2", "INVALID_ARGUMENT", "needs the options n, answer", "answer must be given"),
    ("majority_vote:n=2,answer=json (refused by the client)", "ValueError", "answer.type must be one of boxed"),
    ({"strategy": "majority_vote", "n": 2, "answer": REGEX}, "INVALID_ARGUMENT", "answer.pattern must be"),
    ("first_k_finish:n=2,budget.seconds=-1", "INVALID_ARGUMENT", "budget.seconds must be", "> 0"),
    ("first_k_finish:n=2,budget.tokens=0", "INVALID_ARGUMENT", "budget.tokens must be", ">= 1"),
    ("first_k_finish:n=2,k=3", "INVALID_ARGUMENT", "k must be", "got 3"),
    (
        "best_of_n:n=2,score=mean_logprob,verifier_policy.timeout_s=1000",
        "INVALID_ARGUMENT",
        "verifier_policy.timeout_s must be at most 300",
    ),
    ("beam_search:n=4,width=2,verifier=exact", "INVALID_ARGUMENT", "verifier must be one of"),
    ("sequential_revision:revisions=1000", "INVALID_ARGUMENT", "revisions must be at most 256"),
    ("sequential_revision:revisions=1", "INVALID_ARGUMENT", "needs a tokenizer"),
)
CASCADES: tuple[tuple[dict[str, Any], *tuple[str, ...]], ...] = (
    ({"large": "a"}, "cascade.large must be another model than small", "'a'"),
    ({"router_threshold": 0.5}, "cascade.router must be given with router_threshold"),
    ({"confidence_threshold": 0.5}, "cascade.confidence_threshold", "<= 0", "got 0.5"),
    ({"window": 0}, "cascade.window", ">= 1", "got 0"),
    ({"random_share": 1.5}, "cascade.random_share", "got 1.5"),
    ({"draft_tolerance": -1.0}, "cascade.draft_tolerance", ">= 0", "got -1.0"),
    ({"draft_tolerance": float("nan")}, "cascade.draft_tolerance", "nan"),
)
COMMANDS: tuple[tuple[str, ...], ...] = (
    ("serve --strategies no_such_module --port 0", "strategies: module no_such_module cannot be imported"),
    ("serve --strategies json --port 0", "strategies: module json must have a dictionary STRATEGIES or VERIFIERS"),
    ("serve --verifier 127.0.0.1:9 --port 0", "verifier must be NAME=HOST:PORT", "'127.0.0.1:9'"),
    ("serve --verifier exact=9 --port 0", "verifier exact must be HOST:PORT", "'9'"),
    ("serve --verifier-ca-certs ca.pem --port 0", "verifier_ca_certs has no effect without verifier"),
    ("generate --prompt x --strategy magic", "strategy must be one of", "best_of_n", "'magic'"),
)


def description(strategy: str | dict[str, Any]) -> str:
    """Return a strategy as the page shows it."""
    return f"strategy={strategy if isinstance(strategy, str) else json.dumps(strategy)}"


def value(strategy: str | dict[str, Any]) -> str | dict[str, Any]:
    """Return a strategy as the client takes it."""
    return strategy.partition(" (")[0] if isinstance(strategy, str) else strategy
