"""Control of reasoning, row by row, against its definition in plain Python."""

import torch
from helpers.examples import examples
from helpers.thinking_machine import Limits, Marks, banned, chosen, num_reasoning
from hypothesis import given
from hypothesis import strategies as st

from expertwire.kernels.ops import thinking

VOCAB = 12
tokens = st.integers(0, VOCAB - 1)


@st.composite
def models(draw):
    ids = draw(st.permutations(range(VOCAB)))
    size = draw(st.integers(1, 3))
    few = st.frozensets(tokens, max_size=4)
    return Marks(tuple(ids[:size]), ids[3], ids[4], draw(few), draw(few))


@st.composite
def limits(draw):
    budget = draw(st.one_of(st.none(), st.integers(0, 8)))
    minimum = draw(st.integers(0, 6 if budget is None else budget))
    if budget is None:
        return Limits(minimum=minimum)
    return Limits(budget, draw(st.integers(0, 5)), minimum)


def device_tokens(marks):
    ends, sentence_ends = torch.zeros(2, VOCAB, dtype=torch.bool)
    ends[[marks.end, *marks.eos]] = True
    sentence_ends[list(marks.sentence_ends)] = True
    return thinking.ThinkingTokens(torch.tensor(marks.start), marks.end, marks.wait, ends, sentence_ends)


def first_state(marks, is_open):
    return thinking.state_of([], marks.start, marks.end, marks.sentence_ends, is_open=is_open)


def column(values):
    return torch.tensor([min(value, thinking.NO_BUDGET) for value in values], dtype=torch.int32)


rows_of = st.lists(st.tuples(limits(), st.booleans(), st.lists(tokens, max_size=24)), min_size=1, max_size=5)


@examples(80)
@given(models(), rows_of)
def test_rows_as_each_alone(marks, rows):
    """Every row has its own limits and draws; one without draws left repeats its last."""
    on_device = device_tokens(marks)
    state = torch.tensor([first_state(marks, is_open) for _, is_open, _ in rows], dtype=torch.int32)
    budget = column([each.budget for each, _, _ in rows])
    most = column([each.budget + each.grace for each, _, _ in rows])
    minimum = column([each.minimum for each, _, _ in rows])
    outputs = [[] for _ in rows]
    for step in range(24):
        logits = torch.arange(len(rows) * VOCAB, dtype=torch.float32).view(-1, VOCAB)
        expected = logits.clone()
        for row, (each, is_open, _) in enumerate(rows):
            if (token := banned(outputs[row], marks, each, is_open)) is not None:
                expected[row, token] = -torch.inf
        thinking.keep_closed(logits, state, budget, on_device)
        assert torch.equal(logits, expected)
        drawn = [draws[step % len(draws)] if draws else 0 for _, _, draws in rows]
        found, state = thinking.reference(torch.tensor(drawn), state, budget, most, minimum, on_device)
        for output, token, (each, is_open, _), draw in zip(outputs, found.tolist(), rows, drawn, strict=True):
            assert token == chosen(draw, output, marks, each, is_open)
            output.append(token)
    for output, (_, is_open, _), at in zip(outputs, rows, state.tolist(), strict=True):
        assert thinking.state_of(output, marks.start, marks.end, marks.sentence_ends, is_open=is_open) == tuple(at)
        assert at[1] == num_reasoning(output, marks, is_open)


def test_a_row_that_has_failed_stays_so():
    marks = Marks((1,), 2, 3, frozenset({4}), frozenset())
    state = torch.tensor([first_state(marks, True)] * 2, dtype=torch.int32)
    limits = column([0, 9]), column([0, 9]), column([0, 5])
    found, _ = thinking.reference(torch.tensor([-1, -1]), state, *limits, device_tokens(marks))
    assert found.tolist() == [-1, -1]


def test_the_host_reads_nothing_back():
    """Tensors of the device "meta" have no values that a host could read."""
    marks = Marks((1, 7), 2, 3, frozenset({4}), frozenset({5}))
    model = thinking.ThinkingTokens(*(x.to("meta") if isinstance(x, torch.Tensor) else x for x in device_tokens(marks)))
    state, limit = torch.zeros(3, 3, dtype=torch.int32, device="meta"), torch.zeros(3, dtype=torch.int32, device="meta")
    thinking.keep_closed(torch.zeros(3, VOCAB, device="meta"), state, limit, model)
    drawn = torch.zeros(3, dtype=torch.int64, device="meta")
    found, after = thinking.reference(drawn, state, limit, limit, limit, model)
    assert (found.dtype, after.dtype, after.shape) == (torch.int64, torch.int32, (3, 3))
