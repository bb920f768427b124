"""The table of sequences whose readers take token ids only."""

from __future__ import annotations

import numpy as np
import pytest

from expertwire.deploy.grpc.usage import UsageCounter
from expertwire.engine.frontend.api import Update
from expertwire.engine.frontend.token_columns import FIRST_ID, ColumnReader, TokenColumns
from expertwire.engine.frontend.tokenizer import ReasoningIds


def reader():
    found = ColumnReader(lambda: found.news.append(1))
    found.news = []
    return found


def add(table, reader, key, branch=0, *, window=None, allowance=None, opens_reasoning=False):
    return table.add(reader, key, branch, window, allowance, opens_reasoning=opens_reasoning)


def push(table, tokens):
    """`tokens`: by sequence id."""
    finish = np.zeros(len(tokens), np.uint8)
    return table.push(np.array([*tokens], np.int64), np.array([*tokens.values()], np.int32), finish).tolist()


def taken(table, reader, max_tokens=1000):
    """Take from a reader: tokens by (key, branch), and what may be sampled instead, by sequence id."""
    sequence_ids, tokens = reader.take(max_tokens)
    credited = table.taken(sequence_ids, tokens.num_tokens)
    parts = np.split(tokens.token_ids, np.cumsum(tokens.num_tokens)[:-1])
    entries = list(zip(tokens.keys.tolist(), tokens.branches.tolist(), strict=True))
    assert len(set(entries)) == len(entries), "an entry a branch"
    return (
        {entry: part.tolist() for entry, part in zip(entries, parts, strict=True)},
        dict(zip(credited.sequence_ids.tolist(), credited.tokens.tolist(), strict=True)),
    )


def test_tokens_of_several_steps_are_joined_by_branch():
    table, one = TokenColumns(None), reader()
    a, b = add(table, one, 7), add(table, one, 7, 1)
    assert push(table, {b: 1, a: 2}) == [True, True]
    assert taken(table, one)[0] == {(7, 1): [1], (7, 0): [2]}
    assert push(table, {b: 3, a: 4}) == [False, False]
    push(table, {a: 5})
    assert taken(table, one)[0] == {(7, 0): [4, 5], (7, 1): [3]}
    assert (len(one.news), one.has_tokens) == (3, False)
    assert (table.remove(a), table.remove(b)) == ((3, 0), (2, 0))


def test_texts_are_joined_with_their_tokens():
    table, one = TokenColumns(None), reader()
    a, b = add(table, one, 1), add(table, one, 2)
    for sequence_id in (a, b):
        one.push_text[sequence_id] = lambda token, finish: f"<{token}>" if not finish else "end"
    push(table, {b: 1, a: 2})
    assert one.take(1000)[1].texts == ["<1>", "<2>"]
    push(table, {a: 3})
    push(table, {b: 4, a: 5})
    table.push(np.array([a]), np.array([6], np.int32), np.ones(1, np.uint8))
    table.remove(a)
    push(table, {a: 7, b: 8})
    _, tokens = one.take(1000)
    assert (tokens.keys.tolist(), tokens.texts) == ([1, 2], ["<3><5>end", "<4><8>"])
    assert list(one.push_text) == [b]


def test_a_reader_takes_whole_steps_up_to_a_size():
    table, one = TokenColumns(None), reader()
    a, b = add(table, one, 1), add(table, one, 2)
    for token in range(3):
        push(table, {a: token, b: token})
    assert taken(table, one, max_tokens=3)[0] == {(1, 0): [0, 1], (2, 0): [0, 1]}
    assert taken(table, one, max_tokens=3)[0] == {(1, 0): [2], (2, 0): [2]}


def test_readers_get_their_own_and_removed_sequences_nothing():
    table, one, two = TokenColumns(None), reader(), reader()
    a, b, c = add(table, one, 1), add(table, two, 1), add(table, two, 2)
    push(table, {a: 10, c: 12, b: 11})
    table.remove(c)
    assert push(table, {c: 99, b: 13, a: 14}) == [False, False, False]
    assert taken(table, one)[0] == {(1, 0): [10, 14]}
    assert taken(table, two)[0] == {(1, 0): [11, 13], (2, 0): [12]}


def test_ids_are_never_used_again_and_the_table_grows():
    table, one, rng = TokenColumns(None), reader(), np.random.default_rng(0)
    running, seen = {}, set()
    for round_ in range(30):
        for _ in range(200):
            sequence_id = add(table, one, key := len(seen))
            assert sequence_id >= FIRST_ID
            assert sequence_id not in seen
            seen.add(sequence_id)
            running[sequence_id] = key
        push(table, {sequence_id: key % 1000 for sequence_id, key in running.items()})
        tokens, _ = taken(table, one, 10**6)
        assert tokens == {(key, 0): [key % 1000] for key in running.values()}
        for sequence_id in rng.permutation(list(running))[: 120 + round_].tolist():
            assert table.remove(sequence_id)[0] > 0
            del running[sequence_id]
    assert len(running) > 1024


def test_what_is_taken_is_credited_in_halves_of_the_window():
    table, one = TokenColumns(None), reader()
    a, b, c = add(table, one, 1, window=4), add(table, one, 2, window=8), add(table, one, 3)
    push(table, {a: 0, b: 0, c: 0})
    assert taken(table, one)[1] == {}
    push(table, {a: 0, b: 0, c: 0})
    assert taken(table, one)[1] == {a: 2}
    for _ in range(3):
        push(table, {b: 0, c: 0})
    table.remove(a)
    assert taken(table, one)[1] == {b: 5}


def test_no_more_is_credited_than_the_reader_allows():
    table, one = TokenColumns(None), reader()
    a = add(table, one, 1, window=4, allowance=3)
    for _ in range(4):
        push(table, {a: 0})
    assert taken(table, one)[1] == {a: 3}
    for _ in range(3):
        push(table, {a: 0})
    assert taken(table, one)[1] == {}
    credited = table.grant(a, 2)
    assert (credited.sequence_ids.tolist(), credited.tokens.tolist()) == ([a], [2])
    credited = table.grant(a, 100)
    assert credited.tokens.tolist() == [2]  # the window's four were used


@pytest.mark.parametrize("start", [(3,), (3, 4), (3, 4, 6)])
@pytest.mark.parametrize("opens", [False, True])
def test_reasoning_is_counted_as_usage_counts_it(start, opens):
    reasoning, rng = ReasoningIds(start, 5), np.random.default_rng(1)
    table, one = TokenColumns(reasoning), reader()
    outputs = rng.integers(3, 6 + 2, (300, 12))
    ids = [add(table, one, key, opens_reasoning=opens) for key in range(len(outputs))]
    for column in outputs.T:
        push(table, dict(zip(ids, column.tolist(), strict=True)))
    found = [table.remove(sequence_id)[1] for sequence_id in ids]
    expected = []
    for output in outputs.tolist():
        usage = UsageCounter(1, reasoning, 0.0, opens_reasoning=opens)
        usage.add(Update(1, token_ids=tuple(output)))
        expected.append(usage.message().reasoning_tokens)
    assert found == expected
    assert sum(found) > 0
