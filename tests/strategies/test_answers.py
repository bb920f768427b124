"""Answers and the regular expressions that find them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertwire.strategies.answers import BoxedAnswer, JsonPointerAnswer, RegexAnswer, WholeText, normalized


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        (None, None), ("", None), (" \n", None), ("$$", None), (" 42. ", "42"), ("$1,050.0$.", "1050"), ("+007", "7"),
        ("-0.0", "0"), ("-0.50", "-0.5"), ("1,05", "1,05"), ("3.", "3"), ("a  b\nc", "a b c"), ("Paris", "Paris"),
        ("1e5", "1e5"), (".", None), ("x = 5", "x = 5"),
    ],
)  # fmt: skip
def test_normal_forms(answer, normal):
    assert normalized(answer) == normal


@given(st.text(max_size=50))
def test_normal_forms_are_their_own_normal_forms(text):
    once = normalized(text)
    assert normalized(once) == once
    assert WholeText()(text) == once


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{42}", "42"),
        (r"\boxed{1} and then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{7} and \boxed{8", "7"),  # the last complete one
        (r"\boxed{\boxed{3}", "3"),
        (r"\boxed{ }", None),
        (r"\boxed{1}" + r"\boxed{" * 7, "1"),
        (r"\boxed{1}" + r"\boxed{" * 8, None),
        (r"\boxed{" + "a" * 4095 + "}", "a" * 4095),
        (r"\boxed{" + "a" * 4096 + "}", None),
        ("no box", None),
        (r"\boxed 5", None),
    ],
)
def test_boxed_answers(text, answer):
    assert BoxedAnswer()(text) == answer


@pytest.mark.parametrize(
    ("pointer", "text", "answer"),
    [
        ("/a", '{"a": 5}', "5"), ("/a", '{"a": "5.0"}', "5"), ("/a/1", '{"a": [1, true]}', "true"), ("", "[1, 2]", "[1, 2]"),
        ("/a~1b/~0", '{"a/b": {"~": "x"}}', "x"), ("/a", '{"a": null}', None), ("/a", "{}", None), ("/0", "[]", None),
        ("/01", "[1, 2]", None), ("/a", "not json", None), ("/a", "[" * 60_000, None), ("/a", '{"a": NaN}', None),
        ("/a", '{"a": {"c": 1, "b": 2}}', '{"b": 2, "c": 1}'), ("/a", '{"a": 5}' + " " * 65_528, "5"),
        ("/a", '{"a": 5}' + " " * 65_529, None),
    ],
)  # fmt: skip
def test_json_pointers(pointer, text, answer):
    assert JsonPointerAnswer(pointer)(text) == answer


@pytest.mark.parametrize("pointer", ["a", "/~2", "/a~"])
def test_bad_json_pointers_are_refused(pointer):
    with pytest.raises(ValueError, match=r"answer\.pointer"):
        JsonPointerAnswer(pointer)


def test_a_regular_expression_takes_its_last_match():
    extract = RegexAnswer(r"answer(?: is|:) (-?\d+)")
    assert extract("answer is 5, no, answer: -70") == "-70"
    assert extract("nothing") is None
    assert RegexAnswer(r"(\w+)=(\d+)", group=2)("a=1 b=2") == "2"
    assert RegexAnswer(r"\d+")("1 22 333") == "333"
    assert RegexAnswer(r"\d+", group=0)("1 22 333") == "333"
    assert RegexAnswer(r"a|(b)")("a") is None  # the group takes no part in the match


@pytest.mark.parametrize(
    ("pattern", "group", "message"),
    [
        ("", None, r"answer\.pattern"), ("(", None, "missing"), (")", None, "unexpected"), ("*a", None, "no argument"),
        (r"(a)\1", None, "escape"), ("(?=a)", None, r"RE2's syntax.*\(\?="), ("a{9999}", None, "repetition"),
        ("[z-a]", None, "range"),
        ("a{900}", None, "at most 256 instructions"), ("((((a{99}){99}){99}){99})", None, "repetition"),
        ("[a", None, "missing"), ("a", 1, r"answer\.group"), ("(a)", 2, r"answer\.group.* 0 to 1"),
        ("\ud800", None, "surrogates"), (r"(((.{9}){9}){9})", None, "at most 256 instructions of RE2, got more"),
        ("a" * 513, None, "at most 512 characters, got 513"), (r"\pL\PL" * 5, None, r"\\p or \\P at most 8 times, got 10"),
    ],
)  # fmt: skip
def test_bad_patterns_are_refused(pattern, group, message):
    with pytest.raises(ValueError, match=message):
        RegexAnswer(pattern, group)


@pytest.mark.parametrize("pattern", [r"(a+)+b", r"(a|a)*b", r"(a*)*b", r"(\w+\s?)*!", r"(.*)(.*)(.*)(.*)x"])
def test_no_pattern_takes_exponential_time(pattern):
    """Python's own `re` would not return from most of these."""
    assert RegexAnswer(pattern)("a" * 5000) is None


def test_text_outside_ascii_and_before_the_last_characters():
    assert RegexAnswer(r"é(\w+)")("ö" * 5000 + "éab cd") == "ab"
    assert RegexAnswer(r"é(.)")("é1" + "ö" * 5000) is None
