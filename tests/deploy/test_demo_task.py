"""The demo task: its problems can be solved, its verifier finds every wrong step, its test problems are not trained on."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertwire.deploy import demo_verifiers
from expertwire.deploy.demo_task import (
    SIZES,
    WORDS,
    Problem,
    check,
    final_answer,
    first_wrong_step,
    make_example,
    make_problem,
    make_thinking_example,
    reachable,
    read_problem,
    side_of,
)

BINS = [(kind, size) for kind, sizes in SIZES.items() for size in sizes]
bins, seeds, sides = st.sampled_from(BINS), st.integers(0, 2**48), st.sampled_from(["test", "train"])


@given(bins, seeds, sides)
def test_the_solution_of_an_example_is_right(kind_size, seed, side):
    problem, solution = make_example(*kind_size, seed, side)
    assert check(problem, solution)
    assert first_wrong_step(problem, solution) is None
    assert solution.count(";") == kind_size[1] - 1
    assert set(problem.prompt.split()) | set(solution.split()) <= set(WORDS)


@given(bins, seeds, sides)
def test_a_problem_is_a_function_of_its_seed(kind_size, seed, side):
    problem = make_problem(*kind_size, seed, side)
    assert problem == make_problem(*kind_size, seed, side)
    assert side_of(problem.kind, problem.numbers) == side


@given(bins, seeds, st.data())
def test_one_changed_word_is_found_in_its_step(kind_size, seed, data):
    problem, solution = make_example(*kind_size, seed)
    words = solution.split()
    place = data.draw(st.integers(0, len(words) - 3))
    word = data.draw(st.sampled_from([word for word in WORDS if word != words[place]]))
    changed = " ".join([*words[:place], word, *words[place + 1 :]])
    same_value = word in "+-*" and problem.kind == "COUNTDOWN"  # 2 + 2 and 2 * 2
    if not same_value:
        step = words[:place].count(";")
        assert first_wrong_step(problem, changed + " ;") == step


@given(seeds)
def test_a_wrong_sum_is_refused(seed):
    problem, solution = make_example("SUM", 4, seed)
    body = solution.rpartition(" ")[0]
    right = [number for number in range(100) if check(problem, f"{body} {number}")]
    assert right == [problem.answer]


@given(bins, seeds, st.randoms())
def test_restating_the_list_in_another_order_is_right(kind_size, seed, rng):
    problem, solution = make_example(*kind_size, seed)
    steps = [step.split(" : ") for step in solution.split(" ; ")[:-1]]
    shuffled = [f"{step} : {' '.join(rng.sample(rest.split(), len(rest.split())))}" for step, rest in steps]
    assert first_wrong_step(problem, " ; ".join((*shuffled, "answer 0"))) is None


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("", None),
        ("3 * 4 =", None),  # not finished, so not judged
        ("3 * 4 = 12 : 2 12 ;", None),
        ("4 * 3 = 12 : 12 2 ; 12 + 2 = 14 : 14 ; answer 14", None),
        ("3 + 4 = 7 : 2 7 ; 7 * 2 = 14 : 14 ;", None),
        ("3 * 4 = 13 : 2 13 ;", 0),  # miscalculated
        ("3 * 4 = 12 : 12 ;", 0),  # lost a number
        ("3 * 5 = 15 : 2 4 ;", 0),  # a number that is not there
        ("3 - 4 = 1 : 2 1 ;", 0),
        ("4 - 3 = 1 : 2 1 ;", 0),  # right, but 14 is out of reach
        ("3 * 4 = 12 : 2 12 ; 12 - 2 = 10 : 10 ;", 1),
        ("3 * 4 = 12 : 2 12 ; hello ;", 1),
        ("3 * 4 = 12 : 2 12 ; 2 + 12 = 14 : 14 ; answer 14 ;", 2),
    ],
)
def test_steps_of_countdown_are_judged(text, wrong):
    assert first_wrong_step(Problem("COUNTDOWN", (3, 4, 2), 14), text) == wrong


def test_countdown_needs_the_steps_and_sum_only_the_answer():
    assert not check(Problem("COUNTDOWN", (3, 4, 2), 14), "answer 14")
    assert not check(Problem("COUNTDOWN", (3, 4, 2), 14), "3 * 4 = 12 : 2 12 ; answer 14")
    assert check(Problem("SUM", (3, 4, 2), 9), "answer 9")
    assert not check(Problem("SUM", (3, 4, 2), 9), "3 + 4 = 7 : 2 7 ; 2 + 7 = 9 : 9 ;")


def test_reachable_is_what_a_search_by_hand_finds():
    assert reachable((2, 3)) == {1, 5, 6}
    assert reachable((2, 3, 4)) == {1, 2, 3, 4, 5, 6, 9, 10, 11, 14, 18, 20, 24}
    assert reachable((14, 14)) == {28}  # 0 and 196 are not allowed


@given(st.sampled_from([bin for bin in BINS if bin[0] == "COUNTDOWN"]), seeds)
def test_targets_can_be_reached(kind_size, seed):
    problem = make_problem(*kind_size, seed)
    assert problem.answer in reachable(tuple(sorted(problem.numbers)))


@pytest.mark.parametrize(("kind", "size"), BINS)
def test_training_never_sees_the_numbers_of_a_test_problem(kind, size):
    numbers = {
        side: {tuple(sorted(make_problem(kind, size, s, side).numbers)) for s in range(300)}
        for side in ("test", "train")
    }
    assert not numbers["test"] & numbers["train"]
    assert all(side_of(kind, each[::-1]) == "test" for each in numbers["test"])


def test_an_eighth_of_all_problems_is_for_testing():
    held_out = sum(side_of("SUM", (a, b)) == "test" for a in range(100) for b in range(a, 100))
    assert 0.1 < held_out / 5050 < 0.15


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("1 + 2 = 3 : 3 ; answer 3", 3),
        ("answer 07", None),
        ("answer 3 3", None),
        ("answer -3", None),
        ("3", None),
        ("", None),
    ],
)
def test_final_answer(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("CHAIN", 3, 0), "kind must be one of SUM, COUNTDOWN"),
        (("SUM", 9, 0), "size of SUM must be from 2 to 8"),
        (("COUNTDOWN", 1, 0), "size of COUNTDOWN must be from 2 to 5"),
        (("SUM", 3, 0, "both"), "side must be 'test' or 'train'"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_problem(*arguments)


def test_the_vocabulary_has_128_words_once():
    assert len(set(WORDS)) == len(WORDS) == 128


@given(bins, seeds)
def test_a_prompt_is_read_back(kind_size, seed):
    problem = make_problem(*kind_size, seed)
    assert read_problem(problem.prompt) == problem


@pytest.mark.parametrize("prompt", ["", "SUM ?", "SUM 1 x ?", "SUM 1 2", "COUNTDOWN 1 2 ?", "PRODUCT 1 2 ?"])
def test_other_prompts_are_refused(prompt):
    with pytest.raises(ValueError, match="a prompt must be"):
        read_problem(prompt)


@given(bins, seeds)
def test_verifiers_accept_right_and_refuse_wrong_outputs(kind_size, seed):
    problem, solution = make_example(*kind_size, seed, "test")
    first, _, _ = solution.partition(";")
    part = f"{first};"
    wrong = part.replace(":", ": 0", 1)  # restates a number that is not left

    def candidate(text, complete):
        return SimpleNamespace(prompt=problem.prompt, text=text, complete=complete)

    candidates = [candidate(solution, True), candidate(part, False), candidate(wrong, False), candidate(part, True)]
    assert demo_verifiers.process(candidates) == [1.0, 1.0, 0.0, 0.0]
    assert demo_verifiers.outcome(candidates) == [1.0, 0.0, 0.0, 0.0]


@given(st.integers(2, 8), seeds, st.integers(0, 90), st.booleans())
def test_thinking_examples_answer_right_wherever_they_are_cut(size, seed, cut, again):
    problem, solution = make_thinking_example(size, seed, cut=cut, again=again)
    assert check(problem, solution)
    words = solution.split()
    assert (words[0], words[-3:-1]) == ("<think>", ["</think>", "answer"])
    assert len(words) <= cut + 4
    whole = make_thinking_example(size, seed, again=again)[1]
    assert whole.count("Wait") == again
    steps = whole.removeprefix("<think>").partition("Wait")[0].partition("</think>")[0]
    assert first_wrong_step(problem, steps) is None
