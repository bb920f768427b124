"""Sampling on a CPU gives the tokens of `kernels.ops.sampling`, whatever the rows and their parameters."""

import numpy as np
import pytest
import torch

from expertwire.kernels import registry
from expertwire.kernels.ops import sampling

SAMPLE = registry.choose("cpu").sample


def rows(num, vocab, seed, scale=3.0):
    return torch.from_numpy(scale * np.random.default_rng(seed).standard_normal((num, vocab)).astype(np.float32))


def columns(num, seed, *, temperatures=(0.0, 0.3, 1.0, 2.0), top_k=(-1,), top_p=(1.0,), min_p=(0.0,)):
    """Return random `Draws` of `num` rows."""
    rng = np.random.default_rng(seed)
    drawn = {
        "temperature": rng.choice(temperatures, num),
        "top_k": rng.choice(top_k, num),
        "top_p": rng.choice(top_p, num),
        "min_p": rng.choice(min_p, num),
        "seed": rng.integers(-(1 << 63), 1 << 63, num),
        "branch": rng.integers(0, 64, num),
    }
    named = [torch.from_numpy(drawn[name].astype(dtype)) for name, dtype in sampling.DRAW_PARAMETERS.items()]
    return sampling.Draws(*named, torch.from_numpy(rng.integers(0, 1 << 20, num)))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperatures": (0.0,)},
        {"min_p": (0.0, 0.05, 0.5, 1.0)},
        {"top_k": (-1, 1, 7), "top_p": (0.4, 1.0)},
        {"top_k": (-1, 40), "top_p": (0.9, 1.0), "min_p": (0.0, 0.1), "temperatures": (0.0, 1e-30, 0.7)},
    ],
    ids=str,
)
@pytest.mark.parametrize(("num", "vocab"), [(1, 1), (1, 128), (16, 128), (200, 517), (7, 40_000)])
def test_tokens_are_those_of_the_reference(num, vocab, options):
    for seed in range(5):
        arguments = rows(num, vocab, seed), columns(num, seed, **options)
        flags = {"drawn": bool((arguments[1].temperature_O > 0).any()), "filtered": "top_k" in options}
        assert SAMPLE(*arguments, **flags).tolist() == sampling.sample(*arguments, **flags).tolist()


@pytest.mark.parametrize("drawn", [True, False])
def test_of_equal_logits_the_first_is_the_greedy_one(drawn):
    logits = torch.zeros(3, 40)
    logits[1, 5:9], logits[2, :] = 2.0, -1e30
    assert SAMPLE(logits, columns(3, 0, temperatures=(0.0,)), drawn=drawn).tolist() == [0, 5, 0]


@pytest.mark.parametrize("options", [{"temperatures": (0.0,)}, {"temperatures": (1.0,)}, {"top_p": (0.9,)}], ids=str)
def test_rows_without_probabilities_give_no_token_and_others_the_same_ones(options):
    whole, at = rows(9, 50, 3), columns(9, 3, **options)
    expected = SAMPLE(whole, at).tolist()
    nan, inf = torch.nan, torch.inf
    for row, changes in enumerate(({0: nan}, {49: nan}, {7: inf}, {3: inf, 30: nan}, {3: nan, 30: inf})):
        for token, value in changes.items():
            whole[row, token] = value
        expected[row] = -1
    whole[5] = -inf
    expected[5] = -1
    whole[6, whole[6].argmin()] = -inf  # banned: it has no probability, the others have
    found = SAMPLE(whole, at).tolist()
    assert found == expected == sampling.sample(whole, at).tolist()


def test_no_rows():
    assert SAMPLE(torch.zeros(0, 8), columns(0, 0)).shape == (0,)
