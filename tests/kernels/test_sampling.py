"""Sampling: the random numbers, the distributions they give, and the penalties, against plain numpy."""

import numpy as np
import pytest
import torch

from expertwire.kernels.ops import sampling

VOCAB, DRAWS = 50, 40_000
LOGITS = (1.5 * np.random.default_rng(0).standard_normal(VOCAB)).astype(np.float32)
# Beyond the 1e-6 quantile of chi-square: a right sampler fails one seed in a million, and the seeds are fixed.
NORMAL_QUANTILE = 4.75


def draw(logits, uniform, *, temperature=1.0, top_k=-1, top_p=1.0, min_p=0.0):
    """Tokens of rows that all have these parameters."""
    num = len(uniform)
    rows = torch.from_numpy(np.broadcast_to(logits, (num, logits.shape[-1])).copy())

    def column(value, dtype):
        return torch.full((num,), value, dtype=dtype)

    f32 = torch.float32
    parameters = column(temperature, f32), column(top_k, torch.int64), column(top_p, f32), column(min_p, f32)
    return sampling.reference(rows, *parameters, torch.from_numpy(uniform)).numpy()


def uniform(num, seed=1, branch=0):
    return sampling.uniform(np.full(num, seed), np.full(num, branch, np.int32), np.arange(num))


