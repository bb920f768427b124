"""Tokens of reasoning in the usage of a request, however its tokens arrive."""

from __future__ import annotations

import time

import pytest

from expertwire.deploy.grpc.usage import UsageCounter
from expertwire.engine.frontend.api import Update
from expertwire.engine.frontend.tokenizer import ReasoningIds

IDS = ReasoningIds((7, 8), 9)


@pytest.mark.parametrize("size", [1, 2, 3, 100])
@pytest.mark.parametrize(
    ("tokens", "is_open", "expected"),
    [
        ([1, 2, 3, 9, 4], True, 3),
        ([7, 8, 1, 2, 9, 4], False, 2),
        ([7, 8, 1, 2], False, 2),
        ([7, 1, 2, 9], False, 0),
        ([7], False, 0),
        ([9, 1, 9], True, 0),
        ([1, 9, 7, 8, 1, 9], True, 2),
        ([5, 7, 7, 8, 1, 2, 9, 7, 9, 7, 8, 3], False, 3),
    ],
)
def test_reasoning_tokens(tokens, is_open, expected, size):
    counter = UsageCounter(5, IDS, time.monotonic(), opens_reasoning=is_open)
    for at in range(0, len(tokens), size):
        for branch in (0, 1):
            counter.add(Update(0, branch, token_ids=tuple(tokens[at : at + size])))
    usage = counter.message()
    assert (usage.prompt_tokens, usage.completion_tokens) == (5, 2 * len(tokens))
    assert usage.reasoning_tokens == 2 * expected
    assert 0 < usage.time_to_first_token_s <= usage.total_time_s


def test_a_model_without_reasoning_has_none():
    counter = UsageCounter(5, None, time.monotonic(), opens_reasoning=False)
    counter.add(Update(0, token_ids=(7, 8, 1)))
    assert counter.message().reasoning_tokens == 0
