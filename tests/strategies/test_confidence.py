"""Confidence of outputs that grow."""

from __future__ import annotations

import dataclasses

import hypothesis.strategies as st
import pytest
from helpers.examples import examples
from hypothesis import given

from expertwire.strategies.base import Branch
from expertwire.strategies.confidence import FallingWindow, Windows


def lowest_by_definition(logprobs, window):
    if len(logprobs) <= window:
        return sum(logprobs) / len(logprobs) if logprobs else 0.0
    return min(sum(logprobs[begin : begin + window]) / window for begin in range(len(logprobs) - window + 1))


@examples(100)
@given(
    st.lists(st.floats(-20, 0), max_size=60),
    st.lists(st.tuples(st.integers(0, 60), st.integers(1, 12)), min_size=1, max_size=12),
)
def test_windows_are_those_of_the_definition_however_an_output_grows(logprobs, calls):
    windows = Windows()
    for length, window in calls:  # also fewer log-probabilities than before, and other windows
        known = logprobs[:length]
        assert windows.lowest(known, window) == pytest.approx(lowest_by_definition(known, window), abs=1e-9)


def test_a_growing_output_has_the_bits_of_a_whole_one():
    logprobs, growing = [-((7 * i) % 11) / 3 for i in range(200)], Windows()
    grown = [growing.lowest(logprobs[:length], 16) for length in range(201)]
    assert grown == [Windows().lowest(logprobs[:length], 16) for length in range(201)]


def test_views_of_a_branch_share_what_was_computed():
    first = Branch(index=0, logprobs=(-1.0, -2.0))
    later = dataclasses.replace(first, logprobs=(-1.0, -2.0, -6.0))
    assert (first.lowest_window(2), later.lowest_window(2), first.lowest_window(2)) == (-1.5, -4.0, -1.5)
    assert later.windows is first.windows
    assert Branch(index=0).windows is not Branch(index=0).windows


@examples(100)
@given(st.lists(st.floats(-20, 0), max_size=60), st.integers(1, 12))
def test_a_falling_window_notices_each_new_lowest_mean(logprobs, window):
    falling, lowest = FallingWindow(window), float("inf")
    for length, logprob in enumerate(logprobs, 1):
        mean = Windows().lowest(logprobs[:length], window) if length >= window else float("inf")
        assert falling.push(logprob) == falling.has_fallen == (mean < lowest)
        falling.has_fallen, lowest = False, min(lowest, mean)