def probabilities(logits, *, temperature=1.0, top_k=-1, top_p=1.0, min_p=0.0):
    """By definition: the k best, of these the smallest set that makes up top_p, of these what has min_p of the best."""
    p = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    order = np.argsort(-p, kind="stable")
    if top_k > 0:
        p[order[top_k:]] = 0
    p /= p.sum()
    enough = int(np.searchsorted(np.cumsum(p[order]), top_p)) + 1
    p[order[enough:]] = 0
    p[p < min_p * p.max()] = 0
    return p / p.sum()


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 3.0},
        {"top_k": 1},
        {"top_k": 7},
        {"top_k": 1000},
        {"top_p": 0.6},
        {"top_p": 1e-6},
        {"min_p": 0.1},
        {"min_p": 1.0},
        {"temperature": 1.7, "top_k": 20, "top_p": 0.8, "min_p": 0.05},
        {"temperature": 0.7, "top_k": 3, "top_p": 0.99},
    ],
    ids=str,
)
def test_draws_follow_the_distribution(parameters):
    counts = np.bincount(draw(LOGITS, uniform(DRAWS), **parameters), minlength=VOCAB)
    expected = DRAWS * probabilities(LOGITS, **parameters)
    assert not counts[expected == 0].any()
    kept = expected > 0
    chi_square, freedom = ((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum(), kept.sum() - 1
    # Wilson and Hilferty's approximation of the quantile.
    shift = 2 / (9 * max(freedom, 1))
    assert chi_square <= freedom * (1 - shift + NORMAL_QUANTILE * shift**0.5) ** 3 + 1e-9


def test_rows_are_independent_of_each_other():
    rng = np.random.default_rng(5)
    num = 200
    logits = torch.from_numpy(rng.standard_normal((num, VOCAB)).astype(np.float32))
    columns = [
        torch.from_numpy(rng.choice([0.0, 0.5, 1.0, 2.0], num).astype(np.float32)),
        torch.from_numpy(rng.choice([-1, 0, 1, 5], num)),
        torch.from_numpy(rng.choice([0.3, 0.9, 1.0], num).astype(np.float32)),
        torch.from_numpy(rng.choice([0.0, 0.2], num).astype(np.float32)),
        torch.from_numpy(uniform(num)),
    ]
    whole = sampling.reference(logits, *columns)
    alone = [sampling.reference(*(column[i : i + 1] for column in (logits, *columns))) for i in range(num)]
    assert whole.tolist() == torch.cat(alone).tolist()
    greedy = columns[0] == 0
    assert torch.equal(whole[greedy], logits[greedy].argmax(-1))


def test_extremes_of_the_uniform_number_give_the_first_and_last_token_kept():
    ends = np.array([0.0, 1 - 2.0**-53])
    assert draw(LOGITS, ends).tolist() == [0, VOCAB - 1]
    best = np.sort(np.argsort(-LOGITS)[:4])
    assert draw(LOGITS, ends, top_k=4).tolist() == [best[0], best[-1]]


@pytest.mark.parametrize("temperature", [1e-45, 1e-30, 1e-3])
def test_a_tiny_temperature_is_greedy(temperature):
    assert (draw(LOGITS, uniform(50), temperature=temperature) == LOGITS.argmax()).all()


ROWS_WITHOUT_PROBABILITIES = {
    "NaN": np.full(VOCAB, np.nan),
    "one NaN": np.where(np.arange(VOCAB) == 30, np.nan, LOGITS),
    "one inf": np.where(np.arange(VOCAB) == 30, np.inf, LOGITS),
    "NaN and inf": np.where(np.arange(VOCAB) == 30, np.nan, np.where(np.arange(VOCAB) == 3, np.inf, LOGITS)),
    "all -inf": np.full(VOCAB, -np.inf),
}


@pytest.mark.parametrize(
    "parameters", [{"temperature": 0.0}, {}, {"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.2}], ids=str
)
@pytest.mark.parametrize("row", ROWS_WITHOUT_PROBABILITIES.values(), ids=ROWS_WITHOUT_PROBABILITIES)
def test_a_row_without_probabilities_gives_no_token_and_others_the_same_ones(row, parameters):
    numbers = uniform(9)
    logits = np.tile(LOGITS, (9, 1))
    alone = draw(logits, numbers, **parameters)
    assert (alone >= 0).all()
    logits[4] = row
    beside = draw(logits, numbers, **parameters)
    assert beside[4] == -1
    assert np.array_equal(np.delete(beside, 4), np.delete(alone, 4))


def test_a_row_without_probabilities_among_greedy_ones():
    logits = torch.from_numpy(np.stack([LOGITS, *ROWS_WITHOUT_PROBABILITIES.values()]).astype(np.float32))
    nothing = sampling.Draws(*[torch.zeros(len(logits))] * 7)
    assert sampling.sample(logits, nothing, drawn=False).tolist() == [LOGITS.argmax(), *[-1] * 5]


def test_uniform_is_philox():
    """The first known answer of Random123's kat_vectors: philox4x32-10 of zeros begins 6627e8d5 e169c58d."""
    expected = ((0x6627E8D5 << 21) | (0xE169C58D >> 11)) * 2.0**-53
    zero = np.zeros(1, np.int64)
    assert sampling.uniform(zero, zero, zero) == [expected]


def test_uniform_of_different_counters_looks_independent():
    streams = [
        uniform(4096),
        uniform(4096, seed=2),
        uniform(4096, seed=-1),
        uniform(4096, seed=1 << 40),
        uniform(4096, branch=1),
        uniform(4096, branch=2),
    ]
    for stream in streams:
        assert stream.min() >= 0
        assert stream.max() < 1
        assert abs(stream.mean() - 0.5) < 0.02
        assert abs(np.corrcoef(stream[1:], stream[:-1])[0, 1]) < 0.06
    correlations = np.corrcoef(streams) - np.eye(len(streams))
    assert np.abs(correlations).max() < 0.06


def test_penalties_by_hand():
    prompt, output = torch.tensor([0, 1, 1]), torch.tensor([2, 2, 3, 1])
    start = torch.tensor([1.0, -1.0, 4.0, -2.0, 5.0])

    def penalized(**options):
        logits = start.clone()
        sampling.penalize(logits, prompt, output, **{"repetition": 1.0, "presence": 0.0, "frequency": 0.0, **options})
        return logits.tolist()

    assert penalized() == start.tolist()
    assert penalized(repetition=2.0) == [0.5, -2.0, 2.0, -4.0, 5.0]
    assert penalized(presence=0.5) == [1.0, -1.5, 3.5, -2.5, 5.0]
    assert penalized(frequency=0.5) == [1.0, -1.5, 3.0, -2.5, 5.0]
    assert penalized(repetition=2.0, presence=-1.0, frequency=0.25) == [0.5, -1.25, 2.5, -3.25, 5.0]
    logits = start.clone()
    sampling.penalize(logits, prompt, output[:0], repetition=2.0, presence=1.0, frequency=1.0)
    assert logits.tolist() == [0.5, -2.0, 4.0, -2.0, 5.0]


def test_token_logprobs():
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0], [5.0, 5.0, 5.0, 5.0]])
    chosen, rank, top_ids, top = sampling.token_logprobs(logits, torch.tensor([2, 3]), 3)
    expected = logits.double().log_softmax(-1)
    torch.testing.assert_close(chosen.double(), torch.stack([expected[0, 2], expected[1, 3]]))
    assert rank.tolist() == [3, 1]
    assert set(top_ids[0, :2].tolist()) == {1, 3}
    assert top_ids[0, 2] == 2
    torch.testing.assert_close(top.double(), expected.gather(1, top_ids))
    assert sampling.token_logprobs(logits, torch.tensor([2, 3]), 0)[2].shape == (2, 0)


@pytest.mark.parametrize("shape", [(2, 7), (16, 128), (33, 4097), (3, 151_936)])
def test_log_probabilities_do_not_depend_on_threads(shape):
    logits, token = 5 * torch.randn(shape, generator=torch.Generator().manual_seed(3)), torch.zeros(shape[0]).long()
    threads = torch.get_num_threads()
    found = []
    for count in (1, 2):
        torch.set_num_threads(count)
        found.append(sampling.token_logprobs(logits, token, 2))
        assert torch.get_num_threads() == count
    torch.set_num_threads(threads)
    assert all(map(torch.equal, *found))
    assert torch.equal(found[0][0], torch.log_softmax(logits, -1)[:, 0])
